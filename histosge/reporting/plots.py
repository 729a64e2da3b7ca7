"""Figures of reports: what all of them share, the distribution of trust, and maps beside a slide.

It reads no file and touches no state of matplotlib that outlives a call: every figure is an object of its own.
Colours are from viridis, which stays readable without colour vision and in grey.
"""

import io
import re
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

COLOURS = "viridis"
NEUTRAL = "#8a8f98"
DPI = 160
"""Of what is drawn as pixels inside a figure: sharp at twice the width of a page on a usual screen."""
MAX_MARKS = 2000
"""Marks of one plot that are kept as shapes: each takes 100 bytes, so that 20,000 genes would make a page of 20 MB."""
# A map of fewer patches is stored a pixel a patch; a larger one is resampled to what the figure shows of it.
_MAX_EXACT_PATCHES = 200_000
_NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
ROBUST = (2.0, 98.0)
"""Percentiles that a colour scale spans, so that single patches do not stretch it."""


def hide_spines(axes: Axes) -> None:
    """Hide the frame's top and right sides."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def to_svg(figure: Figure) -> bytes:
    """Return a figure as an SVG whose text stays text; the same figure gives the same bytes."""
    # Fonts as fonts, so that an author's program can edit the text. A fixed salt, since the usual ids are random.
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "histosge"}
    # No metadata: they would name the date, and addresses on a page that is to load nothing.
    metadata: Any = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    target, dpi = io.BytesIO(), figure.dpi
    with rc_context(style), warnings.catch_warnings():
        # Letters are measured with the font that matplotlib brings, and drawn with one that the reader has.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        # Not by `savefig`, which draws a figure with a layout twice: once for the layout, which drawing computes anyway.
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(target, metadata=metadata)
    figure.dpi = dpi  # it is 72 for an SVG, and pixels inside of one are drawn by the figure's own
    # matplotlib (3.11) writes control characters of a name as they are, and no browser opens such a file.
    return _NO_XML.sub("\ufffd", target.getvalue().decode()).encode()


def map_interpolation(shape: tuple[int, ...]) -> str:
    """Return how matplotlib is to draw a map of ``(n_rows, n_cols)`` patches: exact where that is small."""
    return "none" if shape[0] * shape[1] <= _MAX_EXACT_PATCHES else "nearest"


def scale_bar(axes: Axes, unit_um: float) -> None:
    """Draw a scale bar of a round length at the bottom left.

    Parameters
    ----------
    unit_um
        One unit of the axes, in microns.
    """
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    longest_um = (right - left) * unit_um / 3
    decade = 10.0 ** np.floor(np.log10(longest_um))
    length_um = max(step * decade for step in (1, 2, 5) if step * decade <= longest_um)
    length = length_um / unit_um
    x, y = left + 0.04 * (right - left), bottom + 0.04 * (top - bottom)
    axes.plot([x, x + length], [y, y], color="black", linewidth=3, solid_capstyle="butt")
    text = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"
    # From the bar's start: on a narrow panel the words are wider than the bar, and centred they would leave the panel.
    axes.text(x, y + 0.02 * (top - bottom), text, ha="left", va="bottom", fontsize=9)


def trust_plot(trust: NDArray[np.float32], threshold: float) -> Figure:
    """Draw the distribution of trust over genes, with the line below which a gene is abstained from."""
    # Figure, not pyplot: pyplot keeps every figure alive, and its state belongs to the user's own plots.
    figure = Figure(figsize=(8, 2.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    # The same bins for both groups, so that their bars line up.
    edges = np.linspace(0, max(1.0, float(trust.max(initial=0))), 41).tolist()
    axes.hist(trust[trust >= threshold], edges, color="#35608d", label="trusted")
    axes.hist(trust[trust < threshold], edges, color="#c9ccd1", label="abstained from")
    axes.axvline(threshold, color="black", linewidth=0.9, linestyle="--")
    axes.set_xlabel("trust: lower 99 % confidence limit of a gene's held-out Pearson", fontsize=9)
    axes.set_ylabel("genes", fontsize=9)
    axes.legend(frameon=False, fontsize=9)
    hide_spines(axes)
    return figure


def robust_range(values: NDArray[np.float32]) -> tuple[float, float]:
    """Return the ends of one map's colours, from the values that it is to be compared with; NaN are left out."""
    known = values[np.isfinite(values)]
    if not len(known):
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(known, ROBUST))
    # A gene counted in a few spots alone has the same percentiles on both sides: take the whole range then.
    if high <= low:
        low, high = float(known.min()), float(known.max())
    return low, high if high > low else low + 1


def robust_limits(maps: Iterable[NDArray[np.float32]]) -> tuple[float, float]:
    """Return the lowest and the highest end of the maps' robust ranges: one scale on which none of them saturates."""
    known = [values[np.isfinite(values)] for values in maps]
    ends = [np.percentile(values, ROBUST) for values in known if len(values)]
    if not ends:
        return 0.0, 1.0
    low, high = float(min(low for low, _ in ends)), float(max(high for _, high in ends))
    return (low, high) if high > low else (low, low + 1.0)


def shared_scale_maps(
    maps: dict[str, NDArray[np.float32]], limits: tuple[float, float], stride_um: float
) -> Figure:
    """Draw maps large, two in a row, on one colour scale with its bar, and with axes in mm and a scale bar.

    Parameters
    ----------
    maps
        Title -> values, ``(n_rows, n_cols)``, all of one grid; NaN where nothing was predicted. At least one.
    limits
        Ends of the colours.
    stride_um
        Step between patches.
    """
    n_rows, n_cols = next(iter(maps.values())).shape
    columns = min(2, len(maps))
    lines = -(-len(maps) // columns)
    height = float(np.clip(lines * (10 / columns * n_rows / n_cols + 0.7), 2.2, 40))
    # With the usual pad of 0.04 the titles of some shapes are cut off: maps keep their aspect after the layout is made.
    figure = Figure(figsize=(11, height), dpi=DPI, layout=ConstrainedLayoutEngine(h_pad=0.15))
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    step = stride_um / 1000  # in mm
    extent = (0.0, n_cols * step, n_rows * step, 0.0)
    drawn, pixels = None, map_interpolation((n_rows, n_cols))
    for place, (title, values) in zip(axes, maps.items(), strict=False):
        drawn = place.imshow(
            values, extent=extent, cmap=COLOURS, vmin=limits[0], vmax=limits[1], interpolation=pixels
        )
        # A gene's name may hold dollars, which matplotlib would take for a formula and may refuse.
        place.set_title(title, fontsize=13, parse_math=False)
        place.tick_params(labelsize=8)
        hide_spines(place)
    for place in axes[len(maps) :]:
        place.set_visible(False)
    axes[0].set_xlabel("mm", fontsize=8)
    scale_bar(axes[0], 1000)
    assert drawn is not None
    bar = figure.colorbar(drawn, ax=list(axes), shrink=0.8, pad=0.01, extend="both")
    bar.set_label("log1p(CP10k)", fontsize=9)
    return figure


def slide_maps(
    thumbnail: NDArray[np.uint8],
    maps: dict[str, NDArray[np.float32]],
    stride_um: float,
    corner_um: tuple[float, float],
) -> Figure:
    """Draw a slide's mean colours and some maps beside them, each on a scale of its own.

    Parameters
    ----------
    thumbnail
        One pixel a patch, ``(n_rows, n_cols, 3)``.
    maps
        Title -> values, ``(n_rows, n_cols)``; NaN where nothing was predicted.
    stride_um
        Step between patches.
    corner_um
        ``(x, y)`` of the first pixel's corner, from the slide's top-left: a pixel is the square of one stride around a
        patch's centre.
    """
    n_rows, n_cols, _ = thumbnail.shape
    panels = 1 + len(maps)
    # As high as the maps need at this width, and 0.6 for titles; bounded, so that a narrow slide fills no whole page.
    height = float(np.clip(11 / panels * n_rows / n_cols + 0.6, 1.8, 6))
    figure = Figure(figsize=(11, height), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    left, top, step = corner_um[0] / 1000, corner_um[1] / 1000, stride_um / 1000  # in mm
    extent = (left, left + n_cols * step, top + n_rows * step, top)
    pixels = map_interpolation(thumbnail.shape)
    axes[0].imshow(thumbnail, extent=extent, interpolation=pixels)
    axes[0].set_title("H&E, a pixel a patch", fontsize=10)
    axes[0].set_xlabel("mm", fontsize=8)
    scale_bar(axes[0], 1000)
    for place, (title, values) in zip(axes[1:], maps.items(), strict=True):
        known = values[np.isfinite(values)]
        # On one scale for all, a weakly expressed gene would be a single colour.
        low, high = np.percentile(known, ROBUST) if len(known) else (0.0, 1.0)
        drawn = place.imshow(values, extent=extent, cmap=COLOURS, vmin=low, vmax=high, interpolation=pixels)
        # A gene's name may hold dollars, which matplotlib would take for a formula and may refuse.
        place.set_title(title, fontsize=10, parse_math=False)
        place.set_axis_off()
        figure.colorbar(drawn, ax=place, shrink=0.7, pad=0.02)
    return figure
