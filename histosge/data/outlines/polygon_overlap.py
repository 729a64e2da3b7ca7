"""How much of each polygon lies in the stride cell of each patch of a grid. Arithmetic alone."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from featurestore.grid import PatchGrid


@dataclass(frozen=True)
class PolygonOverlap:
    """Pairs of a polygon and a patch that share an area.

    Parameters
    ----------
    polygon, row, col
        Index of the polygon, and position of the patch; one of each for a pair.
    area_um2
        Of what they share, µm².
    """

    polygon: NDArray[np.int64]
    row: NDArray[np.int64]
    col: NDArray[np.int64]
    area_um2: NDArray[np.float64]


def patch_span(bounds_px: NDArray[np.float64], grid: PatchGrid) -> NDArray[np.int64]:
    """Return which patches bounding boxes touch, ``(n, 4)``: first column, first row, last column, last row.

    Cut to the grid: the last is before the first where a box lies beside it.

    Parameters
    ----------
    bounds_px
        ``(n, 4)``: left, top, right, bottom in level-0 pixels, as `shapely.bounds` returns them.
    """
    first_um = np.asarray(grid.origin_um) + (grid.patch_um - grid.stride_um) / 2
    lattice = (bounds_px * grid.slide_mpp - np.tile(first_um, 2)) / grid.stride_um
    # Clipped before they become integers: a far corner would overflow.
    cells = np.floor(np.clip(lattice, -1, max(grid.shape) + 1)).astype(np.int64)
    cells[:, :2] = np.maximum(cells[:, :2], 0)
    cells[:, 2:] = np.minimum(cells[:, 2:], np.array(grid.shape[::-1]) - 1)
    return cells


def polygon_overlap(polygons: NDArray[Any], grid: PatchGrid) -> PolygonOverlap:
    """Intersect polygons with the stride cells of a grid.

    Parameters
    ----------
    polygons
        shapely Polygons and MultiPolygons in level-0 pixels; valid.
    """
    span = patch_span(shapely.bounds(polygons), grid)
    wide = np.maximum(span[:, 2] - span[:, 0] + 1, 0)
    high = np.maximum(span[:, 3] - span[:, 1] + 1, 0)
    pairs = wide * high
    polygon = np.repeat(np.arange(len(polygons)), pairs)
    # The number of a pair among those of its polygon, row by row.
    number = np.arange(len(polygon)) - np.repeat(np.cumsum(pairs) - pairs, pairs)
    row = span[polygon, 1] + number // np.maximum(wide[polygon], 1)
    col = span[polygon, 0] + number % np.maximum(wide[polygon], 1)
    first_um = np.asarray(grid.origin_um) + (grid.patch_um - grid.stride_um) / 2
    left, top = (first_um[0] + col * grid.stride_um), (first_um[1] + row * grid.stride_um)
    mpp = grid.slide_mpp
    boxes = shapely.box(left / mpp, top / mpp, (left + grid.stride_um) / mpp, (top + grid.stride_um) / mpp)
    area = shapely.area(shapely.intersection(polygons[polygon], boxes)) * mpp**2
    shared = area > 0
    return PolygonOverlap(polygon[shared], row[shared], col[shared], area[shared])
