"""Slides through OpenSlide: SVS, NDPI, MRXS, DICOM, tiled TIFF and more."""

import threading

import numpy as np
import openslide
from numpy.typing import NDArray

from featurestore.errors import SlideError
from featurestore.slides.pyramid_slide import PyramidSlide, check_mpp, isotropic_mpp
from featurestore.slides.slide_reader import Recognition, SlideReader

LATTICE_PX = 512
"""Side of the squares in which levels above 0 are read: two tiles of the usual 256 px, so that few are decoded twice."""


class OpenSlideSlide(PyramidSlide):
    """A slide behind an OpenSlide handle.

    OpenSlide latches a handle's error for good, so after a failed read the handle is opened anew.
    """

    def __init__(self, path: str, mpp: float | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._handle = open_handle(path)
        super().__init__(path, tuple(self._handle.level_dimensions), handle_mpp(self._handle, mpp, path))
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
        except openslide.OpenSlideError as error:
            self._reopen(handle)
            raise SlideError(f"{self._path} cannot be read at level {level}, ({x}, {y}): {error}") from error
        return on_white(image)

    def _reopen(self, failed: openslide.OpenSlide) -> None:
        # Several threads may have failed on one handle: the first of them replaces it.
        with self._lock:
            if self._handle is failed:
                self._handle = open_handle(self._path)
                failed.close()

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


def handle_mpp(handle: openslide.OpenSlide, mpp: float | None, path: str) -> float:
    """Return microns per pixel at level 0: as given, or as OpenSlide finds it in the file.

    Raises
    ------
    MppError
        If it is neither given nor in the file, or absurd.
    """
    if mpp is None:
        properties = handle.properties
        mpp = isotropic_mpp(
            _number(properties.get(openslide.PROPERTY_NAME_MPP_X)),
            _number(properties.get(openslide.PROPERTY_NAME_MPP_Y)),
            path,
        )
    return check_mpp(mpp, path)


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def on_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lay RGBA on white: areas that a scanner did not record look like glass."""
    alpha = rgba[..., 3:]
    if alpha.min(initial=255) == 255:
        return np.ascontiguousarray(rgba[..., :3])
    # In integers, with 127 for rounding: the same bits on every machine.
    blended = (rgba[..., :3].astype(np.uint16) * alpha + 255 * (255 - alpha.astype(np.uint16)) + 127) // 255
    return blended.astype(np.uint8)


RECORD = SlideReader(
    "openslide",
    "SVS, NDPI, MRXS, SCN, BIF, VMS, DICOM, tiled TIFF through OpenSlide",
    (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".dcm"),
    OpenSlideSlide,
    20,
    # OpenSlide goes by the content, so it is tried on any name.
    recognises=lambda path: Recognition.MAYBE,
)
