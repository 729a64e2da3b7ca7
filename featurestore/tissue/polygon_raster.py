"""Polygons -> pixels: a pixel counts if its centre lies inside, by the even-odd rule, so that holes stay empty."""

from collections.abc import Sequence

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
    height, width = into.shape
    starts = np.concatenate(rings)
    ends = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings])
    low, high = starts.min(axis=0), starts.max(axis=0)
    x0, y0 = (int(np.clip(np.floor(v), 0, side)) for v, side in zip(low, (width, height), strict=True))
    x1, y1 = (int(np.clip(np.ceil(v), 0, side)) for v, side in zip(high, (width, height), strict=True))
    if x0 >= x1 or y0 >= y1:
        return
    # Rows whose centres an edge crosses; half-open, so that a corner on a centre counts once.
    first, last = (
        np.clip(np.ceil(part(starts[:, 1], ends[:, 1]) - 0.5), y0, y1).astype(np.int64)
        for part in (np.minimum, np.maximum)
    )
    counts = last - first
    edge = np.repeat(np.arange(len(starts)), counts)
    row = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
    (xa, ya), (xb, yb) = starts[edge].T, ends[edge].T
    crossing = xa + (row + 0.5 - ya) * (xb - xa) / (yb - ya)
    col = np.clip(np.ceil(crossing - 0.5), x0, x1).astype(np.int64)
    # Inside is where an odd number of edges has been crossed from the left.
    crossed = np.zeros((y1 - y0, x1 - x0 + 1), np.int32)
    np.add.at(crossed, (row - y0, col - x0), 1)
    inside = np.cumsum(crossed, axis=1)[:, :-1] % 2 == 1
    into[y0:y1, x0:x1] |= inside
