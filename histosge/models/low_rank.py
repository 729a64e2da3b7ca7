"""Targets as a few patterns of genes: standardised within each section, then principal components.

A section's own mean and spread (staining, depth, batch) are taken out before patterns are looked for,
and the pooled ones are put back into predictions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from histosge.models.linear import Floats, principal_axes
from histosge.models.model import State
from histosge.sections import TrainingSection

FLOOR = 0.1
"""Below this share of a gene's mean a prediction bends towards 0 and never reaches it."""


@dataclass(frozen=True)
class LowRankTargets:
    """How patterns and log1p(CP10k) turn into each other.

    Parameters
    ----------
    mean, sd
        Per gene: pooled over sections, and within them, shape ``(n_genes,)``.
    axes
        Orthonormal, ``(n_genes, n_patterns)``.
    """

    mean: Floats
    sd: Floats
    axes: Floats

    @classmethod
    def of(cls, sections: Sequence[TrainingSection], n_patterns: int) -> Self:
        """Find the patterns of the training spots."""
        targets = [section.target.astype(np.float64) for section in sections]
        counts = [len(target) for target in targets]
        mean = np.average([target.mean(axis=0) for target in targets], axis=0, weights=counts)
        variance = np.average([target.var(axis=0) for target in targets], axis=0, weights=counts)
        axes = principal_axes(np.concatenate([standardise(s.target) for s in sections]), n_patterns)
        return cls(mean, np.sqrt(variance), axes)

    def patterns(self, section: TrainingSection) -> Floats:
        """Return a section's targets as patterns, ``(n_spots, n_patterns)``."""
        return standardise(section.target) @ self.axes

    def genes(self, patterns: Floats) -> NDArray[np.float32]:
        """Return log1p(CP10k) from patterns, positive, ``(n, n_genes)``."""
        weight = (self.axes * self.sd[:, None]).T.astype(np.float32)
        values = patterns.astype(np.float32) @ weight + self.mean.astype(np.float32)
        return bend(values, (FLOOR * self.mean).astype(np.float32))

    def state(self) -> State:
        """Return the arrays."""
        return {"targets.mean": self.mean, "targets.sd": self.sd, "targets.axes": self.axes}

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Rebuild."""
        return cls(state["targets.mean"], state["targets.sd"], state["targets.axes"])


def standardise(target: NDArray[np.float32]) -> Floats:
    """Bring each gene of one section to mean 0 and spread 1; a gene that does not vary becomes 0."""
    values = target.astype(np.float64)
    sd = values.std(axis=0)
    return np.asarray((values - values.mean(axis=0)) / np.where(sd > 1e-6, sd, np.inf))


def bend(values: NDArray[np.float32], floor: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bend values below a gene's floor towards 0, in place: ``floor * exp(value / floor - 1)``.

    Smooth and increasing everywhere, unlike a clip: two patches that a linear map tells apart stay apart.
    """
    floor = np.maximum(floor, np.float32(1e-6))
    values = np.ascontiguousarray(values)
    flat = values.reshape(-1)  # places in one dimension are found much faster than in two
    low = np.flatnonzero((values < floor).reshape(-1))
    f = floor[low % len(floor)]
    flat[low] = f * np.exp(np.maximum(flat[low] / f - 1, -80))
    return values
