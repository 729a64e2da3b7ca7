"""Which patches of a slide hold tissue, and what colour each patch is: from one coarse look at the slide.

Terms
    overview   the whole slide at about 8 microns per pixel
    share      how much of a patch's footprint is tissue, 0..255
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.errors import FeatureStoreError, MaskError, SlideError
from featurestore.grid import PatchGrid
from featurestore.slides.protocol import Slide
from featurestore.tissue.annotation import Frame
from featurestore.tissue.mask_check import check_mask
from featurestore.tissue.methods.texture import texture_mask
from featurestore.tissue.overview import Overview, read_overview
from featurestore.tissue.overview_flags import MIN_SHARE, overview_masks
from featurestore.tissue.region import Region, TissueRequest
from featurestore.tissue.threshold import is_tissue
from featurestore.tissue.tissue_method import DEFAULT_TISSUE, TISSUE_METHODS, TissueMethod

_STRIP_PATCHES = 1_000_000
"""Patches whose means are computed at once: about 150 bytes each while they are, and 4 bytes each as they are kept."""


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
    remarks
        What the user should know of the file that restricts tissue.
    quality
        Bits of `featurestore.tissue.flags`, ``(n_rows, n_cols)``, as far as the overview shows them; None of a grid from
        elsewhere.
    skip
        Names of the flags whose patches were left out: their `tissue` is 0.
    """

    tissue: NDArray[np.uint8]
    rgb: NDArray[np.uint8]
    method: dict[str, Any]
    remarks: tuple[str, ...] = ()
    quality: NDArray[np.uint8] | None = None
    skip: tuple[str, ...] = ()


def survey(slide: Slide, grid: PatchGrid, request: TissueRequest | str = DEFAULT_TISSUE) -> Survey:
    """Look at a slide once; return how much of each patch is tissue and what colour it is.

    Parameters
    ----------
    request
        How tissue is found: a request, or only the name of a registered `TissueMethod`.

    Raises
    ------
    TissueError
        If there is no such method, or it cannot be loaded.
    MaskError
        If the file that restricts tissue cannot be used for this slide, or leaves nothing.
    SlideError
        If the slide cannot be read, or the method cannot judge it.
    """
    request = TissueRequest(request) if isinstance(request, str) else request
    record = TISSUE_METHODS.get(request.method)
    overview = read_overview(slide)
    scale = grid.effective_mpp / overview.mpp
    rgb = _mean_bytes(overview.rgb.astype(np.float64), grid, scale, 1.0)
    found = _survey(record, overview, grid, rgb, request)
    return replace(found, quality=quality_of(overview, grid))


def _survey(
    record: TissueMethod, overview: Overview, grid: PatchGrid, rgb: NDArray[np.uint8], request: TissueRequest
) -> Survey:
    if request.region is not None:
        return _survey_region(record, overview, grid, rgb, request.region)
    if record.needs_region:
        raise MaskError(
            f"--tissue {record.name} needs a mask for {overview.slide.source}; give one in the sheet's column mask, or "
            "--mask DIR"
        )
    attrs = record.to_attrs(overview.mpp)
    if record.mask is None:
        return Survey(np.full(grid.shape, 255, np.uint8), rgb, attrs)
    scale = grid.effective_mpp / overview.mpp
    return Survey(_shares(_tissue_mask(record, overview), grid, scale), rgb, attrs)


def quality_of(overview: Overview, grid: PatchGrid) -> NDArray[np.uint8]:
    """Return the quality flags of a grid's patches that an overview shows, ``(n_rows, n_cols)``."""
    bits = np.zeros(grid.shape, np.uint8)
    masks, mpp = overview_masks(overview.rgb, overview.mpp)
    for flag, mask in masks.items():
        if mask.any():
            shares = _shares(mask, grid, grid.effective_mpp / mpp)
            bits[shares >= MIN_SHARE * 255] |= np.uint8(flag)
    return bits


def _survey_region(
    record: TissueMethod, overview: Overview, grid: PatchGrid, rgb: NDArray[np.uint8], region: Region
) -> Survey:
    """Survey a slide of which a file leaves a part."""
    height, width = overview.rgb.shape[:2]
    frame = Frame(overview.slide.size_px, overview.slide.mpp, (height, width), overview.mpp)
    found = region.read((width, height))
    mask = found.draw(frame)
    remarks = found.remarks
    if record.needs_region:
        # Where another method finds tissue, a file that does not fit leaves none; here nothing else would show it.
        tissue = texture_mask(overview.rgb, overview.mpp)
        remark = check_mask(mask, tissue, found.opened.annotation, found.selection, frame, found.opened.label)
        remarks += (remark,) if remark else ()
    if record.mask is not None:
        mask &= _tissue_mask(record, overview)
    shares = _shares(mask, grid, grid.effective_mpp / overview.mpp)
    if not is_tissue(shares).any():
        raise MaskError(
            f"{found.opened.label} with --tissue {record.name} leaves no patch of {overview.slide.source} that is a tenth "
            "tissue; take other classes (--within), smaller patches, or leave the slide out"
        )
    return Survey(shares, rgb, record.to_attrs(overview.mpp, found.to_attrs()), remarks)


def _shares(mask: NDArray[np.bool_], grid: PatchGrid, scale: float) -> NDArray[np.uint8]:
    return _mean_bytes(mask.astype(np.float64), grid, scale, 255.0)


def _mean_bytes(
    values: NDArray[np.float64], grid: PatchGrid, scale: float, largest: float
) -> NDArray[np.uint8]:
    """Return the patches' means times `largest`, as bytes; some rows of patches at a time."""
    means = np.empty((*grid.shape, *values.shape[2:]), np.uint8)
    step = max(1, _STRIP_PATCHES // grid.n_cols)
    for first in range(0, grid.n_rows, step):
        rows = first, min(first + step, grid.n_rows)
        means[slice(*rows)] = _round_to_bytes(patch_means(values, grid, scale, rows) * largest)
    return means


def _round_to_bytes(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    # Halves upwards: numpy's own rounding takes halves to even, and stored bytes must not depend on that.
    return np.clip(np.floor(values + 0.5), 0, 255).astype(np.uint8)


def _tissue_mask(method: TissueMethod, overview: Overview) -> NDArray[np.bool_]:
    assert method.mask is not None
    try:
        mask = np.asarray(method.mask(overview))
    except FeatureStoreError:
        raise
    except Exception as error:
        # A bug of ours keeps its traceback; another package's costs the slide, and the others go on.
        if method.name in TISSUE_METHODS.own:
            raise
        raise SlideError(
            f"tissue method {method.name!r} failed on {overview.slide.source}: {type(error).__name__}: "
            f"{' '.join(str(error).split())}"
        ) from error
    if mask.shape != overview.rgb.shape[:2] or mask.dtype != np.bool_:
        raise SlideError(
            f"tissue method {method.name!r} returned {mask.dtype} of shape {mask.shape}; it must return bool of "
            f"shape {overview.rgb.shape[:2]}, the overview's"
        )
    return mask


def patch_means(
    values: NDArray[np.float64], grid: PatchGrid, scale: float, rows: tuple[int, int] | None = None
) -> NDArray[np.float64]:
    """Average an overview over each patch's footprint, fractional edges included.

    Parameters
    ----------
    values
        Shape ``(height, width)`` or ``(height, width, channels)``.
    scale
        Overview pixels per grid pixel.
    rows
        Only these rows of patches, ``(start, stop)``.

    Returns
    -------
    numpy.ndarray
        Shape ``(n_rows, n_cols)`` or ``(n_rows, n_cols, channels)``. What lies beyond the overview does not count.
    """
    x, y = (origin / grid.effective_mpp for origin in grid.origin_um)
    first, stop = rows or (0, grid.n_rows)
    down = _span_means(values, stop - first, grid, scale, y + first * grid.spec.stride_px)
    across = _span_means(np.swapaxes(down, 0, 1), grid.n_cols, grid, scale, x)
    return np.swapaxes(across, 0, 1)


def _span_means(
    values: NDArray[np.float64], count: int, grid: PatchGrid, scale: float, start: float
) -> NDArray[np.float64]:
    """Average along the first axis over ``count`` patches from a grid pixel on, by differences of a running sum."""
    # Overlapping patches share most of their pixels: a running sum costs the same at any stride.
    total = np.concatenate([np.zeros_like(values[:1]), np.cumsum(values, axis=0)])
    starts = (start + np.arange(count) * grid.spec.stride_px) * scale
    edges = np.clip(np.stack([starts, starts + grid.spec.patch_px * scale]), 0, len(values))
    whole = np.minimum(np.floor(edges).astype(int), len(values) - 1)
    # A pixel that an edge cuts counts by the part that is inside.
    part = (edges - whole).reshape(*edges.shape, *([1] * (values.ndim - 1)))
    sums = total[whole] + part * values[whole]
    # A slide smaller than one patch has a patch that ends beyond it; one with nothing under it is 0, not NaN.
    length = np.maximum(edges[1] - edges[0], 1e-9).reshape(-1, *([1] * (values.ndim - 1)))
    return np.asarray((sums[1] - sums[0]) / length)
