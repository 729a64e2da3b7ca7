"""Where each patch of a slide sits, and at what scale.

`PatchGrid` is the only place that converts a patch's (row, col) to slide pixels. It is
arithmetic alone: it opens no image and touches no store, so its tests run in milliseconds.

Terms
    patch        (row, col) in the grid; row grows downwards
    position     a patch of a token grid: one of the K x K groups of tokens of a patch that was encoded
    pixel        (x, y) at level 0 of the slide; origin top-left, y grows downwards
    mpp          microns per pixel: requested (`mpp`), of the slide's level 0 (`slide_mpp`),
                 and the one at which patches are read (`effective_mpp`)
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

# Scanners write 0.499 or 0.2525 for 20x and 40x, and pyramids round their sizes: such a level is the one meant.
LEVEL_TOLERANCE = 0.05
"""A level whose mpp differs from the requested one by this share at most is read as it is, without resampling."""

MOST_SUGGESTED = 64
"""Positions along a patch's side that a message suggests at most: the finest map in use, 518 px by 8, has 64."""


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

    @property
    def encoded(self) -> "GridSpec":
        """Grid of the patches that are encoded: this one, except of a `TokenGridSpec`."""
        return self


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
class TokenGridSpec(GridSpec):
    """A grid K times as fine as its patches: each position is a group of tokens of a patch that was encoded whole.

    `patch_px` and `stride_px` are those of a position, so that everything that reads a grid finds positions and microns
    as on any other. `encoded` is the grid of the patches that the encoder sees. Make one with `from_patches`.

    Parameters
    ----------
    tokens
        K: a patch gives K x K positions.
    token_overlap_px
        By how much neighbouring patches overlap, in pixels at `mpp`. Half of it is cut off at each edge of a patch.
    token_cls
        Whether each position's vector is joined with the vector of its whole patch.
    """

    tokens: int = 1
    token_overlap_px: int = 0
    token_cls: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_px != self.stride_px or self.tokens < 1:
            raise ValueError(
                f"positions of {self.patch_px} px every {self.stride_px} px, {self.tokens} a patch, are no token grid"
            )
        # Odd, the two rims would differ by a pixel, and positions would lie half a pixel off their tokens.
        if self.token_overlap_px < 0 or self.token_overlap_px % 2:
            raise ValueError(
                f"patches cannot overlap by {self.token_overlap_px} px; give 0 or an even number of pixels, half of it "
                "is cut off at each edge"
            )

    @classmethod
    def from_patches(
        cls, mpp: float, patch_px: int, tokens: int, *, overlap_px: int = 0, cls_token: bool = False
    ) -> Self:
        """Return the grid of K x K positions in each patch of `patch_px` pixels.

        Raises
        ------
        ValueError
            If K does not divide the pixels of a patch that are left between its rims; the values that do are given.
        """
        # More than half, and a pixel is encoded by three patches along an axis: an ordinary grid gives as much for that.
        if not 0 <= overlap_px <= patch_px / 2:
            raise ValueError(
                f"patches of {patch_px} px cannot overlap by {overlap_px} px; give 0 to {patch_px // 2}"
            )
        kept = patch_px - overlap_px
        if tokens < 1 or kept % tokens:
            fitting = ", ".join(str(k) for k in range(1, min(kept, MOST_SUGGESTED) + 1) if kept % k == 0)
            near = max(1, round(kept / max(tokens, 1))) * max(tokens, 1)
            rims = f" without its rims of {overlap_px / 2:g} px" if overlap_px else ""
            raise ValueError(
                f"{tokens} x {tokens} positions do not divide a patch of {patch_px} px{rims}; give one of {fitting} that "
                f"divides the encoder's map of tokens, too, or patches of {near + overlap_px} px"
            )
        side = kept // tokens
        return cls(mpp, side, side, tokens, overlap_px, cls_token)

    @property
    def encoded(self) -> GridSpec:
        """Grid of the patches that are encoded."""
        kept = self.patch_px * self.tokens
        return GridSpec(self.mpp, kept + self.token_overlap_px, kept)

    @property
    def key(self) -> str:
        """The grid's label in a store, such as ``mpp0.5000_px224_stride224_tokens4``."""
        # The stride tells the overlap. Vectors with and without the patch's own may be in one store.
        return f"{self.encoded.key}_tokens{self.tokens}{'_cls' if self.token_cls else ''}"


def spec_from_values(values: Mapping[str, Any]) -> GridSpec:
    """Rebuild the specification of a grid from its fields, as a store's attributes or a model's card hold them.

    An offset is no field: see `PatchGrid.from_attrs`.
    """
    side = float(values["mpp"]), int(values["patch_px"]), int(values["stride_px"])
    if "tokens" not in values:
        return GridSpec(*side)
    return TokenGridSpec(
        *side,
        int(values["tokens"]),
        int(values.get("token_overlap_px", 0)),
        bool(values.get("token_cls", False)),
    )


@dataclass(frozen=True)
class PatchGrid:
    """The regular lattice of patches over one slide.

    The corner of patch (0, 0) is pixel `origin_px` of level 0, ``(x, y)``: (0, 0) unless the embeddings were imported, or
    it is a position of a patch whose rim is cut off.
    Only whole patches are kept, unless the slide is smaller than one patch: then there is one, padded.
    """

    spec: GridSpec
    slide_mpp: float
    effective_mpp: float
    n_rows: int
    n_cols: int
    origin_px: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        x, y = self.origin_px
        is_offset = isinstance(self.spec, OffsetGridSpec) or self.rim_px > 0
        if is_offset != any(self.origin_px) or not np.isfinite([x, y]).all():
            raise ValueError(f"a grid with key {self.spec.key} cannot begin at pixel {self.origin_px}")
        rim = self.rim_px * self.effective_mpp / self.slide_mpp
        if self.rim_px and not np.allclose(self.origin_px, rim, rtol=1e-9):
            raise ValueError(
                f"a grid with key {self.spec.key} begins at pixel ({rim:g}, {rim:g}), not at {self.origin_px}"
            )
        if self.n_rows % self.tokens or self.n_cols % self.tokens:
            raise ValueError(
                f"a grid of {self.n_rows} x {self.n_cols} positions does not hold {self.tokens} x {self.tokens} a patch"
            )

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
        if isinstance(spec, TokenGridSpec):
            whole = cls.for_slide(size_px, slide_mpp, level_mpps, spec.encoded)
            return cls._of_tokens(whole, spec)
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

    @classmethod
    def _of_tokens(cls, whole: "PatchGrid", spec: TokenGridSpec) -> Self:
        """Return the positions of a grid of whole patches."""
        rim = spec.token_overlap_px / 2 * whole.effective_mpp / whole.slide_mpp
        shape = whole.n_rows * spec.tokens, whole.n_cols * spec.tokens
        return cls(spec, whole.slide_mpp, whole.effective_mpp, *shape, (rim, rim))

    @property
    def tokens(self) -> int:
        """Positions along the side of a patch that is encoded: 1, except on a token grid."""
        return self.spec.tokens if isinstance(self.spec, TokenGridSpec) else 1

    @property
    def rim_px(self) -> float:
        """What is cut off at each edge of a patch that is encoded, pixels at `effective_mpp`: 0 but on a token grid."""
        return self.spec.token_overlap_px / 2 if isinstance(self.spec, TokenGridSpec) else 0.0

    @property
    def encoded(self) -> "PatchGrid":
        """Grid of the patches that are read and encoded: this one, except on a token grid."""
        if not isinstance(self.spec, TokenGridSpec):
            return self
        shape = self.n_rows // self.tokens, self.n_cols // self.tokens
        return PatchGrid(self.spec.encoded, self.slide_mpp, self.effective_mpp, *shape)

    @property
    def receptive_um(self) -> float:
        """Distance along an axis from which on the vectors of two patches depend on no common pixel, in microns.

        The side of a patch. A token sees all of its patch, so on a token grid it is the side of what is encoded, and
        twice that without the overlap where neighbouring patches overlap.
        """
        spec = self.encoded.spec
        if spec is self.spec:
            return self.patch_um
        return -(-spec.patch_px // spec.stride_px) * spec.stride_px * self.effective_mpp

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
    def description(self) -> str:
        """What the patches are, such as ``112 µm patches every 56 µm``."""
        if not isinstance(self.spec, TokenGridSpec):
            return f"{self.patch_um:.0f} µm patches every {self.stride_um:.0f} µm"
        own = ", each with the vector of its patch" if self.spec.token_cls else ""
        return (
            f"{self.patch_um:.0f} µm groups of tokens, {self.tokens} x {self.tokens} of each "
            f"{self.encoded.patch_um:.0f} µm patch{own}"
        )

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
        spec = spec_from_values(attrs)
        if (x or y) and not isinstance(spec, TokenGridSpec):
            spec = OffsetGridSpec(spec.mpp, spec.patch_px, spec.stride_px)
        n_rows, n_cols = attrs["shape"]
        scale = float(attrs["slide_mpp"]), float(attrs["effective_mpp"])
        return cls(spec, *scale, int(n_rows), int(n_cols), (x, y))
