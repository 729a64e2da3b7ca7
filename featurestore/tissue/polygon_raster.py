"""Polygons -> pixels: a pixel counts if its centre lies inside, by the even-odd rule, so that holes stay empty."""

from collections.abc import Sequence
from math import ceil, floor

import numpy as np
from numpy.typing import NDArray

Ring = NDArray[np.float64]
"""Corners ``(n, 2)`` as ``(x, y)`` in pixels; whether the last repeats the first makes no difference."""


def fill_rings(rings: Sequence[Ring], into: NDArray[np.bool_]) -> None:
    """Set the pixels inside one polygon; the others stay as they are.

    Only the rows and columns that the polygon reaches are touched, so thousands of small ones cost little.

    Parameters
    ----------
    rings
        The outline, and those of its holes.
    into
        ``(height, width)``; pixel (row, col) has its centre at ``(col + 0.5, row + 0.5)``.
    """
    crossed = _count_crossings(rings, into.shape)
    if crossed is not None:
        # Inside is where an odd number of edges has been crossed from the left.
        window, counts = crossed
        into[window] |= np.abs(counts) % 2 == 1


def fill_crossing_rings(rings: Sequence[Ring], into: NDArray[np.bool_]) -> None:
    """Set the pixels inside one polygon whose rings may cross themselves and each other; the others stay as they are.

    A ring holds the pixels that it winds round, however often and in whichever direction. Holes are cut out of the outline;
    one that lies beyond it counts as an area. So does shapely's ``make_valid(method="structure")`` but for holes that
    cross each other there; its time grows with the number of crossings, and that of a scribble with its square.
    """
    outline, *holes = (_wound_round(ring, into.shape) for ring in rings)
    # Compared with the whole outline: what one hole cuts out, another one may cut again.
    inside = outline.copy()
    for hole in holes:
        if (hole & outline).any():
            inside &= ~hole
        else:
            into |= hole
    into |= inside


def _wound_round(ring: Ring, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    inside = np.zeros(shape, bool)
    crossed = _count_crossings([ring], shape)
    if crossed is not None:
        window, counts = crossed
        inside[window] = counts != 0
    return inside


def _count_crossings(
    rings: Sequence[Ring], shape: tuple[int, ...]
) -> tuple[tuple[slice, slice], NDArray[np.int32]] | None:
    """Return the part of a picture that rings reach, and how many edges lie left of each pixel of it.

    An edge counts 1 if it runs downwards, and -1 upwards. None if rings reach no pixel.
    """
    height, width = shape
    starts = np.concatenate(rings)
    ends = np.concatenate([part for ring in rings for part in (ring[1:], ring[:1])])
    # Plain numbers: a file may hold 100,000 small outlines, and numpy's own clip costs more than the rest of one.
    (low_x, low_y), (high_x, high_y) = starts.min(axis=0).tolist(), starts.max(axis=0).tolist()
    x0, y0 = min(max(floor(low_x), 0), width), min(max(floor(low_y), 0), height)
    x1, y1 = min(max(ceil(high_x), 0), width), min(max(ceil(high_y), 0), height)
    # The second pair: no row of pixels has its centre within.
    if x0 >= x1 or y0 >= y1 or ceil(low_y - 0.5) >= ceil(high_y - 0.5):
        return None
    # Rows whose centres an edge crosses; half-open, so that a corner on a centre counts once.
    first, last = (
        np.minimum(np.maximum(np.ceil(part(starts[:, 1], ends[:, 1]) - 0.5), y0), y1).astype(np.int64)
        for part in (np.minimum, np.maximum)
    )
    counts = last - first
    edge = np.repeat(np.arange(len(starts)), counts)
    row = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
    (xa, ya), (xb, yb) = starts[edge].T, ends[edge].T
    crossing = xa + (row + 0.5 - ya) * (xb - xa) / (yb - ya)
    col = np.minimum(np.maximum(np.ceil(crossing - 0.5), x0), x1).astype(np.int64)
    crossed = np.zeros((y1 - y0, x1 - x0 + 1), np.int32)
    np.add.at(crossed, (row - y0, col - x0), np.where(yb > ya, 1, -1))
    return (slice(y0, y1), slice(x0, x1)), np.cumsum(crossed, axis=1, dtype=np.int32)[:, :-1]
