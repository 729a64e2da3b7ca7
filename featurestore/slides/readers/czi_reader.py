"""CZI of Zeiss slide scanners, with the package pylibCZIrw (extra ``czi``)."""

import threading
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.errors import SlideError, first_line
from featurestore.slides.pyramid_slide import PyramidSlide, choose_mpp, isotropic_mpp
from featurestore.slides.slide_reader import SlideReader
from featurestore.slides.units import parse_number

LATTICE_PX = 512
"""Side of the squares in which levels above 0 are read. The library rounds a request that is not a whole number of the
level's pixels, so a pixel at a place of its own must not depend on the request."""
_WHITE = (1.0, 1.0, 1.0)


class CziSlide(PyramidSlide):
    """The picture of a CZI; where it has several scenes, all of them at their places on the glass.

    Labels and overviews are attachments of the file, and are not read.

    Parameters
    ----------
    path
        A local file.
    mpp
        Microns per pixel at level 0; overrides the file's.

    Raises
    ------
    SlideError
        If the package is not installed, or the file is damaged or not 8-bit RGB.
    MppError
        If no scale is given.
    """

    def __init__(self, path: str, mpp: float | None) -> None:
        try:
            from pylibCZIrw import czi
        except ImportError as error:
            raise SlideError(
                f"{path} needs an extra package ({error}); install it with: pip install 'histosge[czi]'"
            ) from error
        self._path = path
        # The library does not say whether one handle may be read by several threads.
        self._lock = threading.Lock()
        self._open = ExitStack()
        try:
            self._czi: Any = self._open.enter_context(czi.open_czi(path))
            self._ratios = self._find_levels()
        except RuntimeError as error:  # what the library raises for all that is wrong in a file
            raise SlideError(f"{path} is no CZI that can be read: {first_line(error)}") from error
        box = self._czi.total_bounding_rectangle_no_pyramid
        self._corner = (box.x, box.y)
        sizes = tuple((max(box.w // ratio, 1), max(box.h // ratio, 1)) for ratio in self._ratios)
        super().__init__(path, sizes, *choose_mpp(mpp, self._stated, path))

    def _find_levels(self) -> list[int]:
        """Return how many pixels of level 0 a pixel of each stored level covers, finest first."""
        bounds = self._czi.total_bounding_box_no_pyramid
        several = {name: bounds[name][1] for name in "TZC" if bounds.get(name, (0, 1))[1] != 1}
        kinds = set(self._czi.pixel_types.values())
        if kinds != {"Bgr24"} or several:
            raise SlideError(
                f"{self._path} is {', '.join(sorted(kinds)) or 'empty'} with {several or 'one plane'}; a slide is 8-bit RGB "
                "(Bgr24) with one channel, time and depth"
            )
        ratios = {1}

        def note(_: int, block: Any) -> bool:
            across, stored = block.logicalRect.w, block.physicalSize.w
            if stored and across % stored == 0:  # the last block of a row may be rounded
                ratios.add(across // stored)
            return True

        self._czi.enumerate_subblocks(note)
        return sorted(ratios)

    def _stated(self) -> float | None:
        try:
            found = self._czi.metadata["ImageDocument"]["Metadata"]["Scaling"]["Items"]["Distance"]
        except (LookupError, TypeError):
            return None
        metres = {
            one.get("@Id"): parse_number(str(one.get("Value"))) for one in found if isinstance(one, dict)
        }
        x, y = ((metres.get(axis) or 0.0) * 1e6 or None for axis in "XY")
        return isotropic_mpp(x, y, self._path)

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Return native RGB of a rectangle inside a level."""
        if level == 0:
            return self._read(1, x, y, width, height)
        out = np.empty((height, width, 3), np.uint8)
        level_width, level_height = self._sizes[level]
        for top in range(y // LATTICE_PX * LATTICE_PX, y + height, LATTICE_PX):
            for left in range(x // LATTICE_PX * LATTICE_PX, x + width, LATTICE_PX):
                right, bottom = min(left + LATTICE_PX, level_width), min(top + LATTICE_PX, level_height)
                tile = self._read(self._ratios[level], left, top, right - left, bottom - top)
                x0, x1, y0, y1 = max(x, left), min(x + width, right), max(y, top), min(y + height, bottom)
                out[y0 - y : y1 - y, x0 - x : x1 - x] = tile[y0 - top : y1 - top, x0 - left : x1 - left]
        return out

    def _read(self, ratio: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        left, top = self._corner
        region = (left + x * ratio, top + y * ratio, width * ratio, height * ratio)
        try:
            with self._lock:
                pixels = self._czi.read(roi=region, zoom=1 / ratio, background_pixel=_WHITE)
        except RuntimeError as error:
            raise SlideError(f"{self._path} cannot be read at ({x}, {y}): {first_line(error)}") from error
        return np.ascontiguousarray(pixels[:height, :width, ::-1])  # stored as blue, green, red

    def close(self) -> None:
        """Free the file handle."""
        self._open.close()


RECORD = SlideReader("czi", "CZI of Zeiss scanners, 8-bit RGB (extra czi)", (".czi",), CziSlide, 50)
