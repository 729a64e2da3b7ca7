"""The HEST-Benchmark's protocol, to compare encoders with the figures that the field quotes.

Its quirks are kept, and named in `QUIRKS`; a depth-normalised column stands beside its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from histosge.genes import select_target, shared_genes
from histosge.metrics import correlate
from histosge.models.linear import Standardiser, principal_axes
from histosge.sections import Section
from histosge.splits import make_folds

N_GENES, N_COMPONENTS, MIN_SHARE = 50, 256, 0.10
HEST = "hest"
QUIRKS = (
    "Genes: the 50 most variable over all spots, held-out ones too, of those seen in 10 % of spots.",
    "Targets: log1p of raw counts, without depth normalisation, so a deeper spot is higher in every gene.",
    "Ridge without intercept on standardised components: the mean is not fitted, so only Pearson is usable.",
    "Penalty: 100 / (components x genes), fixed, not chosen.",
    "Pearson over all held-out spots of a fold together; a gene without one counts as 0 here and is counted.",
    "Embeddings: mean of the store's patches under a spot, not one patch of 112 µm centred on it.",
)
METRICS = ("pearson_mean", "pearson_mean_depth_normalised", "n_nan_genes")


@dataclass(frozen=True)
class HestResult:
    """Scores by fold.

    Parameters
    ----------
    scores
        Columns ``preset, split, fold, seed, metric, value``; the preset is ``hest``, or ``hest_noise``.
    split
        ``donor``, or ``section`` where there is one donor.
    """

    scores: pl.DataFrame
    split: str

    def values(self, preset: str, metric: str) -> NDArray[np.float64]:
        """Return one value per fold."""
        rows = self.scores.filter((pl.col("preset") == preset) & (pl.col("metric") == metric))
        return rows["value"].to_numpy()


def score_hest(sections: Sequence[Section], *, draws: int = 10) -> HestResult:
    """Run the protocol: leave-donor-out, or leave-section-out where there is one donor.

    Parameters
    ----------
    draws
        Of the noise control: random vectors in place of the embeddings.

    Raises
    ------
    SplitError
        If there is only one section.
    """
    spots = [section.spots for section in sections]
    split = "donor" if len({part.donor for part in spots}) > 1 else "section"
    genes = _variable_genes(sections)
    vectors = [np.asarray(s.overlap @ s.patches.embedding.astype(np.float64)) for s in sections]
    targets: dict[str, Callable[[Section], NDArray[np.float64]]] = {
        METRICS[0]: lambda section: _raw_log(section, genes),
        METRICS[1]: lambda section: select_target(section.spots, genes).astype(np.float64),
    }
    rng = np.random.default_rng(0)
    inputs = [(HEST, 0, vectors)]
    inputs += [("hest_noise", d, [rng.standard_normal(v.shape) for v in vectors]) for d in range(draws)]
    rows = []
    for fold in make_folds(split, spots):
        train = np.concatenate([fold.train[part.slide_id] for part in spots])
        for preset, seed, parts in inputs:
            X, key = np.concatenate(parts), (preset, split, fold.name, seed)
            for metric, target in targets.items():
                Y = np.concatenate([target(section) for section in sections])
                r, undefined = _pearson(X[train], Y[train], X[~train], Y[~train])
                rows.append((*key, metric, float(r.mean())))
                if metric == METRICS[0]:
                    rows.append((*key, METRICS[2], float(undefined.sum())))
    columns = ("preset", "split", "fold", "seed", "metric", "value")
    return HestResult(pl.DataFrame(rows, schema=columns, orient="row"), split)


def _variable_genes(sections: Sequence[Section]) -> tuple[str, ...]:
    """Choose as the benchmark does, on everything."""
    common = shared_genes([section.spots for section in sections])
    places = [{gene: i for i, gene in enumerate(s.spots.genes)} for s in sections]
    parts = [
        s.spots.counts[:, [place[gene] for gene in common]] for s, place in zip(sections, places, strict=True)
    ]
    n = sum(part.shape[0] for part in parts)
    total, square, seen = np.zeros(len(common)), np.zeros(len(common)), np.zeros(len(common))
    for part in parts:
        logs = part.astype(np.float64).log1p()
        total += np.asarray(logs.sum(axis=0)).ravel()
        square += np.asarray(logs.multiply(logs).sum(axis=0)).ravel()
        seen += np.asarray((part > 0).sum(axis=0)).ravel()
    variance = np.where(seen >= MIN_SHARE * n, square / n - (total / n) ** 2, -1)
    return tuple(common[i] for i in np.argsort(-variance, kind="stable")[:N_GENES] if variance[i] > 0)


def _raw_log(section: Section, genes: tuple[str, ...]) -> NDArray[np.float64]:
    place = {gene: i for i, gene in enumerate(section.spots.genes)}
    counts = section.spots.counts[:, [place[gene] for gene in genes]].toarray()
    return np.log1p(counts.astype(np.float64))


def _pearson(
    X: NDArray[np.float64], Y: NDArray[np.float64], X_test: NDArray[np.float64], Y_test: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    standardiser = Standardiser.of(X)
    X, X_test = standardiser.apply(X), standardiser.apply(X_test)
    axes = principal_axes(X, min(N_COMPONENTS, len(X), X.shape[1]))
    Z = X @ axes
    alpha = 100 / (Z.shape[1] * Y.shape[1])
    weight = np.linalg.solve(Z.T @ Z + alpha * np.eye(Z.shape[1]), Z.T @ Y)
    return correlate(Y_test, X_test @ axes @ weight, np.zeros(len(Y_test)))
