"""The base class of slide readers: which level to read, white padding, and area-averaged downsampling.

A reader only names its levels and returns native pixels inside a level. A pixel of the result depends
on the slide and its own position alone, never on how the request was cut.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from featurestore.errors import MppError, UpsamplingError
from featurestore.slides.protocol import MPP_RANGE
from featurestore.slides.resampling import area_weights, bin_pixels

# A level's mpp comes from rounded sizes, and a caller computes the one that it requests: their last bits differ.
SAME_SCALE = 1e-6
"""Relative difference of mpp below which native pixels are returned."""
MAX_SIDE_MM, MAX_AREA_MM2 = 250.0, 30_000.0
"""Whole mounts are up to 203 x 127 mm (8 x 5 inches)."""
MAX_SOURCE_PX = 4_000_000
"""Source pixels held at once while downsampling: 48 MB as floats. More is slower, as it leaves the caches."""
BINARY_FACTORS = (2, 4, 8, 16)
"""Scales at which sums of integers give the same bits as the weighted mean, and are faster."""


def check_mpp(mpp: float | None, source: str) -> float:
    """Return a slide's mpp, if it is one that a microscope makes.

    Raises
    ------
    MppError
        If it is missing or absurd, naming both ways to give it.
    """
    fix = "give it with --slide-mpp, or in the sample sheet's mpp column"
    if mpp is None:
        raise MppError(f"{source} does not say its microns per pixel; {fix}")
    low, high = MPP_RANGE
    if not low <= mpp <= high:
        raise MppError(f"{source} claims {mpp:.4g} microns per pixel, outside {low}..{high}; {fix}")
    return float(mpp)


def check_extent(size_px: tuple[int, int], mpp: float, source: str) -> None:
    """Refuse a slide that is larger than glass: a shape or a scale that cannot be, and a grid that fills the memory.

    Raises
    ------
    MppError
        With its size in mm.
    """
    width, height = (side * mpp / 1000 for side in size_px)
    if max(width, height) > MAX_SIDE_MM or width * height > MAX_AREA_MM2:
        raise MppError(
            f"{source} has {size_px[0]} x {size_px[1]} px of {mpp:.4g} microns, which is {width:.0f} x {height:.0f} mm, "
            "more than any glass slide; if its scale is wrong, give it with --slide-mpp, or in the sample sheet's mpp column"
        )


def isotropic_mpp(mpp_x: float | None, mpp_y: float | None, source: str) -> float | None:
    """Return one mpp of two axes.

    Raises
    ------
    MppError
        If they differ by more than 5 %.
    """
    if mpp_x is None or mpp_y is None:
        return mpp_x or mpp_y
    if not (mpp_x > 0 and mpp_y > 0):
        return min(mpp_x, mpp_y)  # absurd, which `check_mpp` says
    # As far apart as a level may be from the requested mpp: patches are squares, and stay nearly square.
    if abs(mpp_x / mpp_y - 1) > 0.05:
        raise MppError(
            f"{source} has {mpp_x:.4g} x {mpp_y:.4g} microns per pixel; give one value with --slide-mpp"
        )
    return (mpp_x + mpp_y) / 2


def choose_mpp(
    given: float | None, find_stated: Callable[[], float | None], source: str
) -> tuple[float, float | None]:
    """Choose between the mpp that a caller gives and the file's own.

    Parameters
    ----------
    given
        Overrides the file's, if it is not None.
    find_stated
        Finds the file's own: None if there is none, `MppError` if it is of no use.

    Returns
    -------
    (float, float or None)
        The slide's mpp, checked; and the file's own, if it is plausible.

    Raises
    ------
    MppError
        If neither is there, or the chosen one is absurd.
    """
    if given is None:
        stated = check_mpp(find_stated(), source)
        return stated, stated
    try:
        return check_mpp(given, source), check_mpp(find_stated(), source)
    except MppError:
        # Raised again if the given one is at fault; what the file claims does not matter then.
        return check_mpp(given, source), None


class PyramidSlide(ABC):
    """A slide as a stack of levels, finest first; a reader adds `read_level` and `close`.

    Parameters
    ----------
    source
        Where it came from.
    level_sizes
        ``(width, height)`` of each level.
    mpp
        Microns per pixel at level 0, checked.
    stated_mpp
        What the file says, if it says anything plausible.
    """

    def __init__(
        self,
        source: str,
        level_sizes: tuple[tuple[int, int], ...],
        mpp: float,
        stated_mpp: float | None = None,
    ) -> None:
        check_extent(level_sizes[0], mpp, source)
        self._source = source
        self._sizes = level_sizes
        self._mpp = mpp
        self._stated_mpp = stated_mpp

    @property
    def source(self) -> str:
        """Where it came from."""
        return self._source

    @property
    def size_px(self) -> tuple[int, int]:
        """``(width, height)`` at level 0."""
        return self._sizes[0]

    @property
    def mpp(self) -> float:
        """Microns per pixel at level 0."""
        return self._mpp

    @property
    def stated_mpp(self) -> float | None:
        """Microns per pixel at level 0 as the file states them; None if it does not, or the reader does not tell."""
        return self._stated_mpp

    @property
    def level_mpps(self) -> tuple[float, ...]:
        """Microns per pixel of each level; the mean of both axes where a level's size was rounded."""
        # From the sizes: every format has them, and tags of the scale of each level few.
        (width, height), mpp = self._sizes[0], self._mpp
        return tuple(mpp * (width / w + height / h) / 2 for w, h in self._sizes)

    @abstractmethod
    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Return native RGB of a rectangle inside a level, ``(height, width, 3)``; called by several threads at once.

        Parameters
        ----------
        level
            Index into the levels, 0 being the finest.
        x, y, width, height
            In pixels of that level; nothing of it lies beyond the level's borders.

        Raises
        ------
        SlideError
            If the pixels cannot be read or decoded.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the file handle."""

    def read_region(
        self, x: int, y: int, width: int, height: int, mpp: float, *, upsample: bool = False
    ) -> NDArray[np.uint8]:
        """Read a rectangle; see `featurestore.slides.protocol.Slide`."""
        level = self._level_for(mpp)
        if level is None and not upsample:
            finest = self.level_mpps[0]
            raise UpsamplingError(
                f"{self._source} holds {finest:.4g} microns per pixel at best; {mpp:.4g} would invent detail, "
                f"ask for {finest:.4g} or more"
            )
        if self._is_native(level or 0, mpp):
            return self._read_native(level or 0, x, y, width, height)
        if level is None:
            return self._read_enlarged(x, y, width, height, mpp)
        return self._read_averaged(level, x, y, width, height, mpp)

    def _level_for(self, mpp: float) -> int | None:
        """Return the coarsest level that is fine enough; None if none is."""
        mpps = self.level_mpps
        finer = [level for level, m in enumerate(mpps) if m <= mpp * (1 + SAME_SCALE)]
        # The coarsest: the fewest pixels to read, and averaging never has to invent any.
        return max(finer, key=lambda i: mpps[i]) if finer else None

    def _is_native(self, level: int, mpp: float) -> bool:
        return abs(self.level_mpps[level] / mpp - 1) <= SAME_SCALE

    def cuts_patches(self, mpp: float) -> bool:
        """Whether `read_patches` is there for this scale, which then costs less than a region that is cut."""
        return False

    def read_patches(self, corners: NDArray[np.int64], side: int, mpp: float) -> NDArray[np.uint8]:
        """Read squares, each pixel copied once; `read_region` of each gives the same.

        Parameters
        ----------
        corners
            ``(x, y)`` of each, in pixels at `mpp`, shape ``(n, 2)``; rows of squares downwards, left to right.
        side
            Of a square, pixels.

        Returns
        -------
        numpy.ndarray
            RGB, shape ``(n, side, side, 3)``.

        Raises
        ------
        SlideError
            If any of them cannot be read.
        """
        return np.stack([self.read_region(int(x), int(y), side, side, mpp) for x, y in corners])

    def _read_native(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Return native pixels, white where the rectangle leaves the level."""
        level_width, level_height = self._sizes[level]
        x0, y0 = max(x, 0), max(y, 0)
        x1, y1 = min(x + width, level_width), min(y + height, level_height)
        if (x0, y0, x1, y1) == (x, y, x + width, y + height):
            return self.read_level(level, x, y, width, height)
        out = np.full((height, width, 3), 255, np.uint8)
        if x0 < x1 and y0 < y1:
            out[y0 - y : y1 - y, x0 - x : x1 - x] = self.read_level(level, x0, y0, x1 - x0, y1 - y0)
        return out

    def _scale(self, level: int, mpp: float) -> tuple[float, float]:
        """Pixels of a level under one pixel at `mpp`, ``(across, down)``."""
        (width, height), (w, h) = self._sizes[0], self._sizes[level]
        return mpp / self._mpp * w / width, mpp / self._mpp * h / height

    def _read_averaged(
        self, level: int, x: int, y: int, width: int, height: int, mpp: float
    ) -> NDArray[np.uint8]:
        scale_x, scale_y = self._scale(level, mpp)
        if scale_x == scale_y and scale_x in BINARY_FACTORS:
            return self._read_binned(level, x, y, width, height, int(scale_x))
        across, left = area_weights(x, width, scale_x)
        out = np.empty((height, width, 3), np.uint8)
        # In strips of rows: memory stays bounded, however large the request and however fine the level.
        step = max(1, int(MAX_SOURCE_PX / max(1, across.shape[1]) / scale_y))
        for first in range(0, height, step):
            rows = min(step, height - first)
            down, top = area_weights(y + first, rows, scale_y)
            source = self._read_native(level, left, top, across.shape[1], down.shape[1])
            # Down first, then across: two sparse products of one axis each cost far less than one of both.
            columns = down @ source.reshape(down.shape[1], -1).astype(np.float32)
            columns = (
                columns.reshape(rows, across.shape[1], 3).transpose(1, 0, 2).reshape(across.shape[1], -1)
            )
            mean = (across @ columns).reshape(width, rows, 3).transpose(1, 0, 2)
            out[first : first + rows] = np.clip(np.floor(mean + 0.5), 0, 255).astype(np.uint8)
        return out

    def _read_binned(
        self, level: int, x: int, y: int, width: int, height: int, factor: int
    ) -> NDArray[np.uint8]:
        """Return means of `factor` x `factor` pixels of a level; the rectangle in pixels of the result."""
        out = np.empty((height, width, 3), np.uint8)
        step = max(1, MAX_SOURCE_PX // (width * factor * factor))
        for first in range(0, height, step):
            rows = min(step, height - first)
            source = self._read_native(level, x * factor, (y + first) * factor, width * factor, rows * factor)
            out[first : first + rows] = bin_pixels(source, factor)
        return out

    def _read_enlarged(self, x: int, y: int, width: int, height: int, mpp: float) -> NDArray[np.uint8]:
        """Return nearest level-0 pixels: it invents nothing but size."""
        scale_x, scale_y = self._scale(0, mpp)
        xs = np.floor((x + np.arange(width) + 0.5) * scale_x).astype(int)
        ys = np.floor((y + np.arange(height) + 0.5) * scale_y).astype(int)
        source = self._read_native(0, xs[0], ys[0], xs[-1] - xs[0] + 1, ys[-1] - ys[0] + 1)
        return source[np.ix_(ys - ys[0], xs - xs[0])]
