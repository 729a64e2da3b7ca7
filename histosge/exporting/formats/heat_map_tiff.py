"""Heat maps as TIFF: a coloured picture per gene, their legend, and all values in one OME-TIFF.

Each patch is 2 x 2 pixels of half the grid's step, with as many empty pixels before the first as put the
corner onto the slide's: laid over the slide by its resolution tags, a heat map fits. So the legend is a file of its own:
inside the picture it would cover the slide or move the map.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from featurestore.names import slug
from featurestore.whole_file import whole_file
from featurestore.wording import counted
from histosge.data.expression.loaded_expression import unique_names
from histosge.exporting.export_format import ExportFormat, ExportItem, ExportSettings
from histosge.exporting.formats.ome_zarr import check_gene_count
from histosge.exporting.patch_table import PatchTable
from histosge.exporting.slide_picture import on_slide
from histosge.reporting.plots import to_svg

CM_UM = 1e4
VALUES = "values.ome"
"""Name of the file with all values, without ``.tif``."""
LEGEND = "legend.svg"
"""Name of the file with the scale of every heat map."""
CLIP = (1.0, 99.0)
"""Percentiles that the colour scale spans, so that single patches do not stretch it."""


def write_tiffs(table: PatchTable, folder: Path) -> int:
    """Write ``<gene>.tif`` per gene, ``legend.svg`` and ``values.ome.tif``; return the number of files.

    Raises
    ------
    ExportError
        If too many genes are chosen.
    """
    check_gene_count(table)
    folder.mkdir(parents=True, exist_ok=True)
    # The whole map at once, as each file is one gene of all bands: it is of `MOST_CHANNELS` genes at most.
    values = np.full((len(table.names), *table.grid.shape), np.nan, np.float32)
    for band in table.bands():
        values[:, slice(*band)] = table.read_grid_rows(band).transpose(2, 0, 1)
    mpp = table.grid.stride_um / 2  # two pixels a patch, see `on_slide`
    # Two gene names may come to the same file name, and one to that of all values.
    _, *files = unique_names([VALUES, *(slug(name) for name in table.names)])
    # All of them appear together: genes of two exports side by side would have colour scales of two maps.
    limits: list[tuple[float, float]] = []
    with ExitStack() as stack:
        for name, file, plane in zip(table.names, files, values, strict=True):
            low, high = (float(end) for end in np.nanpercentile(plane, CLIP))
            limits.append((low, high))
            description = f"{table.slide_id} {name}: {table.kind}, colours from {low:.4g} to {high:.4g}, {mpp:.6g} um/px"
            picture = on_slide(_coloured(plane, low, high), table.grid, 255)
            # Without metadata=None tifffile adds a description of its own, in JSON.
            # As bytes: tifffile takes text of 7 bits only, and a gene's name may hold a Greek letter.
            options: dict[str, Any] = {
                "photometric": "rgb",
                "description": description.encode(),
                "metadata": None,
            }
            partial = stack.enter_context(whole_file(folder / f"{file}.tif", sweep=True))
            _write_tiff(partial, picture, mpp, options)
        whole = np.stack([on_slide(plane, table.grid, np.nan) for plane in values])
        metadata = {
            "axes": "CYX",
            "Channel": {"Name": list(table.names)},
            "PhysicalSizeX": mpp,
            "PhysicalSizeY": mpp,
            "PhysicalSizeXUnit": "µm",
            "PhysicalSizeYUnit": "µm",
        }
        options = {"photometric": "minisblack", "ome": True, "metadata": metadata}
        _write_tiff(
            stack.enter_context(whole_file(folder / f"{VALUES}.tif", sweep=True)), whole, mpp, options
        )
        legend = to_svg(_legend(list(zip(table.names, limits, strict=True)), table))
        stack.enter_context(whole_file(folder / LEGEND, sweep=True)).write_bytes(legend)
    return len(table.names) + 2


def _legend(limits: Sequence[tuple[str, tuple[float, float]]], table: PatchTable) -> Figure:
    """Draw a bar with its ends for each gene: each heat map has a scale of its own."""
    columns = min(3, len(limits))
    lines = -(-len(limits) // columns)
    figure = Figure(figsize=(3.2 * columns, 0.55 * lines + 0.5), layout="constrained")
    unit = "log1p(CP10k)" if table.kind == "expression" else table.kind
    figure.suptitle(f"{table.slide_id}, {unit}", fontsize=10, parse_math=False)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for place, (name, (low, high)) in zip(axes, limits, strict=False):
        place.imshow(np.linspace(0, 1, 256)[None], cmap="viridis", aspect="auto", extent=(0, 1, 0, 1))
        place.set_yticks([])
        place.set_xticks([0, 1], [f"≤ {low:.3g}", f"≥ {high:.3g}"], fontsize=7)
        # A gene's name may hold dollars, which matplotlib would take for a formula and may refuse.
        place.set_title(name, fontsize=9, loc="left", parse_math=False)
    for place in axes[len(limits) :]:
        place.set_visible(False)
    return figure


def _write_tiff(path: Path, pixels: NDArray[Any], mpp: float, options: dict[str, Any]) -> None:
    """Write a file with its scale in the resolution tags."""
    import tifffile

    options = {"resolutionunit": "CENTIMETER", "compression": "zlib", **options}
    tifffile.imwrite(path, pixels, resolution=(CM_UM / mpp, CM_UM / mpp), **options)


def _coloured(plane: NDArray[np.float32], low: float, high: float) -> NDArray[np.uint8]:
    """Return viridis between two values; white where a patch has none."""
    from matplotlib import colormaps

    span = (plane - low) / (high - low) if high > low else np.where(np.isfinite(plane), 0.5, np.nan)
    rgb = (colormaps["viridis"](np.clip(np.nan_to_num(span), 0, 1))[..., :3] * 255).round().astype(np.uint8)
    rgb[~np.isfinite(plane)] = 255  # as the glass beside the tissue
    return np.asarray(rgb)


def _write(items: Sequence[ExportItem], path: Path, settings: ExportSettings) -> str:
    (item,) = items
    return counted(write_tiffs(item.table, path), "file")


RECORD = ExportFormat(
    "tiff",
    "a coloured heat map per gene with a legend, and all values in one OME-TIFF (QuPath, Fiji)",
    "",
    _write,
    embeddings=False,
)
