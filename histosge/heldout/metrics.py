"""How well a prediction fits held-out spots, gene by gene: arithmetic only.

It splits nothing and chooses nothing: whoever calls it has kept the test spots apart. Pearson is computed here, since
it decides which genes are undefined; all other metrics are registered (`histosge.heldout.metric_registry`).

Every correlation is taken *within* sections: each section's own mean is removed from truth and
prediction first. Otherwise a model that only knows which section a spot lies on would score.

Terms
    truth, predicted   log1p(CP10k), shape (n_spots, n_genes)
    depth              a spot's total counts (its library size)
    undefined gene     one without a correlation, since truth or prediction is constant: it counts as 0 in every
                       mean, and the number of such genes is reported
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from histosge.heldout.metric_registry import Floats, Metric, ScoredSpots

CONSTANT = 1e-6
"""A spread below this share of a gene's largest value is rounding, not a map: float32 leaves about 6e-8."""

# As many as the tables of HEST-Benchmark are over.
TOP = 50
"""Genes behind `pearson_top50`."""


@dataclass(frozen=True)
class GeneScores:
    """One prediction's scores, each of shape ``(n_genes,)``.

    Parameters
    ----------
    pearson, pearson_depth_adjusted
        Correlation over spots, within sections; 0 where it is not defined.
    undefined
        True where `pearson` is not defined and was set to 0.
    values
        Of each registered metric.
    """

    pearson: Floats
    pearson_depth_adjusted: Floats
    undefined: NDArray[np.bool_]
    values: Mapping[Metric, Floats]

    def __getitem__(self, metric: str) -> Floats:
        """Return one registered metric's values by its name, ``(n_genes,)``."""
        return next(values for each, values in self.values.items() if each.name == metric)

    def summary(self, top: NDArray[np.bool_]) -> dict[str, float]:
        """Return the scores of a whole prediction, by metric.

        Parameters
        ----------
        top
            True for the genes behind `pearson_top50`, shape ``(n_genes,)``. They must have been picked
            on the training part: picking the best on the test spots gives noise 0.10.
        """
        return {
            "pearson_mean": float(self.pearson.mean()),
            "pearson_median": float(np.median(self.pearson)),
            "pearson_top50": float(self.pearson[top].mean()),
            "pearson_depth_adjusted": float(self.pearson_depth_adjusted.mean()),
            "n_genes": float(len(self.pearson)),
            # Two names of one count: both stand in files that were written before.
            "n_nan_genes": float(self.undefined.sum()),
            "n_constant": float(self.undefined.sum()),
            **{metric.summary_name: float(values.mean()) for metric, values in self.values.items()},
        }


def score_genes(
    truth: NDArray[np.floating],
    predicted: NDArray[np.floating],
    spots: ScoredSpots,
    metrics: Sequence[Metric] = (),
) -> GeneScores:
    """Score a prediction of held-out spots.

    Parameters
    ----------
    truth, predicted
        log1p(CP10k), shape ``(n_spots, n_genes)``.
    spots
        Total counts, section and position of each spot.
    metrics
        What is computed beside Pearson.

    Raises
    ------
    ValueError
        If the shapes differ, there are fewer than 2 spots, or a value is not finite.
    HistosgeError
        If a metric does not return one finite value per gene.
    """
    true, guess = np.asarray(truth, np.float64), np.asarray(predicted, np.float64)
    _check(true, guess, spots)
    log_depth = np.log(np.asarray(spots.depth, np.float64))
    pearson, undefined = correlate(true, guess, spots.section)
    adjusted, _ = correlate(true, guess, spots.section, log_depth)
    return GeneScores(
        pearson, adjusted, undefined, {metric: metric(true, guess, spots) for metric in metrics}
    )


def correlate(
    a: Floats, b: Floats, section: NDArray[np.generic], log_depth: Floats | None = None
) -> tuple[Floats, NDArray[np.bool_]]:
    """Correlate two ``(n_spots, n_genes)`` matrices gene by gene, within sections.

    With `log_depth`, it and its square are regressed out of both first.

    Returns
    -------
    correlation, undefined
        Shape ``(n_genes,)`` each; the correlation is 0 where it is not defined.
    """
    left, right = within_sections(a, section, log_depth), within_sections(b, section, log_depth)
    left_sq, right_sq = (left**2).sum(axis=0), (right**2).sum(axis=0)
    defined = varies(left_sq, a) & varies(right_sq, b)
    scale = np.sqrt(left_sq * right_sq)
    r = np.divide((left * right).sum(axis=0), scale, out=np.zeros_like(scale), where=defined)
    # Rounding can carry a perfect correlation a few bits beyond 1.
    return np.clip(r, -1, 1), ~defined


def is_undefined(a: Floats, b: Floats, section: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Tell for which genes `correlate` is not defined, ``(n_genes,)``."""
    spread = ((within_sections(values, section) ** 2).sum(axis=0) for values in (a, b))
    return ~np.logical_and(*(varies(squares, values) for squares, values in zip(spread, (a, b), strict=True)))


def within_sections(values: Floats, section: NDArray[np.generic], log_depth: Floats | None = None) -> Floats:
    """Remove from each column every section's mean, or what depth explains in that section.

    With `log_depth` the intercept, log depth and its square are regressed out, section by section.
    """
    # Otherwise a model that only knows which section a spot lies on, by its stain, would score.
    residual = np.empty_like(values)
    for label in np.unique(section):
        here = section == label
        part = values[here]
        part = part - part.mean(axis=0)
        if log_depth is not None:
            basis = _depth_basis(log_depth[here])
            part -= basis @ (basis.T @ part)
        residual[here] = part
    return residual


def rank_within(values: Floats, section: NDArray[np.generic]) -> Floats:
    """Replace each column's values by their ranks within each section; ties share their mean rank."""
    ranks = np.empty_like(values)
    for label in np.unique(section):
        here = section == label
        ranks[here] = rankdata(values[here], axis=0)
    return ranks


def top_by_variance(target: NDArray[np.floating], n: int = TOP) -> NDArray[np.bool_]:
    """Mark the `n` genes that vary most over the training spots: the rule behind `pearson_top50`.

    The rule sees no model and no test spot, so it is the same for every preset.

    Parameters
    ----------
    target
        log1p(CP10k) of the training spots, shape ``(n_spots, n_genes)``.

    Returns
    -------
    numpy.ndarray
        Shape ``(n_genes,)``; all True where there are no more than `n` genes.
    """
    # In double precision: the order must not depend on how a machine sums in single.
    variance = np.asarray(target, np.float64).var(axis=0)
    marked = np.zeros(len(variance), dtype=bool)
    marked[np.argsort(-variance, kind="stable")[:n]] = True
    return marked


def pearson_all_spots(
    truth: NDArray[np.floating], predicted: NDArray[np.floating], section: NDArray[np.generic]
) -> float:
    """Return the published code's figure: mean Pearson over *all* spots, undefined genes dropped.

    Half of these spots are training spots, so a model that only memorises scores high: on pure noise
    this gives about 0.55. It is here to be compared with the paper, never to be trusted.
    """
    # Undefined genes are dropped here alone, as the released code drops its NaN.
    r, undefined = correlate(np.asarray(truth, np.float64), np.asarray(predicted, np.float64), section)
    return float(r[~undefined].mean()) if not undefined.all() else 0.0


def _depth_basis(log_depth: Floats) -> Floats:
    """Return orthonormal columns spanning centred log depth and its square, shape ``(n_spots, 0..2)``."""
    centred = log_depth - log_depth.mean()
    curve = centred**2
    columns = np.stack([centred, curve - curve.mean()], axis=1)
    # By singular values, not by QR: where all spots have one depth, or two, a column is dependent and must go.
    left, singular, _ = np.linalg.svd(columns, full_matrices=False)
    return np.asarray(left[:, singular > 1e-9 * max(1.0, float(np.abs(log_depth).max()))])


def varies(sum_of_squares: Floats, values: Floats) -> NDArray[np.bool_]:
    """Tell which columns spread by more than rounding, from their squared deviations summed over spots."""
    # Relative to the largest value: a constant of 5 in single precision jitters more than one of 0.1.
    spread: Floats = np.sqrt(sum_of_squares / len(values))
    return np.asarray(spread > CONSTANT * np.abs(values).max(axis=0))


def _check(truth: Floats, predicted: Floats, spots: ScoredSpots) -> None:
    n_spots, depth, section = len(truth), spots.depth, spots.section
    if truth.shape != predicted.shape or depth.shape != (n_spots,) or section.shape != (n_spots,):
        raise ValueError(
            f"truth {truth.shape}, predicted {predicted.shape}, depth {depth.shape} and section"
            f" {section.shape} do not fit: give (n_spots, n_genes) twice and (n_spots,) twice"
        )
    if n_spots < 2:
        raise ValueError(f"cannot score {n_spots} spots: a correlation needs at least 2")
    bad = int((~np.isfinite(predicted)).sum() + (~np.isfinite(truth)).sum())
    if bad or not (np.asarray(depth) > 0).all():
        raise ValueError(
            f"cannot score: {bad} values are not finite, or a spot has no counts; correct the model, or leave such "
            "spots out"
        )
