"""Which tiles a slide is shown in: arithmetic only.

Terms
    tile     a square of the picture at one level, as the page requests it; independent of the file's own tiles
    level    0 is the coarsest, which fits in one tile; each next one has twice the pixels a side
"""

import math
from dataclasses import dataclass
from typing import Any

TILE_PX = 512
MAX_REDUCTION = 16
"""How much coarser than a stored level a tile may be: beyond it, one tile would decode too much of the slide."""


@dataclass(frozen=True)
class TilePyramid:
    """The tiles of one slide.

    Parameters
    ----------
    size_px
        ``(width, height)`` at the finest level.
    mpp
        Microns per pixel there.
    min_level, max_level
        Coarsest level that can be read quickly, and the finest.
    """

    size_px: tuple[int, int]
    mpp: float
    min_level: int
    max_level: int

    @classmethod
    def for_slide(
        cls, size_px: tuple[int, int], mpp: float, level_mpps: tuple[float, ...], finest_mpp: float = 0.0
    ) -> "TilePyramid":
        """Choose the levels of a slide.

        Parameters
        ----------
        size_px, mpp
            Of the slide at level 0.
        level_mpps
            What the file holds.
        finest_mpp
            Leave out levels finer than this.
        """
        # 1e-6: a scale that is an exact power of two away must not be rounded up to the next one.
        halvings = max(0, math.ceil(math.log2(max(finest_mpp, mpp) / mpp) - 1e-6))
        width, height = (math.ceil(side / 2**halvings) for side in size_px)
        finest = mpp * 2**halvings
        max_level = max(0, math.ceil(math.log2(max(width, height) / TILE_PX)))
        # Downwards, as long as one tile of the next coarser level need not be averaged from too many pixels.
        min_level = max_level
        while (
            min_level > 0
            and _reduction(finest * 2 ** (max_level - min_level + 1), level_mpps) <= MAX_REDUCTION
        ):
            min_level -= 1
        return cls((width, height), finest, min_level, max_level)

    def level_px(self, level: int) -> tuple[int, int]:
        """``(width, height)`` of a level."""
        factor = 2 ** (self.max_level - level)
        return math.ceil(self.size_px[0] / factor), math.ceil(self.size_px[1] / factor)

    def level_mpp(self, level: int) -> float:
        """Microns per pixel of a level."""
        return self.mpp * float(2 ** (self.max_level - level))

    def count(self, level: int) -> tuple[int, int]:
        """``(columns, rows)`` of tiles in a level."""
        width, height = self.level_px(level)
        return math.ceil(width / TILE_PX), math.ceil(height / TILE_PX)

    def region_px(self, level: int, col: int, row: int) -> tuple[int, int, int, int]:
        """``(x, y, width, height)`` of a tile in pixels of its level.

        Raises
        ------
        LookupError
            If there is no such tile.
        """
        if not self.min_level <= level <= self.max_level:
            raise LookupError(f"there is no level {level}")
        columns, rows = self.count(level)
        if not (0 <= col < columns and 0 <= row < rows):
            raise LookupError(f"there is no tile {col}, {row} in level {level}")
        width, height = self.level_px(level)
        x, y = col * TILE_PX, row * TILE_PX
        return x, y, min(TILE_PX, width - x), min(TILE_PX, height - y)

    def to_json(self) -> dict[str, Any]:
        """Return what the page needs to request tiles."""
        width, height = self.size_px
        levels = {"min_level": self.min_level, "max_level": self.max_level}
        return {"width": width, "height": height, "mpp": self.mpp, "tile_px": TILE_PX, **levels}


def _reduction(mpp: float, level_mpps: tuple[float, ...]) -> float:
    """How many times finer the level is that `mpp` would be averaged from."""
    # Slack for the rounding of scales in files: the level itself is to count as fine enough.
    return mpp / max((m for m in level_mpps if m <= mpp * 1.000001), default=mpp)
