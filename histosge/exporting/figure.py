"""A figure for a paper: a panel per gene on the tissue's outline, with colour bars, a scale bar and a caption.

It draws without a display, and touches no state of matplotlib that outlives the call. The same map gives the same bytes.

Terms
    cell   what a pixel of a panel stands for: the stride cell of a patch, or the mean of several patches of a large map
"""

import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Outline
from numpy.typing import NDArray

from featurestore.earlier_results import staged_result
from featurestore.whole_file import check_output
from histosge.calibration.conformal import TRUSTED
from histosge.calibration.wording import half_width_text, interval_name, trained_on_sentence
from histosge.errors import ExportError
from histosge.exporting.formats.geojson import polygons
from histosge.exporting.open_tables import gene_columns, open_map, table_of_map
from histosge.prediction.stored_map import StoredMap

SUFFIXES = (".pdf", ".png", ".svg")
UNIT = "log1p(CP10k)"
MAX_PANELS = 24
"""More are too small to be read on a page, and each takes memory."""
MAX_SIDE = 1500
"""Cells along the longer side of a panel; a panel as wide as the page has fewer dots than twice that."""
DPI = 300
# A page of two columns of the usual journals is 180 mm wide; 7 points is the least that they print.
_WIDTH_IN, _MAX_HEIGHT_IN, _POINTS = 7.08, 9.2, 7.0
_MAX_COLUMNS = 4
# Letters of that size on a line of the page: measured with the font that matplotlib brings.
_CAPTION_LETTERS = 128
_LINE_IN = _POINTS * 1.35 / 72
# Of a panel's height, from the tissue to the scale bar, and from there to the end.
_BAR_GAP = 0.04
_NO_VALUE = "#d9dbde"
# Percentiles that colours span, as in the viewer and in reports: single patches do not stretch the scale.
_ROBUST = (2.0, 98.0)


@dataclass(frozen=True)
class FigureSettings:
    """How a figure looks.

    Parameters
    ----------
    scale
        ``shared``: one colour scale for all genes, which then compare; ``own``: one for each; or the ``(low, high)``
        of all.
    grid
        Which map, where a slide has several.
    """

    scale: str | tuple[float, float] = "shared"
    grid: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.scale, str):
            if self.scale not in ("shared", "own"):
                raise ExportError(
                    f"--scale {self.scale!r} is no scale; give shared, own, or LOW,HIGH such as 0,3"
                )
            return
        low, high = self.scale
        if not (np.isfinite([low, high]).all() and low < high):
            raise ExportError(
                f"--scale {low:g},{high:g} is no scale; give two numbers, the lower one first, such as 0,3"
            )


@dataclass(frozen=True)
class DrawnFigure:
    """What was drawn: the slide, its genes in order, and whether the same figure was there already."""

    slide_id: str
    genes: tuple[str, ...]
    was_there: bool


def draw_figure(
    url: str | Path,
    genes: Sequence[str],
    path: str | Path,
    slide_id: str | None = None,
    settings: FigureSettings | None = None,
    *,
    overwrite: bool = False,
) -> DrawnFigure:
    """Draw genes of one slide's map into a PDF, PNG or SVG of 180 mm width.

    Parameters
    ----------
    url
        Expression store, a folder or URL.
    genes
        In the order of the panels; at most `MAX_PANELS`.
    path
        Its suffix decides the format. It appears whole.
    slide_id
        May be None where the store holds a single slide.
    overwrite
        Replace a file of other content.

    Raises
    ------
    ExportError, StoreError, EarlierResultError
        If slide, gene or format is not known, the map is not whole, or another file is there.
    """
    path, settings = Path(path), settings or FigureSettings()
    if path.suffix.lower() not in SUFFIXES:
        raise ExportError(
            f"{path.name} ends in none of {', '.join(SUFFIXES)}; name the figure such as map.pdf"
        )
    check_output(path)
    names = list(dict.fromkeys(genes))
    if not 1 <= len(names) <= MAX_PANELS:
        raise ExportError(
            f"a figure shows 1 to {MAX_PANELS} genes, not {len(names)}; choose with --genes A,B"
        )
    stored = open_map(str(url), slide_id, settings.grid)
    columns = gene_columns(stored.genes, names, stored.slide_id)
    panels = _read_panels(stored, names)
    figure = _lay_out(stored, names, columns, panels, settings)
    # Fonts as fonts, so that a journal's or an author's program can edit the text.
    fonts: Any = {"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "histosge"}
    # Without dates, so that the same figure again is recognised.
    dates: dict[str, Any] = {
        ".pdf": {"CreationDate": None, "ModDate": None},
        ".svg": {"Date": None},
        ".png": {},
    }[path.suffix.lower()]
    with rc_context(fonts), warnings.catch_warnings(), staged_result(path, overwrite=overwrite) as staged:
        # A name in a script that the font lacks is drawn as boxes; the gene's data are right.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(staged.path, format=path.suffix.lower()[1:], dpi=DPI, metadata=dates)
    return DrawnFigure(stored.slide_id, tuple(names), staged.was_there)


@dataclass(frozen=True)
class _Panels:
    """Values on cells, cropped to the tissue.

    Parameters
    ----------
    values
        ``(n_genes, rows, cols)``; NaN without a prediction.
    tissue
        ``(rows, cols)``.
    corner_um, step_um
        ``(x, y)`` of the first cell's corner, from the slide's top-left; side of a cell.
    merged
        Patches along the side of a cell.
    """

    values: NDArray[np.float32]
    tissue: NDArray[np.bool_]
    corner_um: tuple[float, float]
    step_um: float
    merged: int

    @property
    def size_um(self) -> tuple[float, float]:
        """Width and height."""
        rows, cols = self.tissue.shape
        return cols * self.step_um, rows * self.step_um


def _read_panels(stored: StoredMap, genes: Sequence[str]) -> _Panels:
    """Read the genes where there is tissue, band by band; cells of a large map are means of its patches."""
    rows, cols = np.nonzero(stored.is_tissue)
    if not len(rows):
        raise ExportError(f"the map of {stored.slide_id!r} has no tissue; nothing to draw")
    # One patch of background around it, for the outline.
    top, left = max(0, int(rows.min()) - 1), max(0, int(cols.min()) - 1)
    bottom, right = (
        min(n, int(last.max()) + 2) for n, last in zip(stored.grid.shape, (rows, cols), strict=True)
    )
    merged = -(-max(bottom - top, right - left) // MAX_SIDE)
    shape = -(-(bottom - top) // merged), -(-(right - left) // merged)
    values = np.full((len(genes), *shape), np.nan, np.float32)
    tissue = np.zeros(shape, dtype=bool)
    table = table_of_map(stored, genes)
    # A band of whole cells that is about as high as a block, so that few blocks are read twice.
    cells = max(1, stored.array.block_shape[0] // merged)
    for cell in range(0, shape[0], cells):
        first = top + cell * merged
        last = min(bottom, first + cells * merged)
        here = slice(cell, cell + -(-(last - first) // merged))
        tissue[here] = np.isfinite(
            _cell_means(np.where(stored.is_tissue[first:last, left:right, None], 1.0, np.nan), merged)
        )[0]
        if tissue[here].any():
            values[:, here] = _cell_means(table.read_grid_rows((first, last))[:, left:right], merged)
    if not np.isfinite(values).any():
        raise ExportError(f"the map of {stored.slide_id!r} has no patch with values; nothing to draw")
    grid = stored.grid
    x, y = (start + (grid.patch_um - grid.stride_um) / 2 for start in grid.origin_um)
    corner = x + left * grid.stride_um, y + top * grid.stride_um
    return _Panels(values, tissue, corner, merged * grid.stride_um, merged)


def _cell_means(values: NDArray[Any], merged: int) -> NDArray[np.float32]:
    """Return means of ``merged x merged`` patches over those with values: ``(rows, cols, n)`` -> ``(n, cells, cells)``."""
    if merged > 1:
        pad = [(0, -n % merged) for n in values.shape[:2]]
        values = np.pad(values, (*pad, (0, 0)), constant_values=np.nan)
        squares = values.reshape(len(values) // merged, merged, -1, merged, values.shape[2])
        known = np.isfinite(squares).sum(axis=(1, 3))
        total = np.nansum(squares, axis=(1, 3))
        values = np.divide(total, known, out=np.full(total.shape, np.nan, total.dtype), where=known > 0)
    return np.moveaxis(values, 2, 0).astype(np.float32)


def _lay_out(
    stored: StoredMap,
    genes: Sequence[str],
    columns: Sequence[int],
    panels: _Panels,
    settings: FigureSettings,
) -> Figure:
    width_um, height_um = panels.size_um
    n_rows = -(-len(genes) // _MAX_COLUMNS)
    n_columns = -(-len(genes) // n_rows)  # five genes as three and two, not as four and one
    caption = textwrap.wrap(_caption(stored, genes, columns, panels, settings), _CAPTION_LETTERS)
    caption_in = (len(caption) + 1) * _LINE_IN
    is_own = settings.scale == "own"
    # A panel leaves room for its own bar; a title and the gap below it take 0.3 inches.
    panel_in = (_WIDTH_IN - (0 if is_own else 0.7)) / n_columns - (0.6 if is_own else 0.1)
    rows_in = n_rows * (panel_in * height_um / width_um + 0.3)
    height_in = float(np.clip(rows_in, 1.3 * n_rows, _MAX_HEIGHT_IN - caption_in)) + caption_in + 0.25
    figure = Figure(figsize=(_WIDTH_IN, height_in))
    share = caption_in / height_in
    # The caption's room is left out of what the panels are laid out in.
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=(0, share, 1, 1 - share)))
    figure.suptitle(stored.slide_id, fontsize=_POINTS + 2, x=0.01, ha="left", parse_math=False)
    axes = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    limits = _limits(panels.values, settings.scale)
    outline = _outline(panels)
    drawn = None
    for place, gene, column, values, (low, high) in zip(
        axes, genes, columns, panels.values, limits, strict=False
    ):
        drawn = _draw_panel(place, values, panels, outline, (low, high))
        is_trusted = stored.trust is None or stored.trust[column] >= TRUSTED
        # A gene's name may hold dollars, which matplotlib would take for a formula.
        place.set_title(
            gene if is_trusted else f"{gene} (not trusted)", fontsize=_POINTS + 1, parse_math=False
        )
        if is_own:
            _colour_bar(figure, drawn, [place])
    for place in axes[len(genes) :]:
        place.set_visible(False)
    _scale_bar(axes[0], panels)
    if not is_own:
        _colour_bar(figure, drawn, list(axes))
    figure.text(
        0.01,
        share - 0.5 * _LINE_IN / height_in,
        "\n".join(caption),
        fontsize=_POINTS,
        va="top",
        parse_math=False,
        linespacing=1.2,
    )
    return figure


def _limits(values: NDArray[np.float32], scale: str | tuple[float, float]) -> list[tuple[float, float]]:
    """Return the ends of each gene's colours."""
    if not isinstance(scale, str):
        return [scale] * len(values)
    if scale == "own":
        return [_robust_range(gene) for gene in values]
    # The widest over the genes, not percentiles over all: a strong gene among weak ones would saturate.
    each = [_robust_range(gene) for gene in values]
    return [(min(low for low, _ in each), max(high for _, high in each))] * len(values)


def _robust_range(values: NDArray[np.float32]) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    if not len(known):
        return 0.0, 1.0
    low, high = (float(end) for end in np.percentile(known, _ROBUST))
    if high <= low:
        low, high = float(known.min()), float(known.max())
    return (low, high) if high > low else (low, low + 1.0)


def _outline(panels: _Panels) -> Outline | None:
    """Return the tissue's border in microns, holes included."""
    corner, step = np.asarray(panels.corner_um), panels.step_um
    rings = [
        Outline(corner + np.asarray(ring.coords) * step, closed=True)
        for piece in polygons(panels.tissue)
        for ring in (piece.exterior, *piece.interiors)
    ]
    return Outline.make_compound_path(*rings) if rings else None


def _draw_panel(
    axes: Axes,
    values: NDArray[np.float32],
    panels: _Panels,
    outline: Outline | None,
    limits: tuple[float, float],
) -> Any:
    (left, top), (width, height) = panels.corner_um, panels.size_um
    extent = (left, left + width, top + height, top)
    # Grey where tissue has no prediction: white would read as no tissue.
    missing = np.where(panels.tissue & ~np.isfinite(values), 1.0, np.nan)
    if np.isfinite(missing).any():
        axes.imshow(missing, extent=extent, cmap=_single_colour(_NO_VALUE), interpolation="nearest")
    drawn = axes.imshow(
        values, extent=extent, cmap="viridis", vmin=limits[0], vmax=limits[1], interpolation="nearest"
    )
    if outline is not None:
        axes.add_patch(PathPatch(outline, facecolor="none", edgecolor="#3c4046", linewidth=0.35))
    # Below it the room for the scale bar, in every panel: maps of different size would not compare.
    axes.set_ylim(top + (1 + 2 * _BAR_GAP) * height, top)
    axes.set_axis_off()
    return drawn


def _single_colour(colour: str) -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap([colour])


def _colour_bar(figure: Figure, drawn: Any, axes: list[Axes]) -> None:
    bar = figure.colorbar(drawn, ax=axes, shrink=0.75, pad=0.02, aspect=22, extend="both")
    bar.set_label(UNIT, fontsize=_POINTS)
    bar.ax.tick_params(labelsize=_POINTS)
    bar.outline.set_linewidth(0.4)


def bar_length_um(width_um: float) -> float:
    """Return 1, 2 or 5 times a power of ten, at most a quarter of a width: what a scale bar stands for."""
    power = 10.0 ** np.floor(np.log10(width_um / 4))
    return float(max(step * power for step in (1, 2, 5) if step * power <= width_um / 4))


def _scale_bar(axes: Axes, panels: _Panels) -> None:
    (left, top), (width, height) = panels.corner_um, panels.size_um
    length = bar_length_um(width)
    # Below the tissue, never on it: no colour of the bar is seen on all of viridis.
    y, thickness = top + (1 + _BAR_GAP) * height, 0.012 * max(height, width)
    axes.add_patch(
        Rectangle((left, y), length, thickness, facecolor="black", edgecolor="none", clip_on=False)
    )
    axes.annotate(
        f"{length:g} µm",
        (left + length, y + thickness / 2),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=_POINTS,
        annotation_clip=False,
    )


def _caption(
    stored: StoredMap,
    genes: Sequence[str],
    columns: Sequence[int],
    panels: _Panels,
    settings: FigureSettings,
) -> str:
    grid, made_by = stored.grid, stored.array.attrs.get("made_by", {})
    preset, model = str(made_by.get("preset", "")), str(made_by.get("model", ""))
    by = " ".join(filter(None, ("model", preset, model[:16] and f"({model[:16]})")))
    cells = f", averaged over {panels.merged} x {panels.merged} patches" if panels.merged > 1 else ""
    first = (
        f"Predicted, not measured: expression of {', '.join(genes)} on slide {stored.slide_id}, {UNIT}, by {by}; patches of "
        f"{grid.patch_um:g} µm every {grid.stride_um:g} µm{cells}."
    )
    sentences = [
        first,
        {
            "shared": "One colour scale for all genes, from the lowest 2nd to the highest 98th percentile of any.",
            "own": "Each gene on its own colour scale, from its 2nd to its 98th percentile.",
        }.get(str(settings.scale), "Colours span the stated limits."),
        trained_on_sentence(stored.trained_on),
        *_depth_sentence(stored),
        *_trust_sentences(stored, genes, columns),
    ]
    return " ".join(sentences)


def _depth_sentence(stored: StoredMap) -> list[str]:
    if stored.depth is None:
        return []
    depth = stored.depth.read((0, stored.grid.n_rows), (0, stored.grid.n_cols))[..., 0].astype(np.float64)
    known = depth[np.isfinite(depth)]
    if not len(known):
        return []
    low, middle, high = np.exp(np.percentile(known, (10, 50, 90)))
    return [
        f"Predicted library size: median {middle:,.0f} counts per spot (10th to 90th percentile {low:,.0f} to {high:,.0f})."
    ]


def _trust_sentences(stored: StoredMap, genes: Sequence[str], columns: Sequence[int]) -> list[str]:
    """State how far each gene can be trusted, and the half width of its interval."""
    if stored.trust is None:
        return ["The model was not calibrated: it is not known which genes can be trusted."]
    trust = stored.trust
    each = [
        f"{gene} {trust[i]:.2f}{'' if trust[i] >= TRUSTED else ' (not trusted)'}"
        for gene, i in zip(genes, columns, strict=True)
    ]
    scope = f" ({stored.scope})" if stored.scope else ""
    found = [
        f"Trust, the lower 99 % confidence limit of Pearson's r on held-out spots{scope}: {', '.join(each)}."
    ]
    if stored.half_width is not None:
        widths = [
            # With spaces that do not break: a sign stays on the line of its number.
            f"{gene} {half_width_text(stored.half_widths(i))}".replace(" ", "\N{NO-BREAK SPACE}")
            for gene, i in zip(genes, columns, strict=True)
        ]
        name = interval_name(stored.level, stored.claim)
        found.append(f"{name[0].upper()}{name[1:]}: {', '.join(widths)}.")
    return found
