"""Cubic interpolation between measured spots: smooth across the triangles of their Delaunay triangulation.

Clough and Tocher's scheme with gradients of least curvature (Nielson 1983, Renka 1984), as scipy has it.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CloughTocher2DInterpolator

from histosge.models.linear_algebra import Floats
from histosge.models.registry import ModelRecord
from histosge.models.spot_interpolation import Interpolator, SpotInterpolation


@dataclass(frozen=True)
class CubicModel(SpotInterpolation):
    """log1p(CP10k) interpolated by piecewise cubics between the training spots around a patch."""

    name: ClassVar[str] = "cubic"

    @staticmethod
    def interpolate(xy_um: Floats, target: NDArray[np.float32]) -> Interpolator:
        """Return scipy's Clough-Tocher interpolator."""
        found: Interpolator = CloughTocher2DInterpolator(xy_um, target.astype(np.float64))
        return found


RECORD = ModelRecord(
    "cubic", "baseline: cubic interpolation between measured spots, without the image", lambda: CubicModel
)
