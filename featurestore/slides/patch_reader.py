"""The pixels of many patches: read in strips, cut into batches, read ahead in a thread.

Overlapping patches share their pixels, so a strip of patch rows is read once and cut; what cannot be
read is tried patch by patch, and comes out marked.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from featurestore.blocks import Block
from featurestore.errors import SlideError
from featurestore.grid import PatchGrid
from featurestore.slides.protocol import Slide

# glibc maps allocations above 32 MB (its largest dynamic threshold) anew each time, and the kernel zeroes their pages.
MAX_STRIP_PX = 8_000_000
"""Pixels held at once for one strip: 24 MB of RGB, memory that malloc reuses."""

READ_AHEAD = 4
"""Batches that are read while one is encoded: they even out slow tiles, and cost memory in every thread."""

T = TypeVar("T")


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
    strips = list(_strips(grid, block, positions))
    pieces = [(strip, i) for strip in strips for i in range(0, len(strip), batch)]
    if not pieces:
        none = np.empty(0, np.int64)
        side = grid.spec.patch_px
        yield PatchBatch(block, none, none, np.empty((0, side, side, 3), np.uint8), (), last=True)
    region: NDArray[np.uint8] | None = None
    origin = (0, 0)
    for number, (strip, start) in enumerate(pieces):
        if start == 0:
            region, origin = _read_strip(slide, grid, block, strip)
        chosen = strip[start : start + batch]
        pixels, ok, failures = _cut_patches(slide, grid, block, chosen, region, origin)
        yield PatchBatch(
            block, chosen[ok, 0], chosen[ok, 1], pixels, tuple(failures), last=number == len(pieces) - 1
        )


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
    except SlideError:
        return None, (0, 0)  # some patch of it cannot be read; `_cut_patches` finds out which


def _cut_patches(
    slide: Slide,
    grid: PatchGrid,
    block: Block,
    chosen: NDArray[np.int64],
    region: NDArray[np.uint8] | None,
    origin: tuple[int, int],
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], list[tuple[int, int, str]]]:
    side, stride = grid.spec.patch_px, grid.spec.stride_px
    pixels = np.empty((len(chosen), side, side, 3), np.uint8)
    ok = np.ones(len(chosen), dtype=bool)
    failures: list[tuple[int, int, str]] = []
    for i, (row, col) in enumerate(chosen):
        if region is not None:
            y, x = (row - origin[0]) * stride, (col - origin[1]) * stride
            pixels[i] = region[y : y + side, x : x + side]
            continue
        at = (block.rows[0] + int(row), block.cols[0] + int(col))
        px, py, width, height = grid.region_px((at[0], at[0] + 1), (at[1], at[1] + 1))
        try:
            pixels[i] = slide.read_region(px, py, width, height, grid.effective_mpp)
        except SlideError as error:
            ok[i] = False
            failures.append((*at, str(error)))
    return (pixels[ok] if failures else pixels), ok, failures


def read_ahead(items: Callable[[], Iterator[T]], depth: int = READ_AHEAD) -> Generator[T, None, None]:
    """Run an iterator in a thread, at most `depth` items ahead of its consumer.

    An exception in the thread is raised at the consumer; a consumer that stops early stops the thread.
    """
    channel: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not stop.is_set():
            try:
                # With a timeout: a consumer that stopped takes nothing more, and the thread has to notice.
                channel.put((kind, value), timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def run() -> None:
        try:
            for item in items():
                if not put("item", item):
                    return
        except BaseException as error:  # noqa: BLE001  # it crosses to the consumer, which raises it
            put("error", error)
        else:
            put("end", None)

    thread = threading.Thread(target=run, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = channel.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        # Joined, so that the slide is not closed while the thread still reads it.
        stop.set()
        thread.join()
