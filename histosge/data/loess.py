"""Local quadratic regression in one dimension, as Cleveland's ``dloess`` computes it (in R: `loess`).

Terms
    vertex  a place where the local fit is computed; between two of them it is interpolated
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Share of a neighbourhood below which an interval is not cut any further, and share of the range by which the outer
# vertices lie beyond the values: the defaults of dloess, needed for the same curve as scanpy's and Seurat's.
CELL = 0.2
MARGIN = 0.005


def loess_fit(x: Floats, y: Floats, span: float) -> Floats:
    """Fit ``y`` by a smooth curve over ``x``, and return the curve at each ``x``.

    At each vertex a parabola is fitted by least squares to the nearest ``span`` of all points, with tricube weights;
    cubics with the parabolas' values and slopes connect them. See Cleveland and Grosse (1991), Computational methods
    for local regression, Statistics and Computing 1.

    Parameters
    ----------
    x, y
        Points, ``(n,)``, at least 3.
    span
        Share of the points in a neighbourhood, above 0 and at most 1.

    Raises
    ------
    ValueError
        If a neighbourhood has fewer than 3 points, or all of its ``x`` are equal.
    """
    order = np.argsort(x, kind="stable")
    xs, ys = x[order], y[order]
    n_near = min(len(xs), int(len(xs) * span + 1e-5))
    if n_near < 3:
        raise ValueError(f"a local parabola needs 3 points, and {span:g} of {len(xs)} are {n_near}")
    vertices = _vertices(xs, int(len(xs) * span * CELL))
    fits = np.array([_local_parabola(xs, ys, at, n_near) for at in vertices])
    return _hermite(vertices, fits[:, 0], fits[:, 1], x)


def _vertices(xs: Floats, most: int) -> Floats:
    """Cut sorted values at medians until no interval has more than `most`; return the cuts and two outer vertices."""
    width = max(xs[-1] - xs[0], 1e-10 * max(abs(xs[0]), abs(xs[-1])) + 1e-30)
    low, high = xs[0] - MARGIN * width, xs[-1] + MARGIN * width
    cuts, intervals = set[float](), [(0, len(xs) - 1, float(low), float(high))]
    while intervals:
        first, last, left, right = intervals.pop()
        if last - first + 1 <= most:
            continue
        middle = _cut_between_ties(xs, first, last)
        cut = float(xs[middle])
        if cut in (left, right):
            continue
        cuts.add(cut)
        intervals += [(first, middle, left, cut), (middle + 1, last, cut, right)]
    return np.array([low, *sorted(cuts), high])


def _cut_between_ties(xs: Floats, first: int, last: int) -> int:
    """Return the index next to the middle after which the value changes; the search goes right and left in turn."""
    middle, offset = (first + last) // 2, 0
    while first <= middle + offset < last and xs[middle + offset] == xs[middle + offset + 1]:
        offset = -offset + (offset <= 0)
    # Where the search runs out of the interval, dloess cuts in the middle of the ties.
    return middle + offset if first <= middle + offset < last else middle


def _local_parabola(xs: Floats, ys: Floats, at: float, n_near: int) -> tuple[float, float]:
    """Return value and slope at a place of the weighted parabola through the nearest points."""
    # The nearest of sorted values are neighbours; only n_near on either side can be among them.
    middle = int(np.searchsorted(xs, at))
    part = slice(max(0, middle - n_near), middle + n_near)
    distance = np.abs(xs[part] - at)
    near = np.argsort(distance, kind="stable")[:n_near]
    reach = distance[near[-1]]
    if reach <= 0:
        raise ValueError(f"{n_near} neighbouring points all have the value {at:g}")
    weight = (1 - (distance[near] / reach) ** 3) ** 1.5  # the root of the tricube
    offset = xs[part][near] - at
    columns = weight[:, None] * np.stack([np.ones_like(offset), offset, offset**2], axis=1)
    # Columns of equal length, so that the limit on singular values, dloess's, does not depend on the unit of x.
    length = np.linalg.norm(columns, axis=0)
    length[length == 0] = 1
    found = np.linalg.lstsq(columns / length, weight * ys[part][near], rcond=100 * np.finfo(float).eps)[0]
    return float(found[0] / length[0]), float(found[1] / length[1])


def _hermite(vertices: Floats, values: Floats, slopes: Floats, at: Floats) -> Floats:
    """Interpolate by cubics with given values and slopes at the vertices."""
    i = np.clip(np.searchsorted(vertices, at, side="right") - 1, 0, len(vertices) - 2)
    step = vertices[i + 1] - vertices[i]
    h = (at - vertices[i]) / step
    value = (1 - h) ** 2 * (1 + 2 * h) * values[i] + h**2 * (3 - 2 * h) * values[i + 1]
    slope = h * (1 - h) ** 2 * slopes[i] - h**2 * (1 - h) * slopes[i + 1]
    return np.asarray(value + slope * step)
