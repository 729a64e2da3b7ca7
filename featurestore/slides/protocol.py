"""What an opened slide is: size, scale, levels, and pixels at any mpp.

Terms
    size_px     (width, height) at level 0
    mpp         microns per pixel at level 0
    level_px    (width, height) of each stored level, finest first
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

# A 100x objective gives about 0.1, and at 20 no cell is visible. A file that claims 352.8 holds 72 dots per inch, the
# placeholder of picture software.
MPP_RANGE = (0.05, 20.0)
"""Microns per pixel outside this range are a mistake in the file."""


class Slide(Protocol):
    """A whole-slide image, opened."""

    @property
    def source(self) -> str:
        """Return the path or URL that it was opened from, credentials stripped."""
        ...

    @property
    def size_px(self) -> tuple[int, int]:
        """Return ``(width, height)`` at level 0."""
        ...

    @property
    def mpp(self) -> float:
        """Return microns per pixel at level 0."""
        ...

    @property
    def level_mpps(self) -> tuple[float, ...]:
        """Return microns per pixel of each stored level, finest first."""
        ...

    def read_region(
        self, x: int, y: int, width: int, height: int, mpp: float, *, upsample: bool = False
    ) -> NDArray[np.uint8]:
        """Read a rectangle, scaled by area averaging from the coarsest level that is fine enough.

        Parameters
        ----------
        x, y, width, height
            In pixels at the requested `mpp`. Parts beyond the slide are white.
        mpp
            Microns per pixel of the result. A level within 5 % is used as it is when `mpp` equals its own.
        upsample
            Allow a finer scale than the slide holds.

        Returns
        -------
        numpy.ndarray
            RGB, shape ``(height, width, 3)``.

        Raises
        ------
        UpsamplingError
            If `mpp` is finer than the finest level and `upsample` is False.
        SlideError
            If pixels cannot be read or decoded.
        """
        ...

    def close(self) -> None:
        """Free the file handle. Closing twice is allowed."""
        ...
