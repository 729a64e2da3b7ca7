"""TIFFs that OpenSlide does not take, or not right: flat ones, OME-TIFF with its pyramid, unusual colours. Through tifffile.

Tiles and strips are decoded as they are touched; a level is never decoded whole unless it is one strip.
"""

import struct
import threading
import weakref
from collections import OrderedDict
from typing import Any, BinaryIO

import numpy as np
import openslide
import tifffile
from numpy.typing import NDArray

from featurestore.errors import MppError, SlideError, first_line
from featurestore.slides.picture_bounds import check_layout, check_pixels, check_stream
from featurestore.slides.pyramid_slide import PyramidSlide, choose_mpp, isotropic_mpp
from featurestore.slides.slide_reader import Recognition, SlideReader
from featurestore.slides.tiff_colours import RGB, PixelFormat, pixel_format, unknown_depth
from featurestore.slides.tiff_images import SlideImage, find_slide, first_page_is_slide, pages_once
from featurestore.slides.units import unit_microns

SUFFIXES = (".tif", ".tiff", ".btf", ".tf8", ".qptiff")
CACHED_SEGMENTS_PX = 64_000_000
"""Pixels of decoded tiles and strips that are kept: 192 MB, since a strip may be as wide as the slide."""
DEPTH_SEGMENTS = 16
"""Tiles or strips that are looked at to see how many of 16 bits are in use."""
BRIGHT_SHARE = 0.01
"""Share of samples above half of 16 bits that proves all 16 to be in use: glass alone gives far more, and a camera of
14 bits or fewer none."""
PARSE_ERRORS = (
    *(
        tifffile.TiffFileError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        ArithmeticError,
        RuntimeError,
    ),
    *(OSError, AssertionError, MemoryError, struct.error),
)
"""What tifffile raises on damaged headers (2026.3.3)."""


class TiffSlide(PyramidSlide):
    """The slide in a TIFF, of 8 or 16 bits: RGB, grey, palette or CMYK, in one plane or three."""

    def __init__(self, path: str, mpp: float | None) -> None:
        try:
            self._file = tifffile.TiffFile(path)
        except PARSE_ERRORS as error:
            raise SlideError(f"tifffile: {first_line(error)}") from error
        weakref.finalize(self, self._file.close)  # a slide that is dropped leaves no open file
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[int, int], NDArray[np.uint8]] = OrderedDict()
        try:
            self._open(path, mpp)
        except MppError:
            self._file.close()
            raise
        except SlideError as error:
            self._file.close()
            raise SlideError(f"tifffile: {error}") from error
        except PARSE_ERRORS as error:
            self._file.close()
            raise SlideError(f"tifffile: {first_line(error)}") from error

    def _open(self, path: str, mpp: float | None) -> None:
        image = find_slide(self._file)
        self._levels, self._pages = image.levels, image.keyframes
        self._formats = [_format(image, i) for i in range(len(image.levels))]
        file_bytes = self._file.filehandle.size
        for page in self._pages:
            check_pixels(*_segment_size(page), file_bytes)
        sizes = tuple((page.imagewidth, page.imagelength) for page in self._pages)
        super().__init__(
            path,
            sizes,
            *choose_mpp(
                mpp,
                lambda: isotropic_mpp(*image.mpp, path) or _tag_mpp(self._file, self._pages[0], path),
                path,
            ),
        )
        if self._pages[0].dtype == np.uint16:
            self._check_depth()
        self._segment(0, 0)  # a missing codec fails the slide now, with its reason, not each patch later

    def _check_depth(self) -> None:
        """Refuse 16 bits of which fewer are in use, or more than the metadata say.

        Raises
        ------
        SlideError
            If the pixels do not settle it.
        """
        level = len(self._pages) - 1
        count = _segment_count(self._pages[level])
        wanted = np.unique(np.linspace(0, count - 1, min(count, DEPTH_SEGMENTS)).astype(int))
        white, found = self._formats[0].white, [self._samples(level, int(index)) for index in wanted]
        samples = [s for s in found if s is not None]
        total = sum(s.size for s in samples)
        above = sum(int((s > (white or 0x7FFF)).sum()) for s in samples)
        if (white is not None and above) or (white is None and above < BRIGHT_SHARE * total) or not total:
            raise unknown_depth()

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
        samples = self._samples(level, index)
        if samples is not None:
            return self._formats[level].to_rgb(samples)
        # A sparse file's missing tile: nothing was scanned there.
        page = self._pages[level]
        width, height = _segment_size(page)
        across = -(-page.imagewidth // width)
        rows = min(height, page.imagelength - index // across * height)
        return np.full((rows, min(width, page.imagewidth - index % across * width), 3), 255, np.uint8)

    def _samples(self, level: int, index: int) -> NDArray[Any] | None:
        """Decode a tile or strip with all its planes, ``(height, width, samples)``; None if the file holds none."""
        planes = self._levels[level]
        keyframe, count = self._pages[level], _segment_count(self._pages[level])
        if len(planes) == 1 and keyframe.planarconfig != 1:
            # Each sample has segments of its own, one sample after the other.
            wanted = [(planes[0], index + sample * count) for sample in range(keyframe.samplesperpixel)]
        else:
            wanted = [(page, index) for page in planes]
        found = [self._plane(level, keyframe, page, at) for page, at in wanted]
        if any(plane is None for plane in found):
            return None
        return found[0] if len(found) == 1 else np.concatenate([p for p in found if p is not None], axis=2)

    def _plane(self, level: int, keyframe: Any, page: Any, index: int) -> NDArray[Any] | None:
        handle = page.parent.filehandle  # an OME-TIFF may keep planes in other files
        tables = {"jpegtables": page.jpegtables} if page.jpegtables is not None else {}
        try:
            handle.seek(page.dataoffsets[index])
            # No more than the file holds: a count may be anything.
            data = handle.read(min(int(page.databytecounts[index]), handle.size))
            check_stream(data, *_segment_size(keyframe))
            decoded, _, shape = keyframe.decode(data, index, **tables)
        except PARSE_ERRORS as error:
            raise SlideError(
                f"{self._source} cannot be read at level {level}, segment {index}: {first_line(error)}"
            ) from error
        return None if decoded is None else np.asarray(decoded)[0, : shape[1], : shape[2]]

    def close(self) -> None:
        """Free the file handle."""
        self._file.close()


def is_ome(file_or_path: str | BinaryIO) -> bool:
    """Tell whether a file is an OME-TIFF."""
    try:
        with tifffile.TiffFile(file_or_path) as file:
            return bool(file.is_ome)
    except PARSE_ERRORS:
        return False


def _format(image: SlideImage, level: int) -> PixelFormat:
    found = pixel_format(image.keyframes[level], image.significant_bits)
    return found if len(image.levels[level]) == 1 else PixelFormat(RGB, found.white)


def _segment_size(page: Any) -> tuple[int, int]:
    if page.is_tiled:
        return page.tilewidth, page.tilelength
    return page.imagewidth, min(page.rowsperstrip, page.imagelength)


def _segment_count(page: Any) -> int:
    """Tiles or strips of one plane."""
    width, height = _segment_size(page)
    return int(-(-page.imagewidth // width) * -(-page.imagelength // height))


def _tag_mpp(file: tifffile.TiffFile, page: Any, path: str) -> float | None:
    unit = page.tags.get("ResolutionUnit")
    # Values of the TIFF tag ResolutionUnit: inch and centimetre. 1, "none", gives no scale.
    um_per_unit = {2: 25400.0, 3: 10000.0}.get(int(unit.value) if unit else 0)
    if file.is_imagej:
        # ImageJ writes pixels per its own unit into the resolution, and the unit into its description.
        um_per_unit = unit_microns(str((file.imagej_metadata or {}).get("unit", "")).replace("\\u00B5", "µ"))
    values = []
    for name in ("XResolution", "YResolution"):
        tag = page.tags.get(name)
        numerator, denominator = tag.value if tag else (0, 1)
        values.append(um_per_unit * denominator / numerator if um_per_unit and numerator else None)
    return isotropic_mpp(values[0], values[1], path)


def is_for_openslide(path: str) -> bool | None:
    """Tell whether OpenSlide reads a TIFF right; None if it is no TIFF, or too damaged to tell.

    OpenSlide knows the TIFFs of scanners. Of other tiled ones it takes the first page, and of OME-TIFF neither scale
    nor channels.
    """
    try:
        with tifffile.TiffFile(path) as file:
            # Before OpenSlide sees the file: it ends the process where it cannot get the memory that a page claims.
            for page in pages_once(file):
                if getattr(page, "is_tiled", False):
                    check_layout(page)
            vendor = openslide.OpenSlide.detect_format(path)
            return first_page_is_slide(file) if vendor == "generic-tiff" else vendor is not None
    except SlideError:
        return False  # refused by this module's reader, with the reason
    except PARSE_ERRORS:
        return None


def _recognises(path: str) -> Recognition:
    # Only one of both readers has a TIFF: what the right one refuses for its content the other would read wrongly.
    return {True: Recognition.NO, False: Recognition.MINE, None: Recognition.MAYBE}[is_for_openslide(path)]


RECORD = SlideReader(
    "tiff",
    "flat TIFF and OME-TIFF, 8 or 16 bits, RGB, grey, palette or CMYK, through tifffile",
    SUFFIXES,
    TiffSlide,
    30,
    recognises=_recognises,
)
