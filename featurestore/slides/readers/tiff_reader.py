"""TIFFs that OpenSlide does not take: flat ones, and OME-TIFF with its pyramid. Through tifffile.

Tiles and strips are decoded as they are touched; a level is never decoded whole unless it is one strip.
"""

import threading
import weakref
import xml.etree.ElementTree as ET
from collections import OrderedDict
from typing import Any, BinaryIO

import numpy as np
import tifffile
from numpy.typing import NDArray

from featurestore.errors import SlideError
from featurestore.slides.pyramid_slide import PyramidSlide, check_mpp, isotropic_mpp
from featurestore.slides.slide_reader import Recognition, SlideReader

SUFFIXES = (".tif", ".tiff")
CACHED_SEGMENTS_PX = 64_000_000
"""Pixels of decoded tiles and strips that are kept: 192 MB, since a strip may be as wide as the slide."""
_UM_PER_UNIT = {"µm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}


class TiffSlide(PyramidSlide):
    """A TIFF's first series as a slide: 8-bit RGB or grey, pixels contiguous."""

    def __init__(self, path: str, mpp: float | None) -> None:
        try:
            self._file = tifffile.TiffFile(path)
        except (tifffile.TiffFileError, ValueError) as error:
            raise SlideError(f"tifffile: {error}") from error
        weakref.finalize(self, self._file.close)  # a slide that is dropped leaves no open file
        try:
            self._pages = [_page(level) for level in self._file.series[0].levels]
        except (tifffile.TiffFileError, ValueError, IndexError, KeyError) as error:
            self._file.close()
            raise SlideError(f"tifffile: {error}") from error
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[int, int], NDArray[np.uint8]] = OrderedDict()
        try:
            for page in self._pages:
                _check_page(page)
            if mpp is None:
                mpp = _ome_mpp(self._file, path) or _tag_mpp(self._pages[0], path)
            sizes = tuple((page.imagewidth, page.imagelength) for page in self._pages)
            super().__init__(path, sizes, check_mpp(mpp, path))
            self._segment(0, 0)  # a missing codec fails the slide now, with its reason, not each patch later
        except SlideError:
            self._file.close()
            raise

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Return native RGB of a rectangle inside a level."""
        page = self._pages[level]
        tile_width, tile_height = _segment_size(page)
        across = -(-page.imagewidth // tile_width)
        out = np.empty((height, width, 3), np.uint8)
        for row in range(y // tile_height, (y + height - 1) // tile_height + 1):
            for col in range(x // tile_width, (x + width - 1) // tile_width + 1):
                tile = self._segment(level, row * across + col)
                left, top = col * tile_width, row * tile_height
                x0, x1 = max(x, left), min(x + width, left + tile.shape[1])
                y0, y1 = max(y, top), min(y + height, top + tile.shape[0])
                out[y0 - y : y1 - y, x0 - x : x1 - x] = tile[y0 - top : y1 - top, x0 - left : x1 - left]
        return out

    def _segment(self, level: int, index: int) -> NDArray[np.uint8]:
        key = (level, index)
        # One lock for file and cache: tifffile's handle has one position, which threads would move under each other.
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
            tile = self._decode(level, index)
            self._cache[key] = tile
            held = sum(t.shape[0] * t.shape[1] for t in self._cache.values())
            while held > CACHED_SEGMENTS_PX and len(self._cache) > 1:
                held -= int(np.prod(self._cache.popitem(last=False)[1].shape[:2]))
        return tile

    def _decode(self, level: int, index: int) -> NDArray[np.uint8]:
        page = self._pages[level]
        handle = self._file.filehandle
        handle.seek(page.dataoffsets[index])
        data = handle.read(page.databytecounts[index])
        tables = {"jpegtables": page.jpegtables} if page.jpegtables is not None else {}
        try:
            decoded, _, shape = page.decode(data, index, **tables)
        except (ValueError, RuntimeError, tifffile.TiffFileError) as error:
            raise SlideError(
                f"{self._source} cannot be read at level {level}, segment {index}: {error}"
            ) from error
        if decoded is None:
            return np.full((shape[1], shape[2], 3), 255, np.uint8)  # a sparse file's missing tile
        pixels = np.asarray(decoded)[0, : shape[1], : shape[2], :3]
        return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else np.ascontiguousarray(pixels)

    def close(self) -> None:
        """Free the file handle."""
        self._file.close()


def is_ome(file_or_path: str | BinaryIO) -> bool:
    """Tell whether a file is an OME-TIFF."""
    try:
        with tifffile.TiffFile(file_or_path) as file:
            return bool(file.is_ome)
    except (tifffile.TiffFileError, ValueError):
        return False


def _page(level: Any) -> Any:
    page = level.keyframe if len(level.pages) == 1 else None
    if page is None:
        raise ValueError(f"its first series has {len(level.pages)} planes ({level.axes}); a slide has one")
    return page


def _check_page(page: Any) -> None:
    if page.dtype != np.uint8 or page.samplesperpixel not in (1, 3, 4) or page.planarconfig != 1:
        raise SlideError(
            f"tifffile: pixels are {page.dtype} with {page.samplesperpixel} samples, planar {int(page.planarconfig)}; "
            "a slide is 8-bit RGB, contiguous"
        )


def _segment_size(page: Any) -> tuple[int, int]:
    if page.is_tiled:
        return page.tilewidth, page.tilelength
    return page.imagewidth, min(page.rowsperstrip, page.imagelength)


def _tag_mpp(page: Any, path: str) -> float | None:
    unit = page.tags.get("ResolutionUnit")
    # Values of the TIFF tag ResolutionUnit: inch and centimetre. 1, "none", gives no scale.
    um_per_unit = {2: 25400.0, 3: 10000.0}.get(int(unit.value) if unit else 0)
    values = []
    for name in ("XResolution", "YResolution"):
        tag = page.tags.get(name)
        numerator, denominator = tag.value if tag else (0, 1)
        values.append(um_per_unit * denominator / numerator if um_per_unit and numerator else None)
    return isotropic_mpp(values[0], values[1], path)


def _ome_mpp(file: tifffile.TiffFile, path: str) -> float | None:
    if not file.ome_metadata:
        return None
    pixels = ET.fromstring(file.ome_metadata).find(".//{*}Pixels")  # noqa: S314  # a local file's own header
    if pixels is None:
        return None
    values = []
    for axis in "XY":
        size, unit = pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm")
        values.append(float(size) * _UM_PER_UNIT[unit] if size and unit in _UM_PER_UNIT else None)
    return isotropic_mpp(values[0], values[1], path)


def _recognises(path: str) -> Recognition:
    # OpenSlide would take an OME-TIFF as a plain one, without mpp or pyramid.
    is_ome_tiff = path.lower().endswith(SUFFIXES) and is_ome(path)
    return Recognition.LIKELY if is_ome_tiff else Recognition.MAYBE


RECORD = SlideReader(
    "tiff",
    "flat TIFF and OME-TIFF, 8-bit RGB or grey, through tifffile",
    SUFFIXES,
    TiffSlide,
    30,
    recognises=_recognises,
)
