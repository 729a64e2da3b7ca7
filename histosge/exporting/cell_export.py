"""Expression per cell as other tools read it: QuPath's detections with measurements, and SpatialData with outlines.

The source is the table that `histosge.exporting.cell_table.write_cells` writes, which holds the outlines.
"""

import json
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import shapely
from numpy.typing import NDArray

from featurestore.earlier_results import staged_result
from featurestore.input_file import shown
from featurestore.whole_file import check_output, whole_file
from histosge.data.expression.foreign_files import check_hdf5, reading
from histosge.errors import ExportError
from histosge.exporting.domain_labels import domain_colour
from histosge.exporting.formats.qupath import MAX_GENES
from histosge.exporting.open_tables import gene_columns
from histosge.exporting.whole_zarr_folder import whole_zarr_folder
from histosge.extras import load_extra

ROWS = 1 << 14
"""Cells in memory at once."""
_OFFSETS = ("ring_offsets", "polygon_offsets", "cell_offsets")
# Of cells whose own id is no UUID, which QuPath asks for: the same cell gets the same one in every export.
_NAMESPACE = uuid.UUID("5a1f3e06-6f0f-5b0e-9c57-0d6a4b8f2c31")
# Measured beside the genes, where the table has them.
_NUMBERS = {
    "area_um2": "Area µm^2",
    "share": "Share with a prediction",
    "log_total_counts": "log total counts",
}


def is_cell_table(path: str | Path) -> bool:
    """Tell whether a path names a table of cells, by its suffix."""
    return "://" not in str(path) and str(path).lower().endswith(".h5ad")


def export_cells(
    path: str | Path, out: str | Path, to: str, genes: Sequence[str] = (), *, overwrite: bool = False
) -> str:
    """Write a table of cells with their outlines; return what was written, in words.

    Parameters
    ----------
    path
        ``.h5ad`` that `write_cells` wrote.
    out
        ``.geojson`` for QuPath, a folder for SpatialData.
    to
        ``qupath`` or ``spatialdata``.
    genes
        All if empty.

    Raises
    ------
    ExportError
        If the format takes no cells, the table is none of cells, or a gene is not there.
    ExpressionError
        If the file cannot be read.
    EarlierResultError
        If another result is there, and `overwrite` is not set.
    MissingExtraError
        If SpatialData is not installed.
    """
    path, out = Path(path), Path(out)
    writers: dict[str, Callable[[_Cells, Path], None]] = {
        "qupath": _write_qupath,
        "spatialdata": _write_sdata,
    }
    if to not in writers:
        raise ExportError(
            f"{to} takes no table of cells; {shown(path)} is one, which is written with --to qupath or spatialdata"
        )
    if to == "qupath" and not out.name.lower().endswith((".geojson", ".json")):
        raise ExportError(f"{out.name} is no .geojson; name the file for QuPath such as cells.geojson")
    check_output(out, folder=to == "spatialdata")
    check_hdf5(path)
    with h5py.File(path) as file:
        cells = _Cells.from_file(path, file, genes)
        if to == "qupath" and len(cells.genes) > MAX_GENES:
            raise ExportError(
                f"{len(cells.genes)} genes are too many measurements (at most {MAX_GENES}); choose with --genes A,B"
            )
        with staged_result(out, overwrite=overwrite) as staged:
            writers[to](cells, staged.path)
    done = "nothing to do, " if staged.was_there else ""
    return f"{out}: {done}{len(cells)} cells with {len(cells.genes)} genes"


@dataclass(frozen=True)
class _Cells:
    """An open table of cells.

    Parameters
    ----------
    mpp
        Of the slide, microns per level-0 pixel.
    columns
        Of `genes` in the file.
    obs
        Data frame, ``(n_cells,)``.
    outlines
        MultiPolygons in level-0 pixels, ``(n_cells,)``; a cell of one part is a Polygon.
    """

    path: Path
    file: Any
    slide_id: str
    mpp: float
    genes: tuple[str, ...]
    columns: NDArray[np.int64]
    obs: Any
    outlines: NDArray[Any]

    def __len__(self) -> int:
        return len(self.outlines)

    @classmethod
    def from_file(cls, path: Path, file: Any, genes: Sequence[str]) -> "_Cells":
        from anndata.io import read_elem

        if "uns/outlines" not in file:
            raise ExportError(
                f"{shown(path)} holds no outlines of cells; give a table that was made with: histosge predict --cells"
            )
        with reading(path, "a table of cells"):
            held = file["uns/outlines"]
            offsets = tuple(held[name][:] for name in _OFFSETS)
            outlines = shapely.from_ragged_array(
                shapely.GeometryType.MULTIPOLYGON, held["coords"][:], offsets
            )
            obs, names = read_elem(file["obs"]), tuple(map(str, read_elem(file["var"]).index))
            shape, mpp = file["X"].shape, float(file["uns/histosge/slide_mpp"][()])
            slide_id = str(obs["region"].iloc[0]).removesuffix("_cells")
        if not shape == (len(obs), len(names)) == (len(outlines), len(names)):
            raise ExportError(
                f"{shown(path)} has {len(obs)} cells, {len(outlines)} outlines and values of {shape}; make it again with "
                "predict --cells"
            )
        single = shapely.get_num_geometries(outlines) == 1
        outlines[single] = shapely.get_geometry(outlines[single], 0)
        chosen = tuple(dict.fromkeys(genes)) or names
        columns = np.array(gene_columns(names, chosen, slide_id))
        return cls(path, file, slide_id, mpp, chosen, columns, obs, outlines)

    def values(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield the first cell of each batch and the values, ``(n, n_genes)``."""
        for start in range(0, len(self), ROWS):
            with reading(self.path, "a table of cells"):
                values = self.file["X"][start : start + ROWS][:, self.columns]
            yield start, values


def _write_qupath(cells: _Cells, path: Path) -> None:
    obs = cells.obs
    kinds = obs["classification"].astype(str).tolist() if "classification" in obs else [""] * len(cells)
    colours = {name: domain_colour(i) for i, name in enumerate(sorted(set(kinds) - {""}))}
    numbers = {label: obs[name].to_numpy() for name, label in _NUMBERS.items() if name in obs}
    names = obs.index.tolist()
    with whole_file(path, sweep=True) as partial, partial.open("w", encoding="utf-8") as stream:
        stream.write('{"type": "FeatureCollection", "features": [')
        for start, values in cells.values():
            shapes = shapely.to_geojson(cells.outlines[start : start + len(values)])
            for i, (row, shape) in enumerate(zip(values.astype(float).tolist(), shapes, strict=True), start):
                measured = dict(zip(cells.genes, row, strict=True))
                measured |= {label: float(column[i]) for label, column in numbers.items()}
                properties: dict[str, Any] = {"objectType": "detection", "name": names[i]}
                if kinds[i]:
                    properties["classification"] = {"name": kinds[i], "color": colours[kinds[i]]}
                properties["measurements"] = {
                    name: round(value, 4) for name, value in measured.items() if np.isfinite(value)
                }
                feature = {
                    "type": "Feature",
                    "id": _uuid(cells.slide_id, names[i]),
                    "geometry": json.loads(shape),
                    "properties": properties,
                }
                stream.write(f"{',' if i else ''}\n{json.dumps(feature)}")
        stream.write("\n]}\n")


def _uuid(slide_id: str, name: str) -> str:
    try:
        # QuPath's own: an import then updates the object that is there.
        return str(uuid.UUID(name))
    except ValueError:
        return str(uuid.uuid5(_NAMESPACE, f"{slide_id}/{name}"))


def _write_sdata(cells: _Cells, path: Path) -> None:
    load_extra("spatialdata", "writing SpatialData")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its dependencies deprecate each other
        import anndata
        import geopandas
        import spatialdata
        from spatialdata.models import ShapesModel, TableModel
        from spatialdata.transformations import Identity

        region = f"{cells.slide_id}_cells"
        # In microns, as patches and spots of other exports are, so that they lie over each other.
        outlines = shapely.transform(cells.outlines, lambda xy: xy * cells.mpp)
        frame = geopandas.GeoDataFrame(geometry=outlines, index=cells.obs["instance_id"].to_numpy())
        shapes = ShapesModel.parse(frame, transformations={cells.slide_id: Identity()})
        table = anndata.read_h5ad(cells.path, backed="r")[:, cells.columns].to_memory()
        del table.uns["outlines"], table.uns["spatialdata_attrs"]
        table.obsm["spatial"] = np.asarray(table.obsm["spatial"]) * cells.mpp
        table = TableModel.parse(table, region=region, region_key="region", instance_key="instance_id")
        data = spatialdata.SpatialData(
            shapes={region: shapes}, tables={f"{cells.slide_id}_cell_expression": table}
        )
        with whole_zarr_folder(path) as partial:
            data.write(partial)
