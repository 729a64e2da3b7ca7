"""JPEG tiles of TIFF and Aperio SVS, decoded straight from the file: several times faster than OpenSlide.

OpenSlide opens the file once, for the levels and the scale, and is the oracle of the tests: native pixels equal its
own. What could differ from it (JPEG 2000, other codecs, strips, other vendors' layouts) is refused.

Tiles are decoded by simplejpeg with headers put together here, not by tifffile's `TiffPage.decode` (2026.3.3, with
imagecodecs 2026.3.6): that returns a tile that is cut off without an error, with grey where pixels are missing; it takes
RGB streams without a JFIF marker for YCbCr; and it needs 2 to 9 % (an SVS, 240 px tiles) or 20 to 45 % (a TIFF, 256 px
tiles) more processor time.

Terms
    tile     a rectangle of one level that the file holds as one JPEG stream
    tables   quantisation and Huffman tables that a level's tiles share, stored once
"""

import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import tifffile
from numpy.typing import NDArray

from featurestore.errors import MppError, SlideAccessError, SlideError, SlideNotFoundError, first_line
from featurestore.slides.fetch_meter import FetchMeter
from featurestore.slides.jpeg_stream import decode_stream, stream_body, stream_header
from featurestore.slides.picture_bounds import check_layout
from featurestore.slides.protocol import Slide
from featurestore.slides.pyramid_slide import BINARY_FACTORS, PyramidSlide
from featurestore.slides.range_reader import RangedFile, SparseCopy
from featurestore.slides.readers.openslide_reader import handle_mpp, open_handle
from featurestore.slides.readers.tiff_reader import PARSE_ERRORS, is_for_openslide, is_ome
from featurestore.slides.resampling import bin_pixels
from featurestore.slides.slide_reader import Recognition, SlideReader
from featurestore.slides.tiff_images import first_page_is_slide, pages_once

SUFFIXES = (".svs", ".tif", ".tiff", ".btf", ".tf8", ".qptiff")
# Other vendors' TIFFs overlap their tiles or leave some out, each in its way; OpenSlide knows them.
VENDORS = ("aperio", "generic-tiff")
DIRECTORY_READ_BYTES = 256 << 10
"""Read ahead of a remote file while its directories are parsed: tifffile reads a few bytes at a time, and without
this each read could be a request."""
CACHED_PX = 12_000_000
"""Pixels of decoded tiles that are kept: 36 MB, three rows of 256 px tiles under a block 64 patches wide."""
# Patches overlap by less than their side, and sides are 224 or 256 px as a rule.
OVERLAP_PX = 256
"""How far the next request, to the right or below, may reach back into this one: its tiles are kept."""
LARGE_TILE_BYTES = 1 << 20
"""Beyond it a tile's size is compared with the file's before it is read; a tile of 256 px has 10 to 40 kB."""
_JPEG, _RGB, _YCBCR = 7, 2, 6


@dataclass(frozen=True)
class _Level:
    """Where a level's tiles are in the file, row-major, and what goes before each one's stream."""

    tile_px: tuple[int, int]
    across: int
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]
    header: bytes
    rgb: bool


class TileBytes(Protocol):
    """Where the compressed tiles are read from."""

    def read(self, parts: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of parts ``(offset, bytes)``."""
        ...


class JpegTileSlide(PyramidSlide):
    """A slide of JPEG tiles. Threads may read at once.

    Parameters
    ----------
    path
        The file, or a sparse copy of it that holds its directories.
    mpp
        Microns per pixel at level 0, if it is given.
    remote
        Where the tiles are, if the path is a sparse copy; named `source`.
    directories
        The same file as a stream that fetches what it lacks.
    """

    def __init__(
        self,
        path: str,
        mpp: float | None,
        *,
        remote: TileBytes | None = None,
        directories: BinaryIO | None = None,
        source: str | None = None,
    ) -> None:
        # The directories are read first: where they are fetched from afar, OpenSlide finds them in the copy.
        if directories is not None:
            _read_directories(directories)
        handle = open_handle(path)
        try:
            vendor = handle.properties.get("openslide.vendor")
            if vendor not in VENDORS:
                raise SlideError(f"JPEG tiles: not read from {vendor}")
            sizes = tuple(handle.level_dimensions)
            levels = _find_levels(directories or path, sizes, is_generic=vendor == "generic-tiff")
            if vendor == "aperio" and any((level.counts == 0).any() for level in levels):
                raise SlideError("JPEG tiles: some are missing; OpenSlide redraws theirs from finer levels")
            label = source or path
            super().__init__(label, sizes, *handle_mpp(handle, mpp, label))
        finally:
            handle.close()
        self._levels = levels
        self._cache = _TileCache(CACHED_PX)
        self._remote = remote
        self.meter = getattr(remote, "meter", None) or FetchMeter()
        self._fetched = threading.local()
        self._file = None if remote else Path(path).open("rb", buffering=0)  # noqa: SIM115  # open as long as the slide
        if self._file is not None:
            weakref.finalize(self, self._file.close)  # a slide that is dropped leaves no open file

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Return native RGB of a rectangle inside a level."""
        return self._assemble(level, x, y, width, height, 1)

    def _read_binned(
        self, level: int, x: int, y: int, width: int, height: int, factor: int
    ) -> NDArray[np.uint8]:
        level_width, level_height = self._sizes[level]
        inside = (
            x >= 0
            and y >= 0
            and (x + width) * factor <= level_width
            and (y + height) * factor <= level_height
        )
        # Squares of pixels that cross a tile's edge are left to the base class.
        if inside and not any(side % factor for side in self._levels[level].tile_px):
            return self._assemble(level, x, y, width, height, factor)
        return super()._read_binned(level, x, y, width, height, factor)

    def _assemble(
        self, level: int, x: int, y: int, width: int, height: int, factor: int
    ) -> NDArray[np.uint8]:
        """Put a rectangle together, each tile binned by `factor` while it is in the caches; in binned pixels."""
        layout = self._levels[level]
        tile_width, tile_height = layout.tile_px[0] // factor, layout.tile_px[1] // factor
        margin = OVERLAP_PX // factor
        out = np.empty((height, width, 3), np.uint8)
        rows = range(y // tile_height, -(-(y + height) // tile_height))
        cols = range(x // tile_width, -(-(x + width) // tile_width))
        if self._remote is not None:
            self._fetch(level, [row * layout.across + col for row in rows for col in cols])
        for row in rows:
            top = row * tile_height
            y0, y1 = max(y, top), min(y + height, top + tile_height)
            # Tiles whole within this request are not kept: requests go right and down, so nobody comes back for them.
            passed = y <= top and top + tile_height + margin <= y + height
            for col in cols:
                left = col * tile_width
                x0, x1 = max(x, left), min(x + width, left + tile_width)
                done = passed and x <= left and left + tile_width + margin <= x + width
                tile = self._tile(level, row * layout.across + col, keep=not done)
                part = tile[
                    (y0 - top) * factor : (y1 - top) * factor, (x0 - left) * factor : (x1 - left) * factor
                ]
                out[y0 - y : y1 - y, x0 - x : x1 - x] = part if factor == 1 else bin_pixels(part, factor)
        return out

    def cuts_patches(self, mpp: float) -> bool:
        """Whether patches can be cut from the tiles: of a local file, at a level's own scale or binned squares of it."""
        # Of a remote one regions are read, as large as possible: each is one round of requests.
        return self._remote is None and self._binning(mpp) is not None

    def _binning(self, mpp: float) -> tuple[int, int] | None:
        """Return the level and the factor by which its tiles are binned for a scale; None if they cannot be."""
        level = self._level_for(mpp)
        if level is None:
            return None
        if self._is_native(level, mpp):
            return level, 1
        scale_x, scale_y = self._scale(level, mpp)
        whole = not any(side % scale_x for side in self._levels[level].tile_px)
        return (level, int(scale_x)) if scale_x == scale_y and scale_x in BINARY_FACTORS and whole else None

    def read_patches(self, corners: NDArray[np.int64], side: int, mpp: float) -> NDArray[np.uint8]:
        """Read squares: each tile is decoded and binned once, and each pixel copied once from its tile to its patch."""
        binning = self._binning(mpp)
        if binning is None or not len(corners):
            return super().read_patches(corners, side, mpp)
        level, factor = binning
        layout = self._levels[level]
        width, height = (size // factor for size in self._sizes[level])
        tile_width, tile_height = layout.tile_px[0] // factor, layout.tile_px[1] // factor
        out = np.empty((len(corners), side, side, 3), np.uint8)
        users: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for number, (x, y) in enumerate(corners.tolist()):
            if min(x, y) < 0 or x + side > width or y + side > height:
                out[number] = self.read_region(x, y, side, side, mpp)
                continue
            for row in range(y // tile_height, (y + side - 1) // tile_height + 1):
                for col in range(x // tile_width, (x + side - 1) // tile_width + 1):
                    users.setdefault((row, col), []).append((number, x, y))
        (first_x, first_y), (last_x, last_y) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
        for (row, col), patches in sorted(users.items()):
            top, left = row * tile_height, col * tile_width
            # Later patches are to the right or below: each begins at `last_x` or `last_y` at the least, so what ends
            # before these is not read again.
            passed = first_y <= top and top + tile_height <= last_y
            done = passed and first_x <= left and left + tile_width <= last_x
            tile = self._tile(level, row * layout.across + col, keep=not done)
            if factor > 1:
                tile = bin_pixels(tile, factor)
            for number, x, y in patches:
                y0, y1 = max(y, top), min(y + side, top + tile_height)
                x0, x1 = max(x, left), min(x + side, left + tile_width)
                out[number, y0 - y : y1 - y, x0 - x : x1 - x] = tile[
                    y0 - top : y1 - top, x0 - left : x1 - left
                ]
        return out

    def _tile(self, level: int, index: int, *, keep: bool) -> NDArray[np.uint8]:
        """Return a tile; one that is not kept is valid until this thread's next call."""
        tile = self._cache.get((level, index))
        if tile is None:
            tile = self._decode_tile(
                level, index, self._cache.scratch(self._levels[level].tile_px, keep=keep)
            )
            if keep:
                self._cache.put((level, index), tile)
        return tile

    def _fetch(self, level: int, indexes: list[int]) -> None:
        """Fetch the tiles of one request that are not decoded yet, together; this thread decodes them next."""
        layout = self._levels[level]
        lacking = [i for i in indexes if layout.counts[i] and self._cache.get((level, i)) is None]
        parts = [(int(layout.offsets[i]), int(layout.counts[i])) for i in lacking]
        found = self._remote.read(parts) if self._remote is not None and parts else []
        self._fetched.tiles = dict(zip(((level, i) for i in lacking), found, strict=True))

    def _compressed(self, level: int, index: int) -> bytes:
        layout = self._levels[level]
        offset, count = int(layout.offsets[index]), int(layout.counts[index])
        if self._file is not None:
            if count > LARGE_TILE_BYTES:
                # No more than there is: a count in a damaged file may be anything, and its memory would be taken first.
                count = min(count, max(0, os.fstat(self._file.fileno()).st_size - offset))
            begun = time.perf_counter()
            data = os.pread(self._file.fileno(), count, offset)
            self.meter.add(time.perf_counter() - begun, len(data))
            return data
        # Missing only where another thread's tile left the cache since `_fetch` looked: it is then fetched alone.
        held: dict[tuple[int, int], bytes] = getattr(self._fetched, "tiles", {})
        fetched = held.pop((level, index), None)
        if fetched is None and self._remote is not None:
            (fetched,) = self._remote.read([(offset, count)])
        return fetched or b""

    def _decode_tile(self, level: int, index: int, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
        layout = self._levels[level]
        count = int(layout.counts[index])
        if count == 0:
            out[:] = 255  # never scanned; OpenSlide shows it transparent
            return out
        try:
            data = self._compressed(level, index)
            # Before decoding: of a short stream libjpeg would only report that it ends early, not that the file does.
            if len(data) < count:
                raise ValueError("the file ends within it")
            tile = decode_stream(layout.header + stream_body(data, rgb=layout.rgb), out)
            if tile.shape != out.shape:
                raise ValueError(f"it holds {tile.shape[1]} x {tile.shape[0]} px")
        except SlideAccessError:
            raise  # a refusal of the server's concerns the whole slide, not this tile
        except (ValueError, OSError) as error:
            raise SlideError(
                f"{self._source} cannot be read at level {level}, tile {index}: {error}"
            ) from error
        return tile

    def close(self) -> None:
        """Free the file handle."""
        if self._file is not None:
            self._file.close()


def _read_directories(directories: BinaryIO) -> None:
    """Read every directory of a TIFF with the values of its tags."""
    directories.seek(0)
    try:
        with tifffile.TiffFile(directories) as file:
            for page in pages_once(file):
                for tag in getattr(page, "tags", ()):
                    _ = tag.value
                if getattr(page, "is_tiled", False):
                    check_layout(page)  # before OpenSlide sees the copy
    except SlideError:
        raise
    except PARSE_ERRORS as error:
        raise SlideError(f"JPEG tiles: tifffile: {first_line(error)}") from error


class _TileCache:
    """The latest tiles, up to a number of pixels, and each thread's buffer for those that are not kept."""

    def __init__(self, max_px: int) -> None:
        self._max_px = max_px
        self._held_px = 0
        self._lock = threading.Lock()
        self._tiles: OrderedDict[tuple[int, int], NDArray[np.uint8]] = OrderedDict()
        self._own = threading.local()

    def get(self, key: tuple[int, int]) -> NDArray[np.uint8] | None:
        with self._lock:
            tile = self._tiles.get(key)
            if tile is not None:
                self._tiles.move_to_end(key)
            return tile

    def put(self, key: tuple[int, int], tile: NDArray[np.uint8]) -> None:
        with self._lock:
            if key in self._tiles:  # another thread was faster
                return
            self._tiles[key] = tile
            self._held_px += tile.shape[0] * tile.shape[1]
            while self._held_px > self._max_px and len(self._tiles) > 1:
                _, old = self._tiles.popitem(last=False)
                self._held_px -= old.shape[0] * old.shape[1]

    def scratch(self, tile_px: tuple[int, int], *, keep: bool) -> NDArray[np.uint8]:
        shape = (tile_px[1], tile_px[0], 3)
        if keep:
            return np.empty(shape, np.uint8)
        buffer: NDArray[np.uint8] | None = getattr(self._own, "buffer", None)
        if buffer is None or buffer.shape != shape:
            buffer = self._own.buffer = np.empty(shape, np.uint8)
        return buffer


def _find_levels(
    path: str | BinaryIO, sizes: tuple[tuple[int, int], ...], *, is_generic: bool
) -> list[_Level]:
    """Find the page of each level that OpenSlide reports: the only tiled one of that size."""
    if not isinstance(path, str):
        path.seek(0)
    try:
        with tifffile.TiffFile(path) as file:
            if is_generic and not first_page_is_slide(file):
                raise SlideError("JPEG tiles: the first page is not the slide in plain RGB")
            every: list[Any] = list(pages_once(file))
            # In an SVS thumbnail, label and macro are in strips; what is tiled and of a level's size is that level.
            tiled = [page for page in every if page.is_tiled]
            pages = [[p for p in tiled if (p.imagewidth, p.imagelength) == size] for size in sizes]
            for size, found in zip(sizes, pages, strict=True):
                if len(found) != 1:
                    raise SlideError(
                        f"JPEG tiles: {len(found)} pages of {size[0]} x {size[1]} px; one is needed"
                    )
            return [_tile_layout(found[0]) for found in pages]
    except SlideError:
        raise
    except PARSE_ERRORS as error:
        raise SlideError(f"JPEG tiles: tifffile: {first_line(error)}") from error


def _tile_layout(page: Any) -> _Level:
    form = (int(page.compression), int(page.photometric), int(page.planarconfig), page.samplesperpixel)
    if form not in ((_JPEG, _RGB, 1, 3), (_JPEG, _YCBCR, 1, 3)) or page.dtype != np.uint8:
        raise SlideError(
            f"JPEG tiles: a level has codec {form[0]}, photometric {form[1]}, planar {form[2]}, {form[3]} x {page.dtype}"
        )
    width, height = page.tilewidth, page.tilelength
    across, down = -(-page.imagewidth // width), -(-page.imagelength // height)
    offsets, counts = (np.array(values, np.int64) for values in (page.dataoffsets, page.databytecounts))
    if not len(offsets) == len(counts) == across * down:
        raise SlideError(f"JPEG tiles: {len(offsets)} of {across * down} are listed")
    rgb = form[1] == _RGB
    header = stream_header(page.jpegtables, rgb=rgb)
    return _Level((width, height), across, offsets, counts, header, rgb)


def _recognises(path: str) -> Recognition:
    suffix = Path(path).suffix.lower()
    # OpenSlide, whose levels are taken here, would take an OME-TIFF as a plain one, without mpp or pyramid.
    if suffix not in SUFFIXES or is_for_openslide(path) is False:
        return Recognition.NO
    return Recognition.MAYBE


def _open_in_parts(url: str, mpp: float | None) -> Slide | None:
    """Open a remote slide of JPEG tiles without fetching it; None if it is none, or its server serves no parts."""
    suffix = Path(url.partition("?")[0]).suffix.lower()
    try:
        remote = RangedFile(url)
        with SparseCopy(remote, suffix) as copy:
            directories = BufferedReader(copy, DIRECTORY_READ_BYTES)
            if is_ome(directories):
                return None
            return JpegTileSlide(
                str(copy.path), mpp, remote=remote, directories=directories, source=remote.label
            )
    except (MppError, SlideNotFoundError):
        raise
    except SlideError:
        return None


RECORD = SlideReader(
    "jpeg-tiles",
    "JPEG-tiled TIFF and Aperio SVS, local or remote, several times faster than OpenSlide",
    SUFFIXES,
    JpegTileSlide,
    10,
    recognises=_recognises,
    open_url=_open_in_parts,
)
