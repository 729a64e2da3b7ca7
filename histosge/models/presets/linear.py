"""Linear interpolation between measured spots, in the triangles of their Delaunay triangulation."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import LinearNDInterpolator

from histosge.models.linear_algebra import Floats
from histosge.models.registry import ModelRecord
from histosge.models.spot_interpolation import Interpolator, SpotInterpolation


@dataclass(frozen=True)
class LinearModel(SpotInterpolation):
    """log1p(CP10k) interpolated linearly between the three training spots around a patch."""

    name: ClassVar[str] = "linear"

    @staticmethod
    def interpolate(xy_um: Floats, target: NDArray[np.float32]) -> Interpolator:
        """Return scipy's barycentric interpolator."""
        found: Interpolator = LinearNDInterpolator(xy_um, target.astype(np.float64))
        return found


RECORD = ModelRecord(
    "linear", "baseline: linear interpolation between measured spots, without the image", lambda: LinearModel
)
