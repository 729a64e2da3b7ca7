"""HEST-Benchmark's way of scoring embeddings, for figures that can be laid beside its table.

One embedding per spot, standardised, reduced to 256 principal components; ridge from there to log1p of raw counts
of 50 genes; Pearson per gene on whole held-out donors (sections, where there is one donor). Written from the
benchmark's description (Jaume et al., 2024); its quirks are kept and named, and the same with one of them corrected
stands beside it.

Compared with the public source (mahmoodlab/HEST, ``src/hest/bench``: `trainer.py` at 0512f57, `benchmark.py`,
`st_dataset.py`, and ``bench_config/bench_config.yaml`` with ``dimreduce: PCA``):

- StandardScaler, then PCA with 256 components, both fitted on the training part; components in single precision;
- scikit-learn's Ridge with penalty 100 / (columns after PCA x genes), no intercept, solver LSQR with its default
  tolerance (1e-4) and at most 1,000 iterations. With a penalty that small, LSQR stops well before the exact
  solution, and stopping early is most of the regularisation: so the same solver is used here;
- targets log1p of raw counts, no depth normalisation; 50 genes from a list that comes with the data.

What differs: scikit-learn picks a randomised PCA for wide embeddings, here it is exact.

Terms
    hest                   the protocol as it is
    hest+depth_normalised  the same on log1p of counts per 10,000: what is left when depth is not a target
    hest+training_genes    the same as `hest`, with genes chosen on the training part only
    noise                  `hest` on random embeddings
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from featurestore.events import OnProgress, ignore_progress
from histosge.data.genes import shared_genes
from histosge.data.sections import Section, Spots
from histosge.evaluation.methods import DEPTH, FittedMethod, LibrarySizeMethod, Method
from histosge.evaluation.results import NOISE, VARIANT, Scores
from histosge.evaluation.runner import score_plan
from histosge.evaluation.tasks import Plan, Task
from histosge.heldout.donors import named_donors
from histosge.heldout.splits import Fold, check_no_leak
from histosge.models.linear_algebra import Standardiser, principal_axes
from histosge.threads import one_blas_thread

Parts = tuple[NDArray[np.floating], NDArray[np.floating]]
"""Training and held-out rows."""
GENES, COMPONENTS, ALPHA = 50, 256, 100.0
TOLERANCE, ITERATIONS = 1e-4, 1000
"""Of LSQR: where it stops decides more than the penalty does. scikit-learn's default, and the benchmark's setting."""
SEEN_IN = 0.1
"""Genes must be counted in this share of all spots to be chosen."""

QUIRKS = (
    (
        "HEST protocol: targets are log1p of raw counts, not normalised for depth. A spot with twice the counts has"
        " twice as much of every gene, so part of the Pearson is library size; see hest+depth_normalised and the"
        " depth-adjusted column."
    ),
    (
        "HEST protocol: the 50 genes of greatest variance are chosen on all spots, held-out ones included; see"
        " hest+training_genes."
    ),
    (
        "HEST protocol: ridge without intercept on centred components, penalty 100 / (components x genes), by LSQR"
        f" stopped at a tolerance of {TOLERANCE:g}, which shrinks more than the penalty does. Predictions lack each"
        " gene's mean, so of all columns only the correlations can be used: MSE, MAE and R2 mean nothing."
    ),
    (
        "HEST-Benchmark takes 112 µm patches at 0.5 µm per pixel, one per spot; here a spot's embedding is the mean over"
        " the store's patches under its disc. Compare with its table only what was embedded with its patches."
    ),
)


@dataclass(frozen=True)
class HestModel:
    """Standardiser, principal components and a ridge without intercept, in one linear map."""

    standardiser: Standardiser
    weight: NDArray[np.float64]
    mean: NDArray[np.float64]
    halo_um: float = 0.0

    @classmethod
    def fit(cls, X: NDArray[np.float64], Y: NDArray[np.float64]) -> Self:
        """Solve for ``(n_spots, dim)`` embeddings and ``(n_spots, n_genes)`` targets."""
        # In this order: components of standardised features, as the benchmark has them, not of raw ones.
        standardiser = Standardiser.fit(X)
        Z = standardiser.apply(X)
        axes = principal_axes(Z, min(COMPONENTS, *Z.shape))
        Z = Z @ axes
        # The benchmark's rule, as its code has it.
        alpha = ALPHA / (Z.shape[1] * Y.shape[1])
        return cls(
            standardiser,
            axes @ _stopped_ridge(Z, Y, alpha),
            Y.mean(axis=0),
        )

    def predict_spots(self, section: Section) -> NDArray[np.float32]:
        """Predict spots from the mean embedding under each."""
        return np.asarray(self.standardiser.apply(_at_spots(section)) @ self.weight, dtype=np.float32)

    def predict_map(self, section: Section) -> NDArray[np.float32]:
        """Predict patches, for the eye: the training mean, which the protocol leaves out, is put back."""
        values = self.mean + self.standardiser.apply(section.patches.embedding) @ self.weight
        return np.asarray(values, dtype=np.float32)


@dataclass(frozen=True)
class HestMethod:
    """The protocol, or a variant with one quirk corrected.

    Parameters
    ----------
    name
        Its row.
    kind
        What it is, for the report.
    depth_normalised, training_genes
        Which quirk is corrected.
    genes
        The benchmark's own list; None chooses by its rule.
    """

    name: str = "hest"
    kind: str = "protocol"
    depth_normalised: bool = False
    training_genes: bool = False
    genes: tuple[str, ...] | None = None

    def prepare(self, task: Task) -> Task:
        """Choose genes and targets the benchmark's way."""
        if self.genes is not None:
            task = task.with_genes(self.genes)
            return task if self.depth_normalised else _with_log_counts(task)
        spots = task.training_spots() if self.training_genes else [s.spots for s in task.sections]
        task = task.with_genes(_most_variable(spots, task.sections))
        if self.depth_normalised:
            return task
        return _with_log_counts(task)

    def fit(self, task: Task, epochs: int | None) -> HestModel:
        """Fit on training spots."""
        training = task.training()
        X = np.concatenate([s.overlap @ s.patches.embedding.astype(np.float64) for s in training])
        return HestModel.fit(X, np.concatenate([s.target for s in training]).astype(np.float64))


@dataclass(frozen=True)
class HestDepth:
    """The oracle of library size, on the protocol's targets."""

    genes: tuple[str, ...]
    name: str = DEPTH
    kind: str = LibrarySizeMethod.kind

    def prepare(self, task: Task) -> Task:
        """Return the task with log1p of raw counts for targets."""
        return _with_log_counts(task.with_genes(self.genes))

    def fit(self, task: Task, epochs: int | None) -> FittedMethod:
        """Fit on the training spots' own totals."""
        return LibrarySizeMethod().fit(task, epochs)


@dataclass(frozen=True)
class BenchPlan(Plan):
    """A plan whose folds are given: the benchmark's own splits."""

    published: tuple[Fold, ...] = ()

    def folds(self, seed: int) -> tuple[Fold, ...]:
        """Return the published splits, checked for leaks."""
        check_no_leak(self.published, [section.spots for section in self.sections])
        return self.published


def published_score(X: Parts, Y: Parts, n_components: int = COMPONENTS) -> NDArray[np.float64]:
    """Return the benchmark's Pearson of each gene on one split, ``(n_genes,)``, computed as its code does.

    Over all held-out spots together, not within sections, and NaN where a prediction or a gene is constant.

    Parameters
    ----------
    X, Y
        Embeddings and log1p of raw counts, of the training and of the held-out spots.
    """
    from scipy.stats import ConstantInputWarning, pearsonr
    from sklearn.decomposition import PCA
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # The seed is the benchmark's: for wide embeddings scikit-learn takes a randomised PCA.
    n = min(n_components, *X[0].shape)
    reduce = make_pipeline(StandardScaler(), PCA(n_components=n, random_state=1))
    reduced = reduce.fit_transform(X[0]), reduce.transform(X[1])
    # The benchmark rounds components to single precision as it makes tensors of them, and scikit-learn takes tensors to
    # double again (1.9): LSQR in single precision stops elsewhere, which moved a score by 0.0001.
    train, test = (np.ascontiguousarray(part, dtype=np.float32).astype(np.float64) for part in reduced)
    alpha = ALPHA / (train.shape[1] * Y[0].shape[1])
    ridge = Ridge(solver="lsqr", alpha=alpha, random_state=1, fit_intercept=False, max_iter=ITERATIONS)
    predicted = ridge.fit(train, Y[0]).predict(test)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        return np.array([pearsonr(Y[1][:, i], predicted[:, i])[0] for i in range(Y[1].shape[1])])


def _with_log_counts(task: Task) -> Task:
    return replace(task, targets=tuple(_log_counts(s.spots, task.genes) for s in task.sections))


def _stopped_ridge(Z: NDArray[np.float64], Y: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """Return weights of each gene, ``(n_components, n_genes)``, where LSQR stops."""
    from sklearn.linear_model import Ridge

    # Rounded to single precision, as the benchmark's components are, and solved in double, see `published_score`.
    rounded = np.ascontiguousarray(Z, dtype=np.float32).astype(np.float64)
    ridge = Ridge(alpha, fit_intercept=False, solver="lsqr", tol=TOLERANCE, max_iter=ITERATIONS)
    return np.asarray(ridge.fit(rounded, Y).coef_.T)


@one_blas_thread()
def score_hest(
    sections: Sequence[Section], split: str, *, on_progress: OnProgress = ignore_progress
) -> Scores:
    """Score sections' embeddings by the protocol.

    Parameters
    ----------
    sections
        At least two.
    split
        ``donor`` as in the benchmark, or ``section`` where all come from one donor, or donors are not named.

    Raises
    ------
    SplitError
        If the sections cannot give the split.
    """
    # Maps are shown of the first: with depth normalised they are in log1p(CP10k), as the pictures say.
    methods: tuple[Method, ...] = (
        HestMethod("hest+depth_normalised", VARIANT, depth_normalised=True),
        HestMethod("hest+training_genes", VARIANT, training_genes=True),
        HestMethod(),
    )
    plan = Plan.from_sections(sections, split, GENES)
    # The control is the protocol on random embeddings, not `ridge`: it is this protocol that might leak.
    scores = score_plan(plan, methods, HestMethod(NOISE), seeds=(0,), on_progress=on_progress)
    rule = f"the {GENES} genes of greatest variance of log1p of raw counts among those counted in {SEEN_IN:.0%} of all spots"
    return replace(scores, protocol="hest", gene_rule=rule, notes=(*QUIRKS, *scores.notes))


def hest_split(sections: Sequence[Section]) -> str:
    """Return ``donor`` where several are named, else ``section``."""
    return "donor" if len(set(named_donors([section.spots for section in sections]))) > 1 else "section"


def _at_spots(section: Section) -> NDArray[np.float64]:
    return np.asarray(section.overlap @ section.patches.embedding.astype(np.float64))


def _log_counts(spots: Spots, genes: Sequence[str]) -> NDArray[np.float32]:
    column = {gene: i for i, gene in enumerate(spots.genes)}
    counts = spots.counts[:, [column[gene] for gene in genes]].toarray()
    return np.asarray(np.log1p(counts), dtype=np.float32)


def _most_variable(spots: Sequence[Spots], sections: Sequence[Section]) -> tuple[str, ...]:
    """Return the genes of greatest variance of log1p counts; ties by name."""
    genes = shared_genes([section.spots for section in sections])
    total, squares, seen, n = (np.zeros(len(genes)) for _ in range(4))
    for part in spots:
        column = {gene: i for i, gene in enumerate(part.genes)}
        values = part.counts[:, [column[gene] for gene in genes]].astype(np.float64).tocsc()
        # log1p(0) is 0: on the stored counts alone, the matrix stays sparse.
        values.data = np.log1p(values.data)
        total += np.asarray(values.sum(axis=0)).ravel()
        squares += np.asarray(values.multiply(values).sum(axis=0)).ravel()
        seen += np.diff(values.indptr)
        n += len(part)
    variance = np.where(seen >= SEEN_IN * n, squares / n - (total / n) ** 2, -1.0)
    # Rounded, so that sums in another order on another machine do not change which of two equal genes comes first.
    order = sorted(range(len(genes)), key=lambda i: (-round(float(variance[i]), 12), genes[i]))
    return tuple(genes[i] for i in order[:GENES] if variance[i] > 0)
