"""Write a slide as a pyramidal tiled TIFF, strip by strip: no more than a strip of level 0 is in memory."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

LEVELS = 5
TILE_PX = 256
JPEG_QUALITY = 85


def write_slide(
    path: Path, strips: Iterable[NDArray[np.uint8]], size_px: tuple[int, int], mpp: float
) -> None:
    """Write levels 1, 2, 4, 8, 16 as JPEG tiles, mpp in the resolution tags.

    Parameters
    ----------
    strips
        Level 0 from top to bottom, RGB; every strip but the last is a multiple of `TILE_PX` high.
    size_px
        ``(width, height)`` of level 0.
    """
    halves: list[NDArray[np.uint8]] = []

    def level_0() -> Iterator[NDArray[np.uint8]]:
        for strip in strips:
            halves.append(_half(strip))
            yield from _tiles(strip)

    width, height = size_px
    with tifffile.TiffWriter(path) as file:
        _write_level(file, level_0(), (height, width), mpp, 0)
        level = np.concatenate(halves)
        halves.clear()
        for power in range(1, LEVELS):
            _write_level(file, _tiles(level), level.shape[:2], mpp * 2**power, 1)
            level = _half(level)


def _write_level(
    file: tifffile.TiffWriter,
    tiles: Iterator[NDArray[np.uint8]],
    shape: tuple[int, ...],
    mpp: float,
    subfile: int,
) -> None:
    per_cm = 1e4 / mpp
    file.write(
        tiles,
        shape=(*shape, 3),
        dtype=np.uint8,
        tile=(TILE_PX, TILE_PX),
        photometric="rgb",
        compression="jpeg",
        compressionargs={"level": JPEG_QUALITY},
        resolution=(per_cm, per_cm),
        resolutionunit="CENTIMETER",
        subfiletype=subfile,
        metadata=None,
        software="histosge synthetic",
        maxworkers=1,
    )


def _tiles(strip: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """Cut a strip into tiles, row-major; tiles on the edge are filled by repeating it."""
    below, right = (-side % TILE_PX for side in strip.shape[:2])
    padded = np.pad(strip, ((0, below), (0, right), (0, 0)), mode="edge")
    for y in range(0, padded.shape[0], TILE_PX):
        for x in range(0, padded.shape[1], TILE_PX):
            yield np.ascontiguousarray(padded[y : y + TILE_PX, x : x + TILE_PX])


def _half(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Average 2 x 2 pixels; an odd last row or column is dropped."""
    height, width = (side // 2 * 2 for side in image.shape[:2])
    even = image[:height, :width].astype(np.uint16)
    rows = even[0::2] + even[1::2]
    return ((rows[:, 0::2] + rows[:, 1::2] + 2) // 4).astype(np.uint8)
