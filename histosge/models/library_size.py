"""Predict expression from library size alone: an oracle that shows how much of a score is sequencing depth.

It uses each held-out spot's total counts, which neither a slide nor a map contains: it cannot be saved or applied, and
is no preset of `histosge train`. `evaluate` shows it, marked, as the confounder that a model's Pearson has to be
compared with.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from histosge.models.linear_algebra import Floats


@dataclass(frozen=True)
class DepthOracle:
    """log1p(CP10k) = weight . (1, log depth, log depth squared), fitted on training spots.

    Parameters
    ----------
    weight
        Shape ``(3, n_genes)``.
    centre
        Mean log depth of the training spots.
    """

    weight: Floats
    centre: float

    @classmethod
    def fit(cls, depth: NDArray[np.number], target: NDArray[np.floating]) -> Self:
        """Fit by least squares over training spots.

        Parameters
        ----------
        depth
            Total counts, positive, ``(n_spots,)``.
        target
            log1p(CP10k), ``(n_spots, n_genes)``.
        """
        log_depth = np.log(np.asarray(depth, np.float64))
        # Centred, so that log depth and its square are not nearly collinear.
        centre = float(log_depth.mean())
        weight, *_ = np.linalg.lstsq(_basis(log_depth - centre), np.asarray(target, np.float64), rcond=None)
        return cls(np.asarray(weight, np.float64), centre)

    def predict(self, depth: NDArray[np.number]) -> NDArray[np.float32]:
        """Return log1p(CP10k) of spots with these total counts, ``(n_spots, n_genes)``."""
        log_depth = np.log(np.asarray(depth, np.float64))
        return np.asarray(_basis(log_depth - self.centre) @ self.weight, dtype=np.float32)


def _basis(log_depth: Floats) -> Floats:
    return np.stack([np.ones_like(log_depth), log_depth, log_depth**2], axis=1)
