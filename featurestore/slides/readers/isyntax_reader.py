"""iSyntax of Philips slide scanners, with the package pyisyntax (extra ``isyntax``)."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.errors import SlideError, first_line
from featurestore.slides.pyramid_slide import PyramidSlide, choose_mpp, isotropic_mpp
from featurestore.slides.slide_reader import SlideReader
from featurestore.slides.tiff_colours import on_white

_HEADER_BYTES, _HEADER = 4096, b"<DataObject"


class ISyntaxSlide(PyramidSlide):
    """The picture of an iSyntax file. Its label and macro image are not read.

    Parameters
    ----------
    path
        A local file.
    mpp
        Microns per pixel at level 0; overrides the file's.

    Raises
    ------
    SlideError
        If the package is not installed, or the file is damaged.
    MppError
        If no scale is given.
    """

    def __init__(self, path: str, mpp: float | None) -> None:
        try:
            import isyntax
        except ImportError as error:
            raise SlideError(
                f"{path} needs an extra package ({error}); install it with: pip install 'histosge[isyntax]'"
            ) from error
        # Before the library sees the file, since it prints what it finds wrong in the header (0.1.7).
        with Path(path).open("rb") as file:
            if _HEADER not in file.read(_HEADER_BYTES):
                raise SlideError(f"{path} is no iSyntax file: it does not begin with a DataObject")
        self._path = path
        # One cache of decoded coefficients a handle, which is not made for several threads.
        self._lock = threading.Lock()
        # Its errors derive from Exception alone, and their class is in a private module.
        self._error: type[Exception] = isyntax.lowlevel.libisyntax.LibISyntaxError
        try:
            self._handle: Any = isyntax.ISyntax.open(path)
            sizes = tuple((int(width), int(height)) for width, height in self._handle.level_dimensions)
        except self._error as error:
            raise SlideError(f"{path} is no iSyntax file that can be read: {first_line(error)}") from error
        super().__init__(path, sizes, *choose_mpp(mpp, self._stated, path))

    def _stated(self) -> float | None:
        return isotropic_mpp(self._handle.mpp_x or None, self._handle.mpp_y or None, self._path)

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Return native RGB of a rectangle inside a level."""
        try:
            with self._lock:
                image = self._handle.read_region(x, y, width, height, level)
        except self._error as error:
            raise SlideError(
                f"{self._path} cannot be read at level {level}, ({x}, {y}): {first_line(error)}"
            ) from error
        return on_white(image[..., :3], image[..., 3:])

    def close(self) -> None:
        """Free the file handle."""
        self._handle.close()


RECORD = SlideReader(
    "isyntax", "iSyntax of Philips scanners (extra isyntax)", (".isyntax",), ISyntaxSlide, 50
)
