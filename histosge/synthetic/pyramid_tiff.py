"""Strips of pixels -> a JPEG-tiled pyramidal TIFF that OpenSlide reads, without holding the slide in memory.

Each level halves the one above by 2 x 2 means and keeps only the rows of one tile, plus its finished
JPEG tiles; level 0 goes straight to the file.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

TILE_PX = 256
LEVELS = 5
QUALITY = 85
Bytes = NDArray[np.uint8]


class _Level:
    """One coarser level under way: rows wait until they fill a tile."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.tiles: list[bytes] = []
        self._waiting = np.empty((0, width, 3), np.uint8)
        self._done = 0

    def add(self, rows: Bytes) -> None:
        self._waiting = np.concatenate([self._waiting, rows[: self.height - self._done, : self.width]])
        self._done += min(len(rows), self.height - self._done)
        while len(self._waiting) >= TILE_PX or (self._done == self.height and len(self._waiting)):
            self.tiles.extend(_encoded(self._waiting[:TILE_PX]))
            self._waiting = self._waiting[TILE_PX:]


def write_pyramid(path: Path, strips: Iterable[Bytes], size_px: tuple[int, int], mpp: float) -> Bytes:
    """Write a slide.

    Parameters
    ----------
    strips
        RGB from top to bottom, ``(256, width, 3)`` each; the last may be shorter.
    size_px
        ``(width, height)``.
    mpp
        Microns per pixel, written as pixels per centimetre.

    Returns
    -------
    numpy.ndarray
        The coarsest level, ``(height // 16, width // 16, 3)`` for slides of some size.
    """
    width, height = size_px
    # No level under 16 pixels a side.
    count = max(n for n in range(1, LEVELS + 1) if min(size_px) >> (n - 1) >= 16)
    levels = [_Level(width >> n, height >> n) for n in range(1, count)]
    coarsest: list[Bytes] = []

    def level_0() -> Iterator[bytes]:
        for strip in strips:
            # First: the writer does not go on with this generator once it has the last tile of level 0.
            _cascade(strip, levels, coarsest)
            yield from _encoded(strip)

    with tifffile.TiffWriter(path) as tiff:
        _write_level(tiff, level_0(), size_px, mpp, 0)
        for n, level in enumerate(levels, start=1):
            _write_level(tiff, iter(level.tiles), (level.width, level.height), mpp, n)
    return np.concatenate(coarsest)


def _cascade(rows: Bytes, levels: list[_Level], coarsest: list[Bytes]) -> None:
    for level in levels:
        rows = _halved(rows)
        level.add(rows)
    coarsest.append(rows)


def _halved(rows: Bytes) -> Bytes:
    """Average 2 x 2 pixels; an odd last row or column is dropped."""
    height, width = rows.shape[0] // 2 * 2, rows.shape[1] // 2 * 2
    even = rows[:height, :width].astype(np.uint16)
    down = even[0::2] + even[1::2]
    return np.asarray(((down[:, 0::2] + down[:, 1::2] + 2) >> 2).astype(np.uint8))


def _encoded(rows: Bytes) -> Iterator[bytes]:
    """Yield one row of tiles as JPEG, edges repeated to fill the last."""
    height, width = rows.shape[:2]
    if height < TILE_PX or width % TILE_PX:
        # A TIFF's tiles are all whole. Repeated edges leave no dark rim in the JPEG, as zeros would.
        rows = np.pad(rows, ((0, TILE_PX - height), (0, -width % TILE_PX), (0, 0)), mode="edge")
    for left in range(0, width, TILE_PX):
        tile = np.ascontiguousarray(rows[:, left : left + TILE_PX])
        yield bytes(
            imagecodecs.jpeg8_encode(
                tile, level=QUALITY, colorspace="RGB", outcolorspace="YCBCR", subsampling="420"
            )
        )


def _write_level(
    tiff: "tifffile.TiffWriter", tiles: Iterator[bytes], size_px: tuple[int, int], mpp: float, level: int
) -> None:
    per_cm = 1e4 / mpp / 2**level
    tiff.write(
        tiles,
        shape=(size_px[1], size_px[0], 3),
        dtype=np.uint8,
        tile=(TILE_PX, TILE_PX),
        photometric="ycbcr",
        subsampling=(2, 2),
        compression="jpeg",
        resolution=(per_cm, per_cm),
        resolutionunit="CENTIMETER",
        subfiletype=1 if level else 0,  # marks a reduced copy: OpenSlide takes these as levels
        metadata=None,
        software="histosge",
    )
