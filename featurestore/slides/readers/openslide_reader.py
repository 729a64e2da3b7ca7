"""Slides through OpenSlide: SVS, NDPI, MRXS, DICOM, tiled TIFF and more."""

import threading

import numpy as np
import openslide
from numpy.typing import NDArray

from featurestore.errors import SlideError
from featurestore.slides.pyramid_slide import PyramidSlide, choose_mpp, isotropic_mpp
from featurestore.slides.readers.tiff_reader import SUFFIXES as TIFF_SUFFIXES
from featurestore.slides.readers.tiff_reader import is_for_openslide
from featurestore.slides.slide_reader import Recognition, SlideReader
from featurestore.slides.tiff_colours import on_white
from featurestore.slides.units import parse_number

LATTICE_PX = 512
"""Side of the squares in which levels above 0 are read: two tiles of the usual 256 px, so that few are decoded twice."""


class OpenSlideSlide(PyramidSlide):
    """A slide behind an OpenSlide handle.

    OpenSlide latches a handle's error for good, so after a failed read the handle is opened anew. A read that fails is
    repeated on a handle of its own: the error may be that of another thread, whose tile is damaged.
    """

    def __init__(self, path: str, mpp: float | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._handle = open_handle(path)
        super().__init__(path, tuple(self._handle.level_dimensions), *handle_mpp(self._handle, mpp, path))
        self._downsamples = tuple(self._handle.level_downsamples)

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Return native RGB of a rectangle inside a level."""
        if level == 0:
            return self._read(0, x, y, width, height)
        # Coarser levels are addressed in level-0 pixels, and where the ratio is not whole OpenSlide shifts by
        # fractions. Read on a fixed lattice, a pixel at least does not depend on the request.
        out = np.empty((height, width, 3), np.uint8)
        level_width, level_height = self._sizes[level]
        for top in range(y // LATTICE_PX * LATTICE_PX, y + height, LATTICE_PX):
            for left in range(x // LATTICE_PX * LATTICE_PX, x + width, LATTICE_PX):
                right, bottom = min(left + LATTICE_PX, level_width), min(top + LATTICE_PX, level_height)
                tile = self._read(level, left, top, right - left, bottom - top)
                x0, x1, y0, y1 = max(x, left), min(x + width, right), max(y, top), min(y + height, bottom)
                out[y0 - y : y1 - y, x0 - x : x1 - x] = tile[y0 - top : y1 - top, x0 - left : x1 - left]
        return out

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        scale = self._downsamples[level]
        at = (round(x * scale), round(y * scale))  # `read_region` takes the corner in level-0 pixels
        handle = self._handle
        try:
            image = np.asarray(handle.read_region(at, level, (width, height)))
        except openslide.OpenSlideError:
            own = open_handle(self._path)
            try:
                image = np.asarray(own.read_region(at, level, (width, height)))
            except openslide.OpenSlideError as error:
                own.close()
                self._replace(handle, open_handle(self._path))
                raise SlideError(
                    f"{self._path} cannot be read at level {level}, ({x}, {y}): {error}"
                ) from error
            self._replace(handle, own)
        return on_white(image[..., :3], image[..., 3:])

    def _replace(self, failed: openslide.OpenSlide, fresh: openslide.OpenSlide) -> None:
        # Several threads may have failed on one handle: the first of them replaces it.
        with self._lock:
            if self._handle is failed:
                # The failed one is not closed here: another thread may be reading from it, which ends the process.
                # The last that lets go of it closes it.
                self._handle = fresh
                return
        fresh.close()

    def close(self) -> None:
        """Free the file handle."""
        self._handle.close()


def open_handle(path: str) -> openslide.OpenSlide:
    """Open a file with OpenSlide.

    Raises
    ------
    SlideError
        If OpenSlide cannot.
    """
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise SlideError("OpenSlide does not know the format") from error
    except openslide.OpenSlideError as error:
        raise SlideError(f"OpenSlide: {error}") from error


def handle_mpp(handle: openslide.OpenSlide, mpp: float | None, path: str) -> tuple[float, float | None]:
    """Return microns per pixel at level 0, as given or as OpenSlide finds it in the file; and as the file states it.

    Raises
    ------
    MppError
        If it is neither given nor in the file, or absurd.
    """
    properties = handle.properties
    found = [
        _number(properties.get(name))
        for name in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)
    ]
    return choose_mpp(mpp, lambda: isotropic_mpp(found[0], found[1], path), path)


def _number(text: str | None) -> float | None:
    return parse_number(text or "")


def _recognises(path: str) -> Recognition:
    # OpenSlide goes by the content, so it is tried on any name.
    return Recognition.NO if is_for_openslide(path) is False else Recognition.MAYBE


SUFFIXES = (*TIFF_SUFFIXES, ".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".dcm")
RECORD = SlideReader(
    "openslide",
    "SVS, NDPI, MRXS, SCN, BIF, VMS, DICOM, tiled TIFF through OpenSlide",
    SUFFIXES,
    OpenSlideSlide,
    20,
    recognises=_recognises,
)
