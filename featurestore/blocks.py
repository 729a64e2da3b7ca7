"""Blocks of patches, which one task encodes and writes: arithmetic only.

Terms
    patch  (row, col) in the grid
    block  a rectangle of patches: one task, one stored object, one commit
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DEFAULT_BLOCK = (32, 32)
"""Patches in one block, 2 MB at 1,024 float16 features. Larger blocks read faster, but a killed task loses more, and a
worker holds four times as much at (64, 64); see docs/results.md."""


@dataclass(frozen=True, order=True)
class Block:
    """A rectangle of patches, addressed by its position among the blocks of one grid.

    Parameters
    ----------
    index
        ``(block_row, block_col)``: also the key of the stored chunk.
    rows, cols
        Half-open ranges of patches, ``(start, stop)``.
    """

    index: tuple[int, int]
    rows: tuple[int, int]
    cols: tuple[int, int]

    @property
    def slices(self) -> tuple[slice, slice]:
        """Index a ``(row, col, ...)`` array to get this block's patches."""
        return slice(*self.rows), slice(*self.cols)

    @property
    def shape(self) -> tuple[int, int]:
        """Patches in this block, ``(rows, cols)``."""
        return self.rows[1] - self.rows[0], self.cols[1] - self.cols[0]

    def coarser(self, factor: int) -> "Block":
        """Return the same rectangle on a grid `factor` times as coarse, of which it covers whole patches."""
        if any(edge % factor for edge in (*self.rows, *self.cols)):
            raise ValueError(f"rows {self.rows} and columns {self.cols} are no multiples of {factor}")
        rows, cols = ((start // factor, stop // factor) for start, stop in (self.rows, self.cols))
        return Block(self.index, rows, cols)


def plan_blocks(grid_shape: tuple[int, int], block_shape: tuple[int, int]) -> Iterator[Block]:
    """Cover a grid with blocks, in row-major order.

    Blocks on the bottom and right edges are smaller when the grid is not a multiple of the block.

    Parameters
    ----------
    grid_shape
        Patches in the grid, ``(n_rows, n_cols)``.
    block_shape
        Patches in one block, ``(rows, cols)``: the shape of one stored object.

    Yields
    ------
    Block
        Each patch is in exactly one block.

    Raises
    ------
    ValueError
        If a side of the block is not positive.
    """
    block_rows, block_cols = block_shape
    if block_rows <= 0 or block_cols <= 0:
        raise ValueError(f"a block must have at least 1 x 1 patches, not {block_rows} x {block_cols}")
    n_rows, n_cols = grid_shape
    for i, row in enumerate(range(0, n_rows, block_rows)):
        for j, col in enumerate(range(0, n_cols, block_cols)):
            yield Block((i, j), (row, min(row + block_rows, n_rows)), (col, min(col + block_cols, n_cols)))


def whole_patches(block_shape: tuple[int, int], tokens: int) -> tuple[int, int]:
    """Return a block shape for a token grid: rounded down to whole patches of `tokens` x `tokens` positions.

    In positions, so an object keeps its size however fine the grid is.
    """
    rows, cols = (max(1, side // tokens) * tokens for side in block_shape)
    return rows, cols


def planned_blocks(is_tissue: NDArray[np.bool_], block_shape: tuple[int, int]) -> list[Block]:
    """Return the blocks that hold at least one tissue patch, in row-major order: those that a store will hold.

    Parameters
    ----------
    is_tissue
        Which patches of the grid are tissue, ``(n_rows, n_cols)``.
    block_shape
        Patches in one block, ``(rows, cols)``.
    """
    n_rows, n_cols = is_tissue.shape
    return [block for block in plan_blocks((n_rows, n_cols), block_shape) if is_tissue[block.slices].any()]
