"""Targets as a few patterns of genes: standardised within each section, then principal components.

One spot's counts are mostly noise; a pattern that many genes share is not. A section's own mean and spread (staining,
depth, batch) are taken out before patterns are computed, and the pooled ones are put back into predictions.

Terms
    pattern  a principal component of the genes: a weighted sum of genes that vary together
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from histosge.data.genes import SCALE
from histosge.data.sections import TrainingSection
from histosge.models.linear_algebra import Floats, fix_signs, symmetric_eigen
from histosge.models.nested_state import take
from histosge.models.protocol import State

MAX_LOG = np.float32(np.log1p(SCALE))
"""No gene has more than all counts of a spot."""
CEILING_START = np.float32(0.9) * MAX_LOG
"""Of no gene does the ceiling begin higher: 4,000 of 10,000 counts."""
CEILING_MARGIN = np.float32(np.log(2))
"""Above the highest value that training measured predictions approach twice its rate exponentially, and do not pass it. Far
from the training embeddings, where a linear map follows directions that hardly vary in training, it has no other bound."""
FLOOR_SHARE = 0.1
"""Below this share of a gene's mean, predictions approach 0 exponentially instead of reaching it."""

MAX_EXACT = 4000
"""Spots, or genes, up to which principal axes come from a Gram matrix (128 MB); beyond, by subspace iteration."""
SUBSPACE_STEPS = 8
# Genes that are standardised together in float64, so that no second copy of all targets is made.
_GENES_AT_ONCE = 512
_VALUES_AT_ONCE = 1 << 18
"""Predictions that are made and floored together: 1 MB, which stays in the processor's cache."""


@dataclass(frozen=True)
class LowRankTargets:
    """Convert log1p(CP10k) of genes to patterns, and back.

    Parameters
    ----------
    mean, sd
        Per gene: pooled over sections, and within them, shape ``(n_genes,)``.
    axes
        Orthonormal, ``(n_genes, n_patterns)``.
    highest
        The largest target of each gene in training, ``(n_genes,)``; None in models of earlier versions.
    """

    mean: Floats
    sd: Floats
    axes: Floats
    highest: Floats | None = None

    @classmethod
    def fit(cls, sections: Sequence[TrainingSection], n_patterns: int) -> Self:
        """Compute the patterns of the training spots."""
        return cls.with_axes(sections, pattern_axes([s.target for s in sections], n_patterns))

    @classmethod
    def with_axes(cls, sections: Sequence[TrainingSection], axes: Floats) -> Self:
        """Measure mean, spread and highest value of the genes, and take the patterns as given."""
        counts = [len(section.target) for section in sections]
        means, variances = zip(*(gene_moments(section.target) for section in sections), strict=True)
        mean, variance = (np.average(values, axis=0, weights=counts) for values in (means, variances))
        highest = np.max([section.target.max(axis=0) for section in sections], axis=0).astype(np.float64)
        return cls(mean, np.sqrt(variance), axes, highest)

    def to_patterns(self, section: TrainingSection) -> Floats:
        """Return a section's targets as patterns, ``(n_spots, n_patterns)``."""
        out = np.zeros((len(section.target), self.axes.shape[1]))
        for columns in _chunks(section.target.shape[1]):
            out += standardise(section.target[:, columns]) @ self.axes[columns]
        return out

    def to_genes(self, patterns: Floats, mean: Floats | None = None) -> NDArray[np.float32]:
        """Return log1p(CP10k), positive, ``(n, n_genes)``, from ``(n, n_patterns)``; around another mean if one is given."""
        mean = self.mean if mean is None else mean
        # The mean is one more row of the weights, so that a single product gives the values.
        weight = np.vstack([(self.axes * self.sd[:, None]).T, mean]).astype(np.float32)
        inputs = np.column_stack([patterns, np.ones(len(patterns))]).astype(np.float32)
        values = np.empty((len(inputs), weight.shape[1]), np.float32)
        rows = max(1, _VALUES_AT_ONCE // weight.shape[1])
        begin, top = self.ceiling
        for start in range(0, len(values), rows):
            part = values[start : start + rows]
            np.matmul(inputs[start : start + rows], weight, out=part)
            soft_floor(part, self.floor)
            soft_ceiling(part, begin, top)
        return values

    @property
    def floor(self) -> NDArray[np.float32]:
        """Return the value of each gene below which `soft_floor` applies, ``(n_genes,)``."""
        return (FLOOR_SHARE * self.mean).astype(np.float32)

    @property
    def ceiling(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return where `soft_ceiling` begins and what it approaches, per gene, ``(n_genes,)`` each."""
        highest = np.full(len(self.mean), MAX_LOG) if self.highest is None else self.highest
        start = np.minimum(highest, CEILING_START).astype(np.float32)
        return start, np.minimum(highest + CEILING_MARGIN, MAX_LOG).astype(np.float32)

    def state(self) -> State:
        """Return the arrays."""
        state = {"targets.mean": self.mean, "targets.sd": self.sd, "targets.axes": self.axes}
        return state if self.highest is None else state | {"targets.highest": self.highest}

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Rebuild."""
        mean = take(state, "targets.mean", None)
        highest = take(state, "targets.highest", len(mean)) if "targets.highest" in state else None
        axes = take(state, "targets.axes", len(mean), None)
        return cls(mean, take(state, "targets.sd", len(mean)), axes, highest)


def pattern_axes(
    targets: Sequence[NDArray[np.floating]],
    n_axes: int,
    scale: Callable[[NDArray[np.floating]], Floats] | None = None,
) -> Floats:
    """Return the leading principal axes of targets standardised within sections, ``(n_genes, n_axes)``.

    Exact from the smaller of the two Gram matrices, up to `MAX_EXACT` spots or genes; beyond, by subspace
    iteration. Genes are taken `_GENES_AT_ONCE` at a time: beside the targets themselves, memory holds the Gram matrix
    or ``n_genes + n_spots`` rows of axes, never a second copy of the targets.

    Parameters
    ----------
    scale
        What brings some genes of one section to a common scale; None means `standardise`.
    """
    scale = scale or standardise
    n_spots, n_genes = sum(map(len, targets)), targets[0].shape[1]
    if n_spots > MAX_EXACT and n_genes <= MAX_EXACT:
        square = sum((z.T @ z for z in map(scale, targets)), np.zeros((n_genes, n_genes)))
        return leading_axes(square, n_axes)
    if n_spots <= MAX_EXACT:
        square = np.zeros((n_spots, n_spots))
        for columns in _chunks(n_genes):
            part = _scaled(targets, columns, scale)
            square += part @ part.T
        values, vectors = symmetric_eigen(square)
        order = np.argsort(values)[::-1][:n_axes]
        order = order[values[order] > 1e-10 * max(values[order].max(initial=0.0), 1e-300)]
        left = vectors[:, order] / np.sqrt(values[order])
    else:
        # Ten columns more than are wanted: the leading axes converge faster than with the exact number (Halko,
        # Martinsson and Tropp, 2011). The seed is fixed, so that a fit depends on its data alone.
        left = np.random.default_rng(0).standard_normal((n_spots, n_axes + 10))
        for _ in range(SUBSPACE_STEPS):
            # Orthonormal before each product: without it all columns turn into the first axis.
            left = np.linalg.qr(left)[0]
            again = np.zeros_like(left)
            for columns in _chunks(n_genes):
                part = _scaled(targets, columns, scale)
                again += part @ (part.T @ left)
            left = again
        vectors, values, _ = np.linalg.svd(left, full_matrices=False)
        left = vectors[:, :n_axes] / np.sqrt(np.maximum(values[:n_axes], 1e-300))
    axes = np.concatenate([_scaled(targets, columns, scale).T @ left for columns in _chunks(n_genes)])
    return fix_signs(axes / np.maximum(np.linalg.norm(axes, axis=0), 1e-300))


def leading_axes(square: Floats, n_axes: int) -> Floats:
    """Return the leading principal axes, ``(n_genes, n_axes)``, from products of standardised genes with each other."""
    values, vectors = symmetric_eigen(square)
    return fix_signs(vectors[:, np.argsort(values)[::-1][:n_axes]])


def _chunks(n_genes: int) -> list[slice]:
    return [slice(start, start + _GENES_AT_ONCE) for start in range(0, n_genes, _GENES_AT_ONCE)]


def _scaled(
    targets: Sequence[NDArray[np.floating]], columns: slice, scale: Callable[[NDArray[np.floating]], Floats]
) -> Floats:
    return np.concatenate([scale(target[:, columns]) for target in targets])


def gene_moments(target: NDArray[np.float32]) -> tuple[Floats, Floats]:
    """Return mean and variance of each gene of one section, ``(n_genes,)`` each."""
    mean, variance = np.empty(target.shape[1]), np.empty(target.shape[1])
    for columns in _chunks(target.shape[1]):
        part = target[:, columns].astype(np.float64)
        mean[columns], variance[columns] = part.mean(axis=0), part.var(axis=0)
    return mean, variance


def standardise(target: NDArray[np.floating]) -> Floats:
    """Bring each gene of one section to mean 0 and spread 1; a gene that does not vary becomes 0."""
    values = target.astype(np.float64)
    sd = values.std(axis=0)
    return np.asarray((values - values.mean(axis=0)) / np.where(sd > 1e-6, sd, np.inf))


def soft_floor(values: NDArray[np.float32], floor: NDArray[np.float32]) -> NDArray[np.float32]:
    """Replace values below a gene's floor by ``floor * exp(value / floor - 1)``, in place where they are contiguous.

    Positive, smooth and increasing everywhere, unlike a clip: two patches that a linear map tells apart stay apart.

    Parameters
    ----------
    values
        ``(n, n_genes)``.
    floor
        Per gene, ``(n_genes,)``.
    """
    floor = np.maximum(floor, np.float32(1e-6))  # a gene without counts has mean 0
    values = np.ascontiguousarray(values)
    flat = values.reshape(-1)  # positions in one dimension are found much faster than in two
    low = np.flatnonzero((values < floor).reshape(-1))
    f = floor[low % len(floor)]
    # exp(-80) is still a positive float32; without the limit it would underflow to 0.
    flat[low] = f * np.exp(np.maximum(flat[low] / f - 1, -80))
    return values


def soft_ceiling(values: NDArray[np.float32], start: NDArray[np.float32], top: NDArray[np.float32]) -> None:
    """Let values above a gene's start approach its top, in place: smooth and increasing, as `soft_floor` is.

    Parameters
    ----------
    values
        ``(n, n_genes)``.
    start, top
        Per gene, ``(n_genes,)``.
    """
    high = values > start
    # Hardly any map has one: nothing more is computed then.
    if high.any():
        rows, genes = np.nonzero(high)
        begin, room = start[genes], top[genes] - start[genes]
        values[rows, genes] = begin - room * np.expm1((begin - values[rows, genes]) / room)
