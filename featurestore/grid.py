"""Where each patch of a slide sits, and at what scale.

`PatchGrid` is the only place that converts a patch's (row, col) to slide pixels. It is
arithmetic alone: it opens no image and touches no store, so its tests run in milliseconds.

Terms
    patch        (row, col) in the grid; row grows downwards
    pixel        (x, y) at level 0 of the slide; origin top-left, y grows downwards
    mpp          microns per pixel: requested (`mpp`), of the slide's level 0 (`slide_mpp`),
                 and the one at which patches are read (`effective_mpp`)
"""

from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

# Scanners write 0.499 or 0.2525 for 20x and 40x, and pyramids round their sizes: such a level is the one meant.
LEVEL_TOLERANCE = 0.05
"""A level whose mpp differs from the requested one by this share at most is read as it is, without resampling."""


@dataclass(frozen=True)
class GridSpec:
    """What a user requests: the same for every slide of a cohort.

    Parameters
    ----------
    mpp
        Microns per pixel of the patches.
    patch_px, stride_px
        Side of a patch, and step from one to the next, in pixels at `mpp`.
    """

    mpp: float = 0.5
    patch_px: int = 224
    stride_px: int = 224

    def __post_init__(self) -> None:
        if not self.mpp > 0 or self.patch_px <= 0 or self.stride_px <= 0:
            raise ValueError(
                f"a grid needs positive mpp, patch and stride, not {self.mpp}, {self.patch_px}, {self.stride_px}"
            )

    @property
    def key(self) -> str:
        """The grid's label in a store, such as ``mpp0.5000_px224_stride112``."""
        # The requested mpp, not the effective one: slides of several scanners share one key.
        return f"mpp{self.mpp:.4f}_px{self.patch_px}_stride{self.stride_px}"


class OffsetGridSpec(GridSpec):
    """A grid whose patch (0, 0) lies elsewhere than at the slide's corner: of imported embeddings.

    A class without a field of its own: a model that was trained on such a grid can be used on any of equal patches.
    """

    @property
    def key(self) -> str:
        """The grid's label in a store, such as ``mpp0.5000_px224_stride224_offset``."""
        # Without the offset itself: it differs from slide to slide, and slides with one key are trained on together.
        return f"{super().key}_offset"


@dataclass(frozen=True)
class PatchGrid:
    """The regular lattice of patches over one slide.

    The corner of patch (0, 0) is pixel `origin_px` of level 0, ``(x, y)``: (0, 0) unless the embeddings were imported.
    Only whole patches are kept, unless the slide is smaller than one patch: then there is one, padded.
    """

    spec: GridSpec
    slide_mpp: float
    effective_mpp: float
    n_rows: int
    n_cols: int
    origin_px: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        if isinstance(self.spec, OffsetGridSpec) != any(self.origin_px):
            raise ValueError(f"a grid with key {self.spec.key} cannot begin at pixel {self.origin_px}")

    @classmethod
    def for_slide(
        cls,
        size_px: tuple[int, int],
        slide_mpp: float,
        level_mpps: tuple[float, ...],
        spec: GridSpec,
        origin_px: tuple[float, float] = (0.0, 0.0),
    ) -> Self:
        """Lay a grid over a slide.

        Parameters
        ----------
        size_px
            The slide's ``(width, height)`` at level 0.
        slide_mpp
            Microns per pixel at level 0.
        level_mpps
            Microns per pixel of every level that the slide holds.
        spec
            What was requested.
        origin_px
            Corner ``(x, y)`` of patch (0, 0), at level 0.
        """
        nearest = min(level_mpps, key=lambda m: abs(m / spec.mpp - 1))
        effective = nearest if abs(nearest / spec.mpp - 1) <= LEVEL_TOLERANCE else spec.mpp
        # Rounding guards against 0.25 / 0.5 * 4000 = 1999.9999 losing a row of patches.
        width, height = (
            int(np.floor(round((side - start) * slide_mpp / effective, 6)))
            for side, start in zip(size_px, origin_px, strict=True)
        )

        def count(side: int) -> int:
            return max(1, (side - spec.patch_px) // spec.stride_px + 1)

        return cls(spec, slide_mpp, effective, count(height), count(width), origin_px)

    @property
    def shape(self) -> tuple[int, int]:
        """Patches in the grid, ``(n_rows, n_cols)``."""
        return self.n_rows, self.n_cols

    @property
    def patch_um(self) -> float:
        """Side of a patch in microns."""
        return self.spec.patch_px * self.effective_mpp

    @property
    def stride_um(self) -> float:
        """Step from one patch to the next in microns."""
        return self.spec.stride_px * self.effective_mpp

    @property
    def y_um(self) -> NDArray[np.float64]:
        """Patch centres down the slide, microns from its top edge, shape ``(n_rows,)``."""
        return self._centres(self.n_rows) + self.origin_um[1]

    @property
    def x_um(self) -> NDArray[np.float64]:
        """Patch centres across the slide, microns from its left edge, shape ``(n_cols,)``."""
        return self._centres(self.n_cols) + self.origin_um[0]

    def _centres(self, n: int) -> NDArray[np.float64]:
        # At the effective mpp: where patches lie on the tissue, not where the request would have put them.
        return (
            np.arange(n, dtype=np.float64) * self.spec.stride_px + self.spec.patch_px / 2
        ) * self.effective_mpp

    @property
    def origin_um(self) -> tuple[float, float]:
        """Corner ``(x, y)`` of patch (0, 0), microns from the slide's top-left."""
        return self.origin_px[0] * self.slide_mpp, self.origin_px[1] * self.slide_mpp

    def region_px(self, rows: tuple[int, int], cols: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return ``(x, y, width, height)`` in pixels at `effective_mpp` of the patches in two ranges."""
        stride, patch = self.spec.stride_px, self.spec.patch_px
        x, y = (round(origin / self.effective_mpp) for origin in self.origin_um)
        return (
            x + cols[0] * stride,
            y + rows[0] * stride,
            (cols[1] - cols[0] - 1) * stride + patch,
            (rows[1] - rows[0] - 1) * stride + patch,
        )

    def to_attrs(self) -> dict[str, Any]:
        """Return the grid as JSON-ready values, exact enough to rebuild it."""
        # A stored grid is compared with a new one value by value, so these names and values never change.
        x, y = self.origin_px
        return {
            **asdict(self.spec),
            "slide_mpp": self.slide_mpp,
            "effective_mpp": self.effective_mpp,
            "shape": [self.n_rows, self.n_cols],
            "origin": f"corner of patch (0, 0) is pixel ({x:g}, {y:g}) of the slide",
            **({"origin_px": [x, y]} if x or y else {}),
        }

    @classmethod
    def from_attrs(cls, attrs: dict[str, Any]) -> Self:
        """Rebuild a grid from what `to_attrs` returned."""
        x, y = (float(value) for value in attrs.get("origin_px", (0, 0)))
        make = OffsetGridSpec if x or y else GridSpec
        spec = make(float(attrs["mpp"]), int(attrs["patch_px"]), int(attrs["stride_px"]))
        n_rows, n_cols = attrs["shape"]
        scale = float(attrs["slide_mpp"]), float(attrs["effective_mpp"])
        return cls(spec, *scale, int(n_rows), int(n_cols), (x, y))
