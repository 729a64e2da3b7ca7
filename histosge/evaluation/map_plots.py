"""A gene's held-out map as a picture: H&E, measured spots and dense prediction side by side.

Colours are from viridis, which stays readable without colour vision and in grey.
"""

import numpy as np
from matplotlib.collections import EllipseCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from histosge.evaluation.results import GeneMap
from histosge.reporting.plots import COLOURS, DPI, MAX_MARKS, map_interpolation, robust_range, scale_bar

WIDTH_IN = 11.0
FADE = 0.55
"""Share of white over the H&E, so that spots and patches stand out from it."""


def gene_map(shown: GeneMap) -> Figure:
    """Draw H&E, measured spots and dense prediction side by side, the latter two on one colour scale."""
    figure = Figure(figsize=(WIDTH_IN, _height_in(shown)), dpi=DPI, layout="constrained")
    tissue, measured, predicted = figure.subplots(1, 3)
    # From the measured values, for both panels: on a scale of its own a flat prediction would look like a map.
    norm = Normalize(*robust_range(shown.measured))
    left, right, bottom, top = _bounds(shown)
    extent, pixels = _extent(shown), map_interpolation(shown.predicted.shape)
    faded = (shown.thumbnail * (1 - FADE) + 255 * FADE).astype(np.uint8)
    for axes, title, background in (
        (tissue, "H&E", shown.thumbnail),
        (measured, f"measured, {len(shown.measured)} held-out spots", faded),
        (predicted, "predicted, every patch", faded),
    ):
        axes.imshow(background, extent=extent, interpolation=pixels)
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
        axes.set(xlim=(left, right), ylim=(bottom, top))
    # In data units, so that a spot covers its true diameter at any size of the figure. One shape for all: a shape of
    # its own for each spot would make the file three times as large.
    discs = EllipseCollection(
        [shown.spot_um],
        [shown.spot_um],
        [0.0],
        units="xy",
        offsets=shown.spot_xy_um,
        offset_transform=measured.transData,
        cmap=COLOURS,
        norm=norm,
        rasterized=len(shown.measured) > MAX_MARKS,
    )
    discs.set_array(shown.measured)
    measured.add_collection(discs, autolim=False)
    predicted.imshow(shown.predicted, extent=extent, cmap=COLOURS, norm=norm, interpolation=pixels)
    scale_bar(tissue, 1)
    bar = figure.colorbar(discs, ax=[measured, predicted], extend="both", shrink=0.85, pad=0.02)
    bar.set_label("log1p(CP10k)", fontsize=9)
    return figure


def _extent(shown: GeneMap) -> tuple[float, float, float, float]:
    """Return where the thumbnail's pixels lie, ``(left, right, bottom, top)`` in microns, y downwards."""
    n_rows, n_cols = shown.predicted.shape
    # A pixel of the thumbnail stands for the stride's square around a patch's centre, not for the patch.
    left, top = (start + (shown.patch_um - shown.stride_um) / 2 for start in shown.origin_um)
    return left, left + n_cols * shown.stride_um, top + n_rows * shown.stride_um, top


def _bounds(shown: GeneMap) -> tuple[float, float, float, float]:
    """Return ``(left, right, bottom, top)`` around patches and spots, without the empty glass beyond."""
    rows, cols = np.nonzero(~np.isnan(shown.predicted))
    patches = (
        np.stack([cols, rows], axis=1) * shown.stride_um + shown.patch_um / 2 + np.asarray(shown.origin_um)
    )
    centres = np.concatenate([patches, shown.spot_xy_um])
    margin = max(shown.patch_um, shown.spot_um)
    left, top = (centres.min(axis=0) - margin).tolist()
    right, bottom = (centres.max(axis=0) + margin).tolist()
    return left, right, bottom, top


def _height_in(shown: GeneMap) -> float:
    """Return the height at which three panels fill the figure's width, within reason."""
    left, right, bottom, top = _bounds(shown)
    panel = (WIDTH_IN - 1) / 3
    return float(np.clip(panel * (bottom - top) / (right - left) + 0.4, 1.8, 7))
