"""Expression per cell: the area-weighted mean of a map under each outline, as AnnData that is written batch by batch.

A map is no finer than its patches or groups of tokens: cells under one patch get the same values. The file states it.

Terms
    share   of a cell's area that lies on patches with a prediction
"""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import shapely
from numpy.typing import NDArray
from scipy import sparse

from featurestore.blocks import Block
from featurestore.byte_cache import ByteCache
from featurestore.earlier_results import staged_result
from featurestore.events import OnMessage, ignore_message
from featurestore.exchange.hdf5_file import Hdf5File, whole_hdf5
from featurestore.input_file import shown
from featurestore.whole_file import check_output
from histosge.data.expression.loaded_expression import SlideFrame
from histosge.data.outlines.open_outlines import open_outlines
from histosge.data.outlines.outline_batch import OutlineBatch
from histosge.data.outlines.polygon_overlap import PolygonOverlap, patch_span, polygon_overlap
from histosge.errors import ExportError
from histosge.exporting.open_tables import table_of_map
from histosge.exporting.patch_table import PatchTable
from histosge.prediction.stored_map import StoredMap

MIN_CELL_UM, MAX_CELL_UM = 2.5, 100.0
"""Diameter of the median outline: nuclei of platelets and of megakaryocytes lie within. Microns taken for pixels do not."""
DEPTH = "log_total_counts"
MAX_PATCHES = 4096
"""Under one outline: more are a region, of which an intersection with each patch would take minutes."""
_BLOCK_BYTES = 1 << 28
# Of the values in one chunk of the file: rows are written and read in pieces of this size.
_CHUNK_BYTES = 1 << 20
_ROWS = 1 << 11
# Written at once: a copy of all sums would double what memory holds.
_SUM_BYTES = 1 << 27
# Of the sums of the cells that are added up together: all cells of a batch with 1,000 genes, a twentieth with 20,000.
# Fewer would read a block once for each piece, where cells of one block stand far apart in the file.


@dataclass(frozen=True)
class WrittenCells:
    """What was written.

    Parameters
    ----------
    cells
        Rows of the table.
    off_map, broken
        Cells that were left out: over no patch with a prediction; no area, or positions that are no numbers.
    resolution
        What the values resolve, as the file states it.
    was_there
        Whether the same table was there already.
    """

    cells: int
    off_map: int
    broken: int
    resolution: str
    was_there: bool


def check_outlines(file: str | Path, frame: SlideFrame) -> None:
    """Read the first outlines, so that a file that cannot be used is refused before hours of prediction.

    Raises
    ------
    ExpressionError, ExportError
        If it is no file with outlines, or they are no cells.
    """
    batches, _ = open_outlines(file, frame)
    first = next(batches, None)
    if first is not None and len(first):
        _check_size(first, file, frame.mpp)


def write_cells(
    stored: StoredMap,
    file: str | Path,
    path: str | Path,
    frame: SlideFrame,
    *,
    overwrite: bool = False,
    force: bool = False,
    on_message: OnMessage = ignore_message,
) -> WrittenCells:
    """Write the expression of each outlined cell as ``.h5ad``, in the order of the file.

    ``X`` is log1p(CP10k), float32. ``obs`` has the centroid in microns, `area_um2`, `share`, `n_patches`,
    `classification` where the file states one, `log_total_counts` where the model predicts it, and `region` and
    `instance_id` as SpatialData links tables to shapes. ``obsm["spatial"]`` is the centroid in level-0 pixels.
    ``uns["outlines"]`` holds the outlines in level-0 pixels, as ``shapely.from_ragged_array`` takes them.

    Memory holds one batch of cells, the blocks of the map that were read last, and some hundred bytes for every cell.

    Parameters
    ----------
    stored
        The map, whole.
    file
        See `histosge.data.outlines.open_outlines.open_outlines`.
    frame
        The slide of both.
    force
        Write also where fewer than half of the cells lie on the map.

    Raises
    ------
    ExpressionError, ExportError, EarlierResultError
        If the file cannot be read, holds no cells, or cells of another slide or scale; or `path` holds another result.
    """
    path = Path(path)
    check_output(path)
    if path.suffix != ".h5ad":
        raise ExportError(f"{path.name} is no .h5ad; cells are written as AnnData, such as cells.h5ad")
    batches, note = open_outlines(file, frame)
    if note:
        on_message(f"{shown(file)}: {note}")
    table = table_of_map(stored)
    with staged_result(path, overwrite=overwrite) as staged, whole_hdf5(staged.path) as opened:
        writer = _Writer(opened, table, file)
        for batch in batches:
            writer.add(batch)
        writer.check(force=force)
        resolution = writer.finish()
    _report(writer, file, on_message)
    return WrittenCells(writer.n_written, writer.off_map, writer.broken, resolution, staged.was_there)


def _report(writer: "_Writer", file: str | Path, on_message: OnMessage) -> None:
    if writer.off_map:
        on_message(
            f"{writer.off_map} of {writer.n_read} cells lie where nothing is predicted, and are left out"
        )
    if writer.broken:
        on_message(
            f"{writer.broken} outlines of {shown(file)} enclose no area, or their corners are no numbers; they are left out"
        )
    if writer.other:
        on_message(f"{writer.other} features of {shown(file)} are points or lines, and are left out")


def _check_size(batch: OutlineBatch, file: str | Path, mpp: float) -> None:
    """Refuse outlines of which the median is no cell: most likely they are in microns, or of another level."""
    diameters = 2 * np.sqrt(shapely.area(batch.polygons) / np.pi) * mpp
    middle = float(np.median(diameters))
    if not MIN_CELL_UM <= middle <= MAX_CELL_UM:
        raise ExportError(
            f"the median outline of {shown(file)} is {middle:.3g} µm wide at {mpp:.4g} µm per pixel, cells are "
            f"{MIN_CELL_UM:g} to {MAX_CELL_UM:g} µm; give outlines of cells in level-0 pixels of this slide"
        )


def resolution_text(stored_patch_um: float, stride_um: float, tokens: int, cell_um: float) -> str:
    """State what the values of cells resolve.

    Parameters
    ----------
    stored_patch_um, stride_um
        Side of a patch or group of tokens of the map's grid, and the step between them.
    tokens
        Groups of tokens along a patch's side; 1 for a grid of patches.
    cell_um
        Diameter of the median cell.
    """
    what = f"group of tokens of {stored_patch_um:g} µm" if tokens > 1 else f"patch of {stored_patch_um:g} µm"
    return (
        f"The map has one value for each {what}, every {stride_um:g} µm; the median cell is {cell_um:.3g} µm wide. A cell's "
        "value is the area-weighted mean of the map under its outline: cells under the same patch get the same values, and "
        "it is no measurement of the single cell."
    )


@dataclass
class _Columns:
    """Values of the cells that were written, batch by batch."""

    ids: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    numbers: dict[str, list[NDArray[Any]]] = field(default_factory=dict)

    def add(self, ids: list[str], classes: list[str], **numbers: NDArray[Any]) -> None:
        self.ids += ids
        self.classes += classes
        for name, values in numbers.items():
            self.numbers.setdefault(name, []).append(values)

    def joined(self, name: str) -> NDArray[Any]:
        parts = self.numbers.get(name, [])
        return np.concatenate(parts) if parts else np.empty(0)


class _Writer:
    """Appends batches of cells to an HDF5 file."""

    def __init__(self, opened: Hdf5File, table: PatchTable, file: str | Path) -> None:
        self._opened, self._table, self._file = opened, table, file
        self._blocks: ByteCache[NDArray[np.float32]] = ByteCache(_BLOCK_BYTES, lambda values: values.nbytes)
        self._planned = {block.index: block for block in table.planned}
        self._columns = _Columns()
        self._sizes: list[NDArray[np.float64]] = []
        self.n_read = self.n_written = self.off_map = self.broken = self.other = 0
        n_genes = len(table.names)
        rows = max(1, _CHUNK_BYTES // (4 * n_genes))
        self._X = opened.file.create_dataset(
            "X", (0, n_genes), maxshape=(None, n_genes), chunks=(rows, n_genes), dtype="f4"
        )
        self._X.attrs.update(_ARRAY)
        group = _mapping(_mapping(opened.file, "uns"), "outlines")
        self._xy = _growing(group, "coords", 2)
        self._rings, self._polygons, self._cells = (
            _growing(group, name) for name in ("ring_offsets", "polygon_offsets", "cell_offsets")
        )
        for offsets in (self._rings, self._polygons, self._cells):
            _append(offsets, np.zeros(1, np.int64))

    def add(self, batch: OutlineBatch) -> None:
        self.broken += batch.broken
        self.other += batch.other
        self.n_read += len(batch)
        if not len(batch):
            return
        table, grid = self._table, self._table.grid
        if not self._sizes:
            _check_size(batch, self._file, grid.slide_mpp)
        self._check_extent(batch)
        overlap = polygon_overlap(batch.polygons, grid)
        area = shapely.area(batch.polygons) * grid.slide_mpp**2
        # Diameters of a sample, for the median: all of millions are not needed.
        self._sizes.append(2 * np.sqrt(area[::16] / np.pi))
        covered, n_patches = self._add_means(overlap, len(batch))
        kept = np.flatnonzero(covered > 0)
        self.off_map += len(batch) - len(kept)
        if not len(kept):
            return
        centre = shapely.get_coordinates(shapely.centroid(batch.polygons[kept]))
        numbers: dict[str, NDArray[Any]] = {
            "x_um": centre[:, 0] * grid.slide_mpp,
            "y_um": centre[:, 1] * grid.slide_mpp,
            "area_um2": area[kept],
            "share": np.minimum(covered[kept] / area[kept], 1.0).astype(np.float32),
            "n_patches": n_patches[kept].astype(np.int32),
        }
        if DEPTH in table.per_patch:
            numbers[DEPTH] = _mean_of(table.per_patch[DEPTH], overlap, len(batch))[kept]
        self._columns.add(
            [batch.ids[i] or f"{table.slide_id}_cell_{self.n_read - len(batch) + int(i)}" for i in kept],
            [batch.classes[i] for i in kept],
            **numbers,
        )
        self._add_outlines(batch.polygons[kept])
        self.n_written += len(kept)
        self._opened.check()

    def _check_extent(self, batch: OutlineBatch) -> None:
        span = patch_span(shapely.bounds(batch.polygons), self._table.grid)
        under = np.maximum(span[:, 2] - span[:, 0] + 1, 0) * np.maximum(span[:, 3] - span[:, 1] + 1, 0)
        if under.max() > MAX_PATCHES:
            i = int(under.argmax())
            left, top, right, bottom = shapely.bounds(batch.polygons[i]) * self._table.grid.slide_mpp
            raise ExportError(
                f"outline {batch.ids[i] or i} of {shown(self._file)} spans {right - left:.0f} x {bottom - top:.0f} µm: "
                "that is no cell; give outlines of cells alone, and regions to: histosge analyse pseudobulk --regions"
            )

    def _add_means(self, overlap: PolygonOverlap, n: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Append area-weighted means of the cells with a prediction; return its area and patches, ``(n,)`` each."""
        step = max(1, _SUM_BYTES // (8 * len(self._table.names)))
        covered, n_patches = np.zeros(n), np.zeros(n, np.int64)
        for start in range(0, n, step):
            stop = min(start + step, n)
            # Pairs come polygon by polygon.
            pairs = slice(*np.searchsorted(overlap.polygon, (start, stop)))
            piece = PolygonOverlap(
                overlap.polygon[pairs] - start,
                overlap.row[pairs],
                overlap.col[pairs],
                overlap.area_um2[pairs],
            )
            total, covered[start:stop], n_patches[start:stop] = self._sums(piece, stop - start)
            kept = covered[start:stop] > 0
            # In place: of many genes these sums are most of what memory holds.
            np.divide(total, covered[start:stop, None], out=total, where=kept[:, None])
            rows = np.flatnonzero(kept)
            for part in np.split(rows, range(_ROWS, len(rows), _ROWS)):
                _append(self._X, total[part].astype(np.float32))
        return covered, n_patches

    def _sums(
        self, overlap: PolygonOverlap, n: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        """Return area-weighted sums ``(n, n_genes)``, the area with a prediction, and the number of its patches."""
        array = self._table.array
        total = np.zeros((n, len(self._table.names)))
        covered, n_patches = np.zeros(n), np.zeros(n, np.int64)
        height, width = array.block_shape
        place = overlap.row // height * (-(-self._table.grid.n_cols // width)) + overlap.col // width
        order = np.argsort(place, kind="stable")
        borders = np.flatnonzero(np.diff(place[order])) + 1
        for pairs in np.split(order, borders):
            if not len(pairs):
                continue
            index = int(overlap.row[pairs[0]] // height), int(overlap.col[pairs[0]] // width)
            block = self._planned.get(index)
            if block is None:  # no tissue
                continue
            values = self._read(block)
            inside = (
                (overlap.row[pairs] - block.rows[0]) * block.shape[1] + overlap.col[pairs] - block.cols[0]
            )
            known = np.isfinite(values[inside]).any(axis=1)
            pairs, inside = pairs[known], inside[known]
            cells, rows = np.unique(overlap.polygon[pairs], return_inverse=True)
            weights = sparse.csr_matrix(
                (overlap.area_um2[pairs], (rows, inside)), shape=(len(cells), len(values))
            )
            used = np.unique(inside)
            total[cells] += weights[:, used] @ values[used].astype(np.float64)
            covered += np.bincount(overlap.polygon[pairs], overlap.area_um2[pairs], n)
            n_patches += np.bincount(overlap.polygon[pairs], minlength=n)
        return total, covered, n_patches

    def _read(self, block: Block) -> NDArray[np.float32]:
        def read() -> NDArray[np.float32]:
            return self._table.read_block(block).reshape(-1, len(self._table.names))

        return self._blocks.get(block.index, read)

    def _add_outlines(self, polygons: NDArray[Any]) -> None:
        # All as MultiPolygons: one layout for a file, whatever its cells are.
        parts, cell = shapely.get_parts(polygons, return_index=True)
        rings, part = shapely.get_rings(parts, return_index=True)
        coords, ring = shapely.get_coordinates(rings, return_index=True)
        for dataset, index, n in (
            (self._rings, ring, len(rings)),
            (self._polygons, part, len(parts)),
            (self._cells, cell, len(polygons)),
        ):
            _append(dataset, int(dataset[-1]) + np.cumsum(np.bincount(index, minlength=n)))
        _append(self._xy, coords)

    def check(self, *, force: bool) -> None:
        """Refuse a file without cells, and one of which most lie beside the map."""
        if not self.n_written:
            raise ExportError(
                f"{shown(self._file)} has {self.n_read} outlines of cells, none on the map of {self._table.slide_id!r}; "
                "give outlines of this slide, in level-0 pixels"
            )
        if self.off_map > self.n_written and not force:
            raise ExportError(
                f"only {self.n_written} of {self.n_read} cells of {shown(self._file)} lie on the map of "
                f"{self._table.slide_id!r}: they may be of another slide or scale; give its level-0 pixels, or take "
                "them with --force"
            )

    def finish(self) -> str:
        """Write what is known of rows and columns; return the statement of the resolution."""
        import pandas as pd
        from anndata.io import write_elem

        table, columns, grid = self._table, self._columns, self._table.grid
        file = self._opened.file
        region = f"{table.slide_id}_cells"
        obs = pd.DataFrame(
            {name: columns.joined(name) for name in columns.numbers}, index=pd.Index(_unique(columns.ids))
        )
        obs["region"] = pd.Categorical([region] * len(obs))
        obs["instance_id"] = np.arange(len(obs), dtype=np.int64)
        if any(columns.classes):
            obs["classification"] = pd.Categorical(columns.classes)
        var = pd.DataFrame(dict(table.per_column), index=pd.Index(list(table.names)))
        cell_um = float(np.median(np.concatenate(self._sizes)))
        resolution = resolution_text(grid.patch_um, grid.stride_um, grid.tokens, cell_um)
        xy_px = np.stack([columns.joined("x_um"), columns.joined("y_um")], axis=1) / grid.slide_mpp
        uns: dict[str, Any] = {
            "histosge": {
                "made_by": dict(table.made_by),
                "values": "log1p of counts per 10,000",
                "resolution": resolution,
                "patch_um": grid.patch_um,
                "stride_um": grid.stride_um,
                "slide_mpp": grid.slide_mpp,
                "left_out": {"off_map": self.off_map, "broken": self.broken, "other": self.other},
            },
            "log1p": {"base": np.e},
            "spatialdata_attrs": {"region": region, "region_key": "region", "instance_key": "instance_id"},
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=UserWarning)
            warnings.simplefilter("ignore", category=FutureWarning)
            write_elem(file, "obs", obs)
            write_elem(file, "var", var)
            write_elem(file, "obsm", {"spatial": xy_px})
            for name, value in uns.items():
                write_elem(file["uns"], name, value)
            for name in ("layers", "obsp", "varm", "varp"):
                write_elem(file, name, {})
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        return resolution


# As anndata's documentation of its files on disk has it; its own writer takes no array that grows.
_ARRAY = {"encoding-type": "array", "encoding-version": "0.2.0"}


def _mapping(parent: Any, name: str) -> Any:
    group = parent.create_group(name)
    group.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
    return group


def _growing(group: Any, name: str, width: int = 0) -> Any:
    shape, dtype = ((0, width), "f8") if width else ((0,), "i8")
    dataset = group.create_dataset(
        name, shape, maxshape=(None, *shape[1:]), chunks=(1 << 14, *shape[1:]), dtype=dtype
    )
    dataset.attrs.update(_ARRAY)
    return dataset


def _append(dataset: h5py.Dataset, values: NDArray[Any]) -> None:
    start = len(dataset)
    dataset.resize(start + len(values), axis=0)
    dataset[start:] = values


def _mean_of(plane: NDArray[Any], overlap: PolygonOverlap, n: int) -> NDArray[np.float32]:
    """Return area-weighted means of a plane, ``(n,)``, over its patches with a value; NaN without any."""
    values = np.asarray(plane, dtype=np.float64)[overlap.row, overlap.col]
    known = np.isfinite(values)
    area = overlap.area_um2[known]
    total = np.bincount(overlap.polygon[known], area * values[known], n)
    weight = np.bincount(overlap.polygon[known], area, n)
    mean = np.divide(total, weight, out=np.full(n, np.nan), where=weight > 0)
    return np.asarray(mean, dtype=np.float32)


def _unique(ids: list[str]) -> list[str]:
    """Append a number to ids that come again: AnnData needs a name for each row."""
    if len(set(ids)) == len(ids):
        return ids
    seen: dict[str, int] = {}
    taken = set(ids)
    names = []
    for name in ids:
        number = seen.get(name, 0)
        unique = name
        while number and (unique := f"{name}-{number}") in taken:
            number += 1
        seen[name] = number + 1
        taken.add(unique)
        names.append(unique)
    return names
