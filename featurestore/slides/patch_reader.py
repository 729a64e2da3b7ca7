"""The pixels of many patches: read in strips, cut into batches.

Where a slide is a file of tiles, patches are cut from the decoded tiles, one copy a patch. Elsewhere a strip of patch
rows is read once and cut, since overlapping patches share their pixels. What cannot be read is tried patch by patch, and
comes out marked.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.blocks import Block
from featurestore.errors import SlideAccessError, SlideError
from featurestore.grid import PatchGrid
from featurestore.slides.protocol import Slide

# glibc maps allocations above 32 MB (its largest dynamic threshold) anew each time, and the kernel zeroes their pages.
MAX_STRIP_PX = 8_000_000
"""Pixels held at once for one strip: 24 MB of RGB, memory that malloc reuses."""


@dataclass(frozen=True)
class PatchBatch:
    """Some patches of one block, with their pixels.

    Parameters
    ----------
    block
        Where they belong.
    rows, cols
        Positions within the block, shape ``(n,)``.
    pixels
        RGB, shape ``(n, patch_px, patch_px, 3)``; only patches that could be read.
    failures
        ``(row, col, reason)`` in the grid for patches that could not be read.
    last
        True on the block's last batch.
    """

    block: Block
    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    pixels: NDArray[np.uint8]
    failures: tuple[tuple[int, int, str], ...]
    last: bool


def read_batches(
    slide: Slide, grid: PatchGrid, block: Block, wanted: NDArray[np.bool_], batch: int
) -> Iterator[PatchBatch]:
    """Read the wanted patches of a block, in row-major order.

    Parameters
    ----------
    wanted
        Which of the block's patches to read, shape ``block.shape``.
    batch
        Most patches in one item.

    Yields
    ------
    PatchBatch
        At least one, the last one marked.
    """
    positions = np.argwhere(wanted)
    side = grid.spec.patch_px
    if not len(positions):
        none = np.empty(0, np.int64)
        yield PatchBatch(block, none, none, np.empty((0, side, side, 3), np.uint8), (), last=True)
    cuts = getattr(slide, "cuts_patches", None)  # a reader of another package need not have it
    read = _cut_from_tiles if cuts is not None and cuts(grid.effective_mpp) else _cut_from_strips
    done = 0
    for chosen, pixels in read(slide, grid, block, positions, batch):
        failures: list[tuple[int, int, str]] = []
        ok = np.ones(len(chosen), bool)
        if pixels is None:
            pixels, ok, failures = _read_singly(slide, grid, block, chosen)
        done += len(chosen)
        yield PatchBatch(
            block, chosen[ok, 0], chosen[ok, 1], pixels, tuple(failures), last=done == len(positions)
        )


_Cut = Iterator[tuple[NDArray[np.int64], NDArray[np.uint8] | None]]
"""Some positions and their pixels; None where some of them cannot be read."""


def _cut_from_tiles(
    slide: Any, grid: PatchGrid, block: Block, positions: NDArray[np.int64], batch: int
) -> _Cut:
    """Cut patches straight from the slide's tiles: every batch but a block's last is full."""
    side, stride = grid.spec.patch_px, grid.spec.stride_px
    x, y, _, _ = grid.region_px(block.rows, block.cols)
    # Several batches at once where they are small: fewer tiles are kept for the next call.
    size = batch * max(1, MAX_STRIP_PX // (side * side * batch))
    for start in range(0, len(positions), size):
        run = positions[start : start + size]
        corners = np.stack([x + run[:, 1] * stride, y + run[:, 0] * stride], axis=1)
        try:
            pixels = slide.read_patches(corners, side, grid.effective_mpp)
        except SlideAccessError:
            raise
        except SlideError:
            pixels = None
        for i in range(0, len(run), batch):
            yield run[i : i + batch], None if pixels is None else pixels[i : i + batch]


def _cut_from_strips(
    slide: Slide, grid: PatchGrid, block: Block, positions: NDArray[np.int64], batch: int
) -> _Cut:
    """Read strips of patch rows, and cut patches from them."""
    side, stride = grid.spec.patch_px, grid.spec.stride_px
    for strip in _strips(grid, block, positions):
        region, (row0, col0) = _read_strip(slide, grid, block, strip)
        for start in range(0, len(strip), batch):
            chosen = strip[start : start + batch]
            if region is None:
                yield chosen, None
                continue
            pixels = np.empty((len(chosen), side, side, 3), np.uint8)
            for i, (row, col) in enumerate(chosen):
                y, x = (row - row0) * stride, (col - col0) * stride
                pixels[i] = region[y : y + side, x : x + side]
            yield chosen, pixels


def _strips(grid: PatchGrid, block: Block, positions: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Split positions into runs of patch rows whose pixels fit in `MAX_STRIP_PX`."""
    _, _, width, _ = grid.region_px(block.rows, block.cols)
    # At least one row of patches, even where that is more than the limit.
    height = max(grid.spec.patch_px, MAX_STRIP_PX // width)
    rows_per_strip = 1 + max(0, (height - grid.spec.patch_px) // grid.spec.stride_px)
    for first in range(0, block.shape[0], rows_per_strip):
        inside = (positions[:, 0] >= first) & (positions[:, 0] < first + rows_per_strip)
        if inside.any():
            yield positions[inside]


def _read_strip(
    slide: Slide, grid: PatchGrid, block: Block, strip: NDArray[np.int64]
) -> tuple[NDArray[np.uint8] | None, tuple[int, int]]:
    # Only the rectangle that the wanted patches span: glass around a small piece of tissue is not decoded.
    (row0, col0), (row1, col1) = strip.min(axis=0), strip.max(axis=0)
    rows = (block.rows[0] + int(row0), block.rows[0] + int(row1) + 1)
    cols = (block.cols[0] + int(col0), block.cols[0] + int(col1) + 1)
    x, y, width, height = grid.region_px(rows, cols)
    try:
        return slide.read_region(x, y, width, height, grid.effective_mpp), (int(row0), int(col0))
    except SlideAccessError:
        raise
    except SlideError:
        return None, (0, 0)  # some patch of it cannot be read; `_read_singly` finds out which


def _read_singly(
    slide: Slide, grid: PatchGrid, block: Block, chosen: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], list[tuple[int, int, str]]]:
    """Read patch by patch: the pixels of those that can be read, which they are, and why the others cannot."""
    side = grid.spec.patch_px
    pixels = np.empty((len(chosen), side, side, 3), np.uint8)
    ok = np.ones(len(chosen), dtype=bool)
    failures: list[tuple[int, int, str]] = []
    for i, (row, col) in enumerate(chosen):
        at = (block.rows[0] + int(row), block.cols[0] + int(col))
        px, py, width, height = grid.region_px((at[0], at[0] + 1), (at[1], at[1] + 1))
        try:
            pixels[i] = slide.read_region(px, py, width, height, grid.effective_mpp)
        except SlideAccessError:
            raise  # the patch may be whole: recorded as unreadable, it would not be read again
        except SlideError as error:
            ok[i] = False
            failures.append((*at, str(error)))
    return (pixels[ok] if failures else pixels), ok, failures
