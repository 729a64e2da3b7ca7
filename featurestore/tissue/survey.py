"""Which patches of a slide hold tissue, and what colour each patch is: from one coarse look at the slide.

Tissue is told by its texture, not by its colour: backgrounds are pink, uneven and haloed, but smooth.
Local spread of optical density does not depend on the brightness of the glass, so one setting serves.

Terms
    overview   the whole slide at about 8 microns per pixel
    share      how much of a patch's footprint is tissue, 0..255
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from featurestore.grid import PatchGrid
from featurestore.slides.protocol import Slide

TISSUE_THRESHOLD = 26
"""A patch is tissue from this share on (10 %)."""
OVERVIEW_MPP = 8.0


@dataclass(frozen=True)
class TissueMethod:
    """What decides tissue; lengths in microns, so that it means the same on any overview.

    Parameters
    ----------
    texture_um, texture_od
        Side of the square in which the spread of the green optical density is taken, and the
        standard deviation from which on it is tissue.
    dense_od
        Red optical density (against white) from which on a pixel is tissue too, where it touches
        textured tissue: smooth but deeply stained.
    close_um
        Gaps narrower than this are closed.
    hole_um2, speck_um2
        Holes and specks smaller than this are filled and dropped.
    """

    texture_um: float = 40.0
    texture_od: float = 0.04
    dense_od: float = 0.35
    close_um: float = 40.0
    hole_um2: float = 60_000.0
    speck_um2: float = 30_000.0

    def to_attrs(self, overview_mpp: float) -> dict[str, Any]:
        """Return JSON-ready attributes."""
        return {"name": "texture", "version": 1, "overview_mpp": overview_mpp, **vars(self)}


@dataclass(frozen=True)
class Survey:
    """One coarse look at a slide, per patch.

    Parameters
    ----------
    tissue
        Share of each patch that is tissue, 0..255, ``(n_rows, n_cols)``.
    rgb
        Mean colour of each patch, ``(n_rows, n_cols, 3)``.
    method
        JSON-ready: how tissue was decided.
    """

    tissue: NDArray[np.uint8]
    rgb: NDArray[np.uint8]
    method: dict[str, Any]


def overview(slide: Slide, mpp: float = OVERVIEW_MPP) -> tuple[NDArray[np.uint8], float]:
    """Read a whole slide coarsely, in strips.

    Returns
    -------
    (numpy.ndarray, float)
        RGB, ``(height, width, 3)``, and its microns per pixel: `mpp`, or the slide's own if that is coarser.
    """
    mpp = max(mpp, slide.mpp)
    width, height = (max(1, int(np.ceil(side * slide.mpp / mpp - 1e-6))) for side in slide.size_px)
    strip = 256
    parts = [
        slide.read_region(0, top, width, min(strip, height - top), mpp) for top in range(0, height, strip)
    ]
    return np.concatenate(parts), mpp


def tissue_mask(rgb: NDArray[np.uint8], mpp: float, method: TissueMethod | None = None) -> NDArray[np.bool_]:
    """Tell tissue from glass on an overview.

    Parameters
    ----------
    rgb, mpp
        From `overview`.

    Returns
    -------
    numpy.ndarray
        Shape ``(height, width)``.
    """
    method = method or TissueMethod()
    # A smooth slope (a halo) spreads too; what is left after removing it is texture.
    density = -np.log((rgb.astype(np.float32) + 1) / 256)
    green = density[..., 1]
    side = _odd(method.texture_um / mpp)
    textured = _local_sd(green, side) > method.texture_od
    dense = (ndimage.uniform_filter(density[..., 0], side) > method.dense_od) & (
        ndimage.uniform_filter(green, side) > method.dense_od
    )
    mask = ndimage.binary_propagation(textured, mask=textured | dense)
    mask = _close(mask, _odd(method.close_um / mpp))
    return _clean(mask, method.hole_um2 / mpp**2, method.speck_um2 / mpp**2)


def _odd(size: float) -> int:
    return max(3, 2 * int(size // 2) + 1)


def _local_sd(values: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    values = values.astype(np.float64)
    mean = ndimage.uniform_filter(values, side)
    variance = ndimage.uniform_filter(values**2, side) - mean**2
    return np.asarray(np.sqrt(np.maximum(variance, 0)), dtype=np.float32)


def _close(mask: NDArray[np.bool_], side: int) -> NDArray[np.bool_]:
    # Padded, or erosion would eat tissue that runs off the slide.
    padded = np.pad(mask, side, mode="edge")
    closed = ndimage.binary_closing(padded, np.ones((side, side), bool))
    return np.asarray(closed[side:-side, side:-side] | mask)


def _clean(mask: NDArray[np.bool_], hole_px: float, speck_px: float) -> NDArray[np.bool_]:
    for target, smallest, becomes in ((False, hole_px, True), (True, speck_px, False)):
        labels, count = ndimage.label(mask == target)
        sizes = np.bincount(labels.ravel(), minlength=count + 1)
        # A slide smaller than a speck is judged by itself.
        small = sizes < min(smallest, mask.size / 4)
        small[0] = False
        mask = np.where(small[labels], becomes, mask)
    return mask.astype(bool)


def survey(slide: Slide, grid: PatchGrid, *, keep_all: bool = False) -> Survey:
    """Look at a slide once, and say of every patch how much of it is tissue and what colour it is.

    Parameters
    ----------
    keep_all
        Call every patch tissue (``--no-tissue``).
    """
    rgb, mpp = overview(slide)
    scale = grid.effective_mpp / mpp
    colour = patch_means(rgb.astype(np.float64), grid, scale)
    rounded = np.clip(np.floor(colour + 0.5), 0, 255).astype(np.uint8)
    if keep_all:
        return Survey(np.full(grid.shape, 255, np.uint8), rounded, {"name": "none", "version": 1})
    share = patch_means(tissue_mask(rgb, mpp).astype(np.float64), grid, scale)
    tissue = np.floor(share * 255 + 0.5).astype(np.uint8)
    return Survey(tissue, rounded, TissueMethod().to_attrs(mpp))


def patch_means(values: NDArray[np.float64], grid: PatchGrid, scale: float) -> NDArray[np.float64]:
    """Average an overview over each patch's footprint, fractional edges included.

    Parameters
    ----------
    values
        Shape ``(height, width)`` or ``(height, width, channels)``.
    scale
        Overview pixels per grid pixel.

    Returns
    -------
    numpy.ndarray
        Shape ``(n_rows, n_cols)`` or ``(n_rows, n_cols, channels)``. What lies beyond the overview does not count.
    """
    down = _span_means(values, grid.n_rows, grid, scale)
    across = _span_means(np.swapaxes(down, 0, 1), grid.n_cols, grid, scale)
    return np.swapaxes(across, 0, 1)


def _span_means(
    values: NDArray[np.float64], count: int, grid: PatchGrid, scale: float
) -> NDArray[np.float64]:
    """Average along the first axis over ``count`` patches, by differences of a running sum."""
    total = np.concatenate([np.zeros_like(values[:1]), np.cumsum(values, axis=0)])
    starts = np.arange(count) * grid.spec.stride_px * scale
    edges = np.clip(np.stack([starts, starts + grid.spec.patch_px * scale]), 0, len(values))
    whole = np.minimum(np.floor(edges).astype(int), len(values) - 1)
    part = (edges - whole).reshape(*edges.shape, *([1] * (values.ndim - 1)))
    sums = total[whole] + part * values[whole]
    length = np.maximum(edges[1] - edges[0], 1e-9).reshape(-1, *([1] * (values.ndim - 1)))
    return np.asarray((sums[1] - sums[0]) / length)
