"""The value of the nearest measured spot: the plainest interpolation."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from histosge.models.linear_algebra import Floats
from histosge.models.registry import ModelRecord
from histosge.models.spot_interpolation import Interpolator, SpotInterpolation


@dataclass(frozen=True)
class NearestModel(SpotInterpolation):
    """log1p(CP10k) of the nearest training spot of the same slide."""

    name: ClassVar[str] = "nearest"

    @staticmethod
    def interpolate(xy_um: Floats, target: NDArray[np.float32]) -> Interpolator:
        """Return a look-up of the nearest spot."""
        tree = cKDTree(xy_um)
        return lambda wanted: np.asarray(target[tree.query(wanted)[1]], dtype=np.float64)


RECORD = ModelRecord(
    "nearest",
    "baseline: the nearest measured spot of the same slide, without the image",
    lambda: NearestModel,
)
