"""An OME-Zarr picture of genes: one channel a gene, multiscale, in microns, for any NGFF viewer.

NGFF 0.4 (Zarr format 2) or 0.5 (format 3), written here: no package of the ecosystem is needed. Axes are
c, y, x; background is NaN, as nothing was predicted there. Strips of rows are in memory, never the picture.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from featurestore.wording import counted
from histosge.errors import ExportError
from histosge.exporting.export_format import ExportFormat, ExportItem, ExportSettings
from histosge.exporting.patch_table import PatchTable
from histosge.exporting.whole_zarr_folder import whole_zarr_folder

VERSIONS = ("0.4", "0.5")
MOST_CHANNELS = 64
"""Genes in one picture at most: viewers list all channels side by side, so more have to be chosen from."""
CHUNK = 256
SMALLEST = 64
"""Levels are added until both sides are at most this long."""
# Magenta and green first: readers who cannot tell red from green can tell these two apart.
COLOURS = ("FF00FF", "00FF00", "00FFFF", "FFFF00", "FF8000", "4080FF")
SHOWN = 3
"""Channels that a viewer shows at first."""


def write_ome_zarr(table: PatchTable, path: Path, version: str = "0.4") -> int:
    """Write one slide's genes; return the number of levels.

    Raises
    ------
    ExportError
        If too many genes are chosen.
    """
    check_gene_count(table)
    if version not in VERSIONS:
        raise ExportError(f"cannot write NGFF {version!r}; known: {', '.join(VERSIONS)}")
    with whole_zarr_folder(path) as partial:
        group = zarr.open_group(partial, mode="w", zarr_format=2 if version == "0.4" else 3)
        return _write_levels(table, group, version)


def _write_levels(table: PatchTable, group: Any, version: str) -> int:
    """Write every level of the pyramid, and the metadata that describes them; return the number of levels."""
    shape = (len(table.names), *table.grid.shape)
    level = _array(group, "0", shape)
    limits = _write_finest(table, level)
    n_levels = 1
    while max(level.shape[1:]) > SMALLEST:
        level = _halved(group, str(n_levels), level)
        n_levels += 1
    attrs = _metadata(table, n_levels, limits)
    # 0.5 moved everything into "ome", and the version with it.
    if version == "0.4":
        attrs["multiscales"][0]["version"] = attrs["omero"]["version"] = version
        group.attrs.update(attrs)
    else:
        group.attrs["ome"] = {"version": version, **attrs}
    return n_levels


def check_gene_count(table: PatchTable) -> None:
    """Refuse more genes than a picture can show."""
    if len(table.names) > MOST_CHANNELS:
        raise ExportError(
            f"{len(table.names)} genes are too many for one picture (at most {MOST_CHANNELS}); choose with --genes A,B"
        )


def _array(group: Any, name: str, shape: tuple[int, ...]) -> Any:
    return group.create_array(
        name,
        shape=shape,
        chunks=(1, min(CHUNK, shape[1]), min(CHUNK, shape[2])),
        dtype="float32",
        fill_value=float("nan"),
        # NGFF 0.4 asks for nested chunks, 0/0/0, where zarr's own default in format 2 is 0.0.0.
        **(
            {"chunk_key_encoding": {"name": "v2", "separator": "/"}}
            if group.metadata.zarr_format == 2
            else {"dimension_names": ("c", "y", "x")}
        ),
    )


def _write_finest(table: PatchTable, level: Any) -> NDArray[np.float64]:
    """Write the patches, strips of whole chunks at a time; return each channel's (lowest, highest) value."""
    limits = np.stack([np.full(len(table.names), np.inf), np.full(len(table.names), -np.inf)], axis=1)
    for start in range(0, table.grid.n_rows, CHUNK):
        rows = (start, min(start + CHUNK, table.grid.n_rows))
        if not table.kept[slice(*rows)].any():
            continue
        values = table.read_grid_rows(rows).transpose(2, 0, 1)
        level[:, slice(*rows)] = values
        # `initial` makes a channel without any value come out as infinity; without it numpy would warn.
        limits[:, 0] = np.fmin(limits[:, 0], np.nanmin(values, axis=(1, 2), initial=np.inf))
        limits[:, 1] = np.fmax(limits[:, 1], np.nanmax(values, axis=(1, 2), initial=-np.inf))
    return np.where(np.isfinite(limits), limits, 0.0)


def _halved(group: Any, name: str, finer: Any) -> Any:
    """Add a level of half the size: means of 2 x 2 patches, over those that have a value."""
    n, height, width = finer.shape
    level = _array(group, name, (n, -(-height // 2), -(-width // 2)))
    # Strips of whole chunks of the coarser level, so that no chunk is read back and written twice.
    for start in range(0, level.shape[1], CHUNK):
        values = np.asarray(finer[:, 2 * start : 2 * (start + CHUNK)])
        values = np.pad(
            values, ((0, 0), (0, values.shape[1] % 2), (0, values.shape[2] % 2)), constant_values=np.nan
        )
        squares = values.reshape(n, values.shape[1] // 2, 2, values.shape[2] // 2, 2)
        known = np.isfinite(squares).sum(axis=(2, 4))
        total = np.nansum(squares, axis=(2, 4))
        mean = np.divide(total, known, out=np.full(total.shape, np.nan, np.float32), where=known > 0)
        level[:, start : start + mean.shape[1]] = mean
    return level


def _metadata(table: PatchTable, n_levels: int, limits: NDArray[np.float64]) -> dict[str, Any]:
    step, first = table.grid.stride_um, table.grid.patch_um / 2
    left, top = table.grid.origin_um
    datasets = []
    for number in range(n_levels):
        scale = step * 2**number
        # NGFF places a pixel by its centre: the first of a coarser level lies between those it is made of.
        centre = first + (2**number - 1) / 2 * step
        transforms = [
            {"type": "scale", "scale": [1.0, scale, scale]},
            {"type": "translation", "translation": [0.0, top + centre, left + centre]},
        ]
        datasets.append({"path": str(number), "coordinateTransformations": transforms})
    channels = [
        {
            "label": name,
            "color": COLOURS[i % len(COLOURS)],
            "active": i < SHOWN,
            "coefficient": 1,
            "family": "linear",
            "inverted": False,
            "window": {"min": float(low), "max": float(high), "start": float(low), "end": float(high)},
        }
        for i, (name, (low, high)) in enumerate(zip(table.names, limits, strict=True))
    ]
    axes = [
        {"name": "c", "type": "channel"},
        {"name": "y", "type": "space", "unit": "micrometer"},
        {"name": "x", "type": "space", "unit": "micrometer"},
    ]
    multiscale = {
        "name": table.slide_id,
        "axes": axes,
        "datasets": datasets,
        "type": "mean",
        "metadata": {"description": "Means of 2 x 2 patches over those with a value", **table.made_by},
    }
    return {
        "multiscales": [multiscale],
        "omero": {
            "name": table.slide_id,
            "channels": channels,
            "rdefs": {"defaultT": 0, "defaultZ": 0, "model": "color"},
        },
    }


def _write(items: Sequence[ExportItem], path: Path, settings: ExportSettings) -> str:
    (item,) = items
    n_levels = write_ome_zarr(item.table, path, settings.ngff)
    return f"{counted(len(item.table.names), 'gene')}, {counted(n_levels, 'level')}"


RECORD = ExportFormat(
    "ome-zarr",
    "a multiscale picture with a channel per gene (napari, Viv, any NGFF viewer)",
    ".ome.zarr",
    _write,
    embeddings=False,
)
