"""Slides through OpenSlide: SVS, NDPI, MRXS, DICOM, tiled TIFF and more."""

import threading

import numpy as np
import openslide
from numpy.typing import NDArray

from featurestore.errors import SlideError
from featurestore.readers.pyramid import PyramidSlide, check_mpp, isotropic


class OpenSlideSlide(PyramidSlide):
    """A slide behind an OpenSlide handle.

    OpenSlide latches a handle's error for good, so after a failed read the handle is opened anew.
    """

    def __init__(self, path: str, mpp: float | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._handle = _open(path)
        properties = self._handle.properties
        if mpp is None:
            mpp = isotropic(
                _number(properties.get(openslide.PROPERTY_NAME_MPP_X)),
                _number(properties.get(openslide.PROPERTY_NAME_MPP_Y)),
                path,
            )
        super().__init__(path, tuple(self._handle.level_dimensions), check_mpp(mpp, path))
        self._downsamples = tuple(self._handle.level_downsamples)

    def _pixels(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        # OpenSlide takes level-0 coordinates and rounds them down to the level's pixels.
        scale = self._downsamples[level]
        at = (x, y) if level == 0 else (int(np.ceil(x * scale)), int(np.ceil(y * scale)))
        handle = self._handle
        try:
            image = np.asarray(handle.read_region(at, level, (width, height)))
        except openslide.OpenSlideError as error:
            self._reopen(handle)
            raise SlideError(f"{self._path} cannot be read at level {level}, ({x}, {y}): {error}") from error
        return on_white(image)

    def _reopen(self, failed: openslide.OpenSlide) -> None:
        with self._lock:
            if self._handle is failed:
                self._handle = _open(self._path)
                failed.close()

    def close(self) -> None:
        """Free the file handle."""
        self._handle.close()


def _open(path: str) -> openslide.OpenSlide:
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise SlideError("OpenSlide does not know the format") from error
    except openslide.OpenSlideError as error:
        raise SlideError(f"OpenSlide: {error}") from error


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def on_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lay RGBA on white: what a scanner did not record looks like glass."""
    alpha = rgba[..., 3:]
    if alpha.min(initial=255) == 255:
        return np.ascontiguousarray(rgba[..., :3])
    blended = (rgba[..., :3].astype(np.uint16) * alpha + 255 * (255 - alpha.astype(np.uint16)) + 127) // 255
    return blended.astype(np.uint8)
