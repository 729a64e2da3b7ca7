"""An oracle, not a model: what a spot's own library size tells about each gene.

It uses the total counts of the very spots that it is scored on, so nobody can predict with it. It stands
in tables as a yardstick: how much of a score is depth alone.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

DEPTH = "depth"


@dataclass(frozen=True)
class DepthOracle:
    """log1p(CP10k) = weight . (1, log depth, log depth squared).

    Parameters
    ----------
    weight
        Shape ``(3, n_genes)``.
    centre
        Mean log depth of the training spots.
    """

    weight: NDArray[np.float64]
    centre: float

    @classmethod
    def fit(cls, depth: NDArray[np.float64], target: NDArray[np.floating]) -> Self:
        """Fit by least squares on training spots.

        Parameters
        ----------
        depth
            Total counts of every spot, positive, ``(n_spots,)``.
        target
            log1p(CP10k), ``(n_spots, n_genes)``.
        """
        centre = float(np.log(depth).mean())
        weight, *_ = np.linalg.lstsq(_basis(depth, centre), np.asarray(target, np.float64), rcond=None)
        return cls(np.asarray(weight, np.float64), centre)

    def predict(self, depth: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return log1p(CP10k) of spots with these total counts, ``(n_spots, n_genes)``."""
        predicted = _basis(depth, self.centre) @ self.weight
        return np.maximum(predicted, 0).astype(np.float32)


def _basis(depth: NDArray[np.float64], centre: float) -> NDArray[np.float64]:
    x = np.log(depth) - centre
    return np.stack([np.ones_like(x), x, x**2], axis=1)
