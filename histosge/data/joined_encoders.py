"""Embeddings of several encoders of one slide, side by side on the first one's grid.

Where the others lie on another grid, theirs are interpolated at the first one's patch centres: a weighted mean of the up
to four patches around. A patch that one of them lacks is left out, so that every vector is complete.
"""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import product

import numpy as np
from numpy.typing import NDArray

from featurestore.blocks import Block
from featurestore.encoders.protocol import EncoderIdentity
from featurestore.grid import PatchGrid
from featurestore.storage.block_array import BlockArray
from featurestore.storage.store import StoredGrid
from featurestore.storage.stored_documents import identity_attrs

Indices = NDArray[np.int64]
Values = NDArray[np.float32]


def join_identities(parts: Sequence[tuple[EncoderIdentity, PatchGrid]]) -> EncoderIdentity:
    """Return the identity of embeddings side by side: it holds those of all encoders, in their order.

    Parameters
    ----------
    parts
        Each encoder and the grid of its embeddings.
    """
    encoders = [
        identity_attrs(identity) | {"grid": {"key": grid.spec.key} | asdict(grid.spec)}
        for identity, grid in parts
    ]
    return EncoderIdentity(
        " + ".join(identity.key for identity, _ in parts),
        sum(identity.dim for identity, _ in parts),
        {"encoders": encoders},
    )


def read_at(stored: StoredGrid, array: BlockArray, target: PatchGrid, rows: Indices, cols: Indices) -> Values:
    """Return an encoder's embeddings at patches of another grid of the slide, ``(n, dim)``; NaN where it has none.

    Parameters
    ----------
    stored, array
        Grid and embeddings of the encoder that is read.
    target, rows, cols
        The patches, on their own grid.
    """
    if len(rows) == 0:
        return np.empty((0, array.shape[2]), np.float32)
    down, across = _positions(stored.grid, target, rows, cols)
    # Rounding of microns must not turn a patch of the same grid into a mean of two.
    down, across = (np.where(np.abs(p - np.rint(p)) < 1e-6, np.rint(p), p) for p in (down, across))
    top, left = np.floor(down).astype(np.int64), np.floor(across).astype(np.int64)
    corner = (int(top.min()), int(left.min()))
    region = _read_region(stored, array, corner, (int(top.max()) + 2, int(left.max()) + 2))
    total, weights = np.zeros((len(rows), array.shape[2]), np.float32), np.zeros((len(rows), 1), np.float32)
    for dy, dx in product((0, 1), (0, 1)):
        weight = (1 - np.abs(down - top - dy)) * (1 - np.abs(across - left - dx))
        used = np.flatnonzero(weight > 0)
        values = region[top[used] + dy - corner[0], left[used] + dx - corner[1]]
        # Tissue alone: beside it the others get all of the weight.
        there = np.isfinite(values).all(axis=1)
        share = weight[used[there], None].astype(np.float32)
        total[used[there]] += share * values[there]
        weights[used[there]] += share
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(total / weights, dtype=np.float32)


def _positions(
    grid: PatchGrid, target: PatchGrid, rows: Indices, cols: Indices
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return patch centres of `target` as fractional rows and columns of `grid`."""
    # Origins are ``(x, y)``, rows go down.
    (x, y), (own_x, own_y) = target.origin_um, grid.origin_um
    to_centre = (target.patch_um - grid.patch_um) / 2
    down = (rows * target.stride_um + to_centre + y - own_y) / grid.stride_um
    across = (cols * target.stride_um + to_centre + x - own_x) / grid.stride_um
    return np.asarray(down, np.float64), np.asarray(across, np.float64)


def _read_region(
    stored: StoredGrid, array: BlockArray, start: tuple[int, int], stop: tuple[int, int]
) -> Values:
    """Return the embeddings of a rectangle of patches, which may reach beyond the grid; NaN where there is no tissue."""
    shape = (stop[0] - start[0], stop[1] - start[1])
    region = np.full((*shape, array.shape[2]), np.nan, np.float32)
    for block in stored.planned(array.block_shape):
        inside = [_overlap(block, axis, start[axis], stop[axis]) for axis in (0, 1)]
        if any(low >= high for low, high in inside):
            continue
        values = array.read_block(block).astype(np.float32)
        values[~stored.is_tissue[block.slices]] = np.nan
        own = tuple(
            slice(low - first, high - first)
            for (low, high), first in zip(inside, (block.rows[0], block.cols[0]), strict=True)
        )
        here = tuple(
            slice(low - first, high - first) for (low, high), first in zip(inside, start, strict=True)
        )
        region[here] = values[own]
    return region


def _overlap(block: Block, axis: int, start: int, stop: int) -> tuple[int, int]:
    first, last = (block.rows, block.cols)[axis]
    return max(first, start), min(last, stop)
