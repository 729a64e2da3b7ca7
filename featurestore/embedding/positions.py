"""Which patches are read for a block of a grid, and where their vectors go: arithmetic only.

On an ordinary grid a patch is one position and has one vector. On a token grid a patch that is read gives K x K vectors,
one for each position, and a block holds whole patches.
"""

import numpy as np
from numpy.typing import NDArray

from featurestore.grid import PatchGrid
from featurestore.slides.patch_reader import PatchBatch

PatchFailure = tuple[int, int, str]
"""``(row, col, reason)``: a position in the grid, and why it has no vector."""


def patches_to_read(is_tissue: NDArray[np.bool_], grid: PatchGrid) -> NDArray[np.bool_]:
    """Return which patches to read: those with tissue at any position.

    Parameters
    ----------
    is_tissue
        Of the positions of a grid, or of a block of it, ``(rows, cols)``.

    Returns
    -------
    numpy.ndarray
        ``(rows / K, cols / K)``.
    """
    k, (rows, cols) = grid.tokens, is_tissue.shape
    return np.asarray(is_tissue.reshape(rows // k, k, cols // k, k).any(axis=(1, 3)))


def positions_of(batch: PatchBatch, grid: PatchGrid) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return rows and columns in the grid of a batch's vectors, patch by patch, ``(n * K * K,)`` each."""
    k = grid.tokens
    inside = np.arange(k)
    shape = len(batch.rows), k, k
    rows = k * (batch.block.rows[0] + batch.rows)[:, None, None] + inside[:, None]
    cols = k * (batch.block.cols[0] + batch.cols)[:, None, None] + inside
    return np.broadcast_to(rows, shape).ravel(), np.broadcast_to(cols, shape).ravel()


def failed_positions(
    failures: tuple[PatchFailure, ...], is_tissue: NDArray[np.bool_], grid: PatchGrid
) -> list[PatchFailure]:
    """Return the tissue positions of patches that could not be read; `is_tissue` is of the whole grid."""
    k = grid.tokens
    return [
        (row, col, reason)
        for patch_row, patch_col, reason in failures
        for row in range(k * patch_row, k * (patch_row + 1))
        for col in range(k * patch_col, k * (patch_col + 1))
        if is_tissue[row, col]
    ]
