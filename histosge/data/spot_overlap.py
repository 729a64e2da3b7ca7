"""Which patches lie under a spot, and which around a patch. Gaussian weights are in `gaussian_pooling`.

Arithmetic on grid positions alone: numpy and scipy, no torch, no store. Positions may be missing
(background): a missing patch gets no weight, and weights are normalised over the patches that exist.

Terms
    stride cell  the stride x stride square around a patch's centre: what the patch stands for
    overlap      (n_spots, n_patches) weights: the share of each spot's disc in each stride cell
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree

from histosge.data.sections import Patches, Spots

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


def find_patches(patches: Patches, rows: Indices, cols: Indices) -> Indices:
    """Return the index of the patch at each position, -1 where there is none; any shape."""
    if len(patches) == 0:
        return np.full(rows.shape, -1, dtype=np.int64)
    # Row and column become one key. An empty column on either side keeps a position beyond the edge of one row from
    # having the key of a patch in the next.
    first, width = int(patches.cols.min()) - 1, int(np.ptp(patches.cols)) + 3
    keys = patches.rows * width + (patches.cols - first)
    order = np.argsort(keys, kind="stable")
    wanted = rows * width + np.clip(cols - first, 0, width - 1)
    place = np.minimum(np.searchsorted(keys[order], wanted), len(order) - 1)
    found: Indices = order[place]
    return np.where(keys[found] == wanted, found, -1)


def spot_overlap(spots: Spots, patches: Patches) -> sparse.csr_matrix:
    """Weight the patches under each spot, disc or square: see `disc_overlap`."""
    overlap = square_overlap if spots.shape == "square" else disc_overlap
    return overlap(spots.xy_um, spots.diameter_um, patches)


def disc_overlap(spot_xy_um: Floats, diameter_um: float, patches: Patches) -> sparse.csr_matrix:
    """Weight the patches under each spot's disc by the area that their stride cells share with it.

    Parameters
    ----------
    spot_xy_um
        Spot centres ``(x, y)``, shape ``(n_spots, 2)``.
    diameter_um
        Diameter of a spot's disc, positive.
    patches
        Of the same slide.

    Returns
    -------
    scipy.sparse.csr_matrix
        Shape ``(n_spots, n_patches)``. Rows sum to 1; the row of a spot without any patch under its
        disc is all zero: the caller leaves that spot out, and counts it.

    Raises
    ------
    ValueError
        If the diameter is not positive.
    """
    if not diameter_um > 0:
        raise ValueError(f"a spot's disc needs a positive diameter, not {diameter_um} µm")
    return _overlap(spot_xy_um, diameter_um, patches, _disc_in_cell)


def square_overlap(spot_xy_um: Floats, side_um: float, patches: Patches) -> sparse.csr_matrix:
    """Weight the patches under each square spot, whose sides are parallel to the slide's: see `disc_overlap`.

    Raises
    ------
    ValueError
        If the side is not positive.
    """
    if not side_um > 0:
        raise ValueError(f"a square spot needs a positive side, not {side_um} µm")
    return _overlap(spot_xy_um, side_um, patches, _square_in_cell)


def _overlap(
    spot_xy_um: Floats,
    diameter_um: float,
    patches: Patches,
    in_cell: Callable[[Floats, Floats, float], Floats],
) -> sparse.csr_matrix:
    radius, stride = diameter_um / 2, patches.stride_um
    # In units of the stride, with patch (row, col) at (col, row): every cell is a unit square.
    from_origin = np.asarray(spot_xy_um, dtype=np.float64) - np.asarray(patches.origin_um)
    centre = (from_origin - patches.patch_um / 2) / stride
    reach = int(np.ceil(radius / stride + 0.5))
    # All cells that a disc can touch: the same number for every spot, so that no loop over spots is needed.
    d_row, d_col = _offsets_in_square(reach)
    nearest = np.rint(centre).astype(np.int64)
    rows, cols = nearest[:, 1:] + d_row, nearest[:, :1] + d_col
    area = in_cell(cols - centre[:, :1], rows - centre[:, 1:], radius / stride)
    index = find_patches(patches, rows, cols)
    keep = (index >= 0) & (area > 0)
    spot = np.nonzero(keep)[0]
    shape = (len(centre), len(patches))
    weights = sparse.csr_matrix((area[keep], (spot, index[keep])), shape=shape)
    # Over the cells that exist: a disc at the rim of the tissue is the mean of its tissue, not diluted by background.
    total = np.asarray(weights.sum(axis=1)).ravel()
    scale = np.divide(1.0, total, out=np.zeros_like(total), where=total > 0)
    return sparse.csr_matrix(sparse.diags(scale) @ weights)


def _offsets_in_square(reach: int) -> tuple[Indices, Indices]:
    """Return row and column offsets of all positions at most `reach` away along either axis, row by row."""
    steps = np.arange(-reach, reach + 1)
    return np.repeat(steps, len(steps)), np.tile(steps, len(steps))


def _square_in_cell(dx: Floats, dy: Floats, half: float) -> Floats:
    """Return the area that a square at the origin shares with unit squares centred on ``(dx, dy)``."""
    wide, high = (np.minimum(d + 0.5, half) - np.maximum(d - 0.5, -half) for d in (dx, dy))
    return np.asarray(np.maximum(wide, 0) * np.maximum(high, 0))


def _disc_in_cell(dx: Floats, dy: Floats, radius: float) -> Floats:
    """Return the area that a disc at the origin shares with unit squares centred on ``(dx, dy)``."""
    x0, x1, y0, y1 = ((d + side) / radius for d in (dx, dy) for side in (-0.5, 0.5))
    # As for a cumulative distribution: the area in a rectangle from those left of and below its four corners.
    quarters = _disc_left_below(x1, y1) - _disc_left_below(x0, y1)
    quarters += _disc_left_below(x0, y0) - _disc_left_below(x1, y0)
    # Differences of areas leave rounding: a cell that only touches the disc gets no weight.
    return np.where(quarters > 1e-12, quarters, 0.0) * radius**2


def _disc_left_below(a: Floats, b: Floats) -> Floats:
    """Return the area of the unit disc where ``x <= a`` and ``y <= b``."""

    def half_chords(x: Floats) -> Floats:
        """Integrate sqrt(1 - x^2) from -1 to x."""
        return np.asarray(x * np.sqrt(1 - x * x) + np.arcsin(x) + np.pi / 2) / 2

    a, b = np.clip(a, -1, 1), np.clip(b, -1, 1)
    edge = np.sqrt(1 - b * b)
    crossing = np.clip(a, -edge, edge)
    # Between -edge and edge the line y = b cuts the chord; beyond, the chord counts whole or not at all.
    cut = b * (crossing + edge) + half_chords(crossing) - half_chords(-edge)
    beyond = half_chords(np.minimum(a, -edge)) + half_chords(np.maximum(a, edge)) - half_chords(edge)
    return np.asarray(cut + np.where(b > 0, 2 * beyond, 0.0))


def spots_from_patches(overlap: sparse.csr_matrix, log_patches: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return log1p of the mean *rate* under each disc: what a spot there would have measured.

    Rates add up, logarithms do not: the mean is taken of ``expm1`` of the predictions.

    Parameters
    ----------
    overlap
        From `disc_overlap`, ``(n_spots, n_patches)``.
    log_patches
        log1p(CP10k) of every patch, ``(n_patches, n_genes)``.

    Returns
    -------
    numpy.ndarray
        log1p(CP10k), ``(n_spots, n_genes)``.
    """
    # Only the patches under any disc: a dense map has many more.
    under = np.unique(overlap.indices)
    rates = np.expm1(np.asarray(log_patches[under], dtype=np.float64))
    means: Floats = overlap[:, under] @ rates
    return np.log1p(means).astype(np.float32)


def heaviest_patches(overlap: sparse.csr_matrix) -> Indices:
    """Return the patch that covers most of each spot, ``(n_spots,)``."""
    # Of a copy: scipy sorts the indices of what it searches, and sums over it would round in another order afterwards.
    return np.asarray(overlap.copy().argmax(axis=1)).ravel().astype(np.int64)


def spot_embeddings(overlap: sparse.csr_matrix, patches: Patches) -> Floats:
    """Return the area-weighted mean embedding under each disc, ``(n_spots, dim)``."""
    return np.asarray(overlap @ patches.embedding.astype(np.float64))


def spot_pitch_um(positions_um: Iterable[Floats]) -> float | None:
    """Return the median distance from a spot to the nearest one of the same slide.

    Parameters
    ----------
    positions_um
        Spot centres of each slide, ``(n_spots, 2)`` microns.

    Returns
    -------
    float or None
        None where every spot is alone on its slide.
    """
    # The nearest of all is the spot itself: the second is asked for.
    distances = [cKDTree(xy_um).query(xy_um, k=[2])[0] for xy_um in positions_um if len(xy_um) > 1]
    return float(np.median(np.concatenate(distances))) if distances else None


@dataclass(frozen=True)
class Neighbourhood:
    """The patches that one attention call sees around each patch.

    Parameters
    ----------
    index
        Which patches, ``(n, n_offsets)``; -1 where a position is background.
    offset_um
        ``(dx, dy)`` of each position from the patch in the middle, ``(n_offsets, 2)``: the same for all.
    """

    index: Indices
    offset_um: Floats


def neighbourhood(patches: Patches, radius_um: float, steps: int, of: Indices | None = None) -> Neighbourhood:
    """Find the patches in a square window of ``2 * steps + 1`` positions a side around each patch.

    The window spans the same microns on every grid: on a finer grid its positions are further
    apart in patches, on a coarser one there are fewer of them.

    Parameters
    ----------
    radius_um
        From the middle to the outermost position, along either axis, at most.
    steps
        Positions between the middle (not counted) and the edge, at most.
    of
        Indices of the patches in the middle of a window; all if None.

    Returns
    -------
    Neighbourhood
        The middle itself is among the positions.
    """
    # The tolerance lets a radius of 4 x 56 / 56 be 4 steps whatever the rounding of the stride.
    step = max(1, int(np.floor(radius_um / steps / patches.stride_um + 1e-6)))
    reach = min(steps, int(np.floor(radius_um / (step * patches.stride_um) + 1e-6)))
    d_row, d_col = _offsets_in_square(reach)
    middle = np.arange(len(patches)) if of is None else of
    rows = patches.rows[middle][:, None] + step * d_row
    cols = patches.cols[middle][:, None] + step * d_col
    offset = np.stack([d_col, d_row], axis=1) * step * patches.stride_um
    return Neighbourhood(find_patches(patches, rows, cols), offset.astype(np.float64))
