"""Outlines in parquet: Xenium's boundaries, a row for each corner, and GeoParquet, a row for each cell.

Read in slices of rows: a Xenium run has tens of millions of corners.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import shapely

from featurestore.input_file import shown
from histosge.data.expression.foreign_files import parquet_slices, reading
from histosge.data.expression.layouts.xenium import place_on_slide
from histosge.data.expression.loaded_expression import SlideFrame
from histosge.data.outlines.outline_batch import RawOutline
from histosge.errors import ExpressionError

VERTICES = ("cell_id", "vertex_x", "vertex_y")
_WANTED = (
    "give Xenium's cell_boundaries.parquet or nucleus_boundaries.parquet, or GeoParquet with outlines in level-0 pixels "
    "in a column geometry"
)


def read_table_outlines(file: Path, frame: SlideFrame) -> tuple[Iterator[RawOutline | None], str]:
    """Return a table's cells, and a remark on how they were placed; empty where they need no placing.

    Raises
    ------
    ExpressionError
        If it is no such table.
    """
    with reading(file, "parquet"):
        names = pl.read_parquet_schema(file)
    if set(VERTICES) <= set(names):
        home, name = file.parent, file.name
        end = next((part for part in ("_cell_boundaries", "_nucleus_boundaries") if part in name), None)
        prefix = name[: name.index(end)] if end else ""
        note = place_on_slide(home, prefix, np.zeros((1, 2)), frame)[2]
        return _xenium(file, prefix, frame, "label_id" in names), note
    if "geometry" in names:
        return _geoparquet(file), ""
    raise ExpressionError(f"{shown(file)} has columns {', '.join(list(names)[:8])}; {_WANTED}")


def _xenium(file: Path, prefix: str, frame: SlideFrame, has_labels: bool) -> Iterator[RawOutline | None]:
    rest: pl.DataFrame | None = None
    seen: set[str] = set()
    columns = [*VERTICES, *(["label_id"] if has_labels else [])]
    for part in parquet_slices(file, columns):
        with reading(file, "a table of corners"):
            part = part.with_columns(
                pl.col("cell_id").cast(pl.String), pl.col("vertex_x", "vertex_y").cast(pl.Float64)
            )
        table = part if rest is None else pl.concat([rest, part])
        # The last cell may go on in the next slice.
        last = _starts(table, has_labels)[-1]
        yield from _cells(file, prefix, table[:last], frame, has_labels, seen)
        rest = table[last:]
    if rest is not None:
        yield from _cells(file, prefix, rest, frame, has_labels, seen)


def _starts(table: pl.DataFrame, has_labels: bool) -> list[int]:
    """Return the row at which each cell begins; a cell with several nuclei has several labels."""
    keys = ["cell_id", *(["label_id"] if has_labels else [])]
    changes = table.select(pl.any_horizontal(pl.col(keys).ne_missing(pl.col(keys).shift(1)))).to_series()
    found = np.flatnonzero(changes.to_numpy())
    return [0, *(int(i) for i in found if i > 0)]


def _cells(
    file: Path, prefix: str, table: pl.DataFrame, frame: SlideFrame, has_labels: bool, seen: set[str]
) -> Iterator[RawOutline | None]:
    if not len(table):
        return
    starts = _starts(table, has_labels)
    corners = table.select("vertex_x", "vertex_y").to_numpy()
    xy_px = place_on_slide(file.parent, prefix, corners, frame)[0]
    ids, labels = table["cell_id"].gather(starts).to_list(), [None] * len(starts)
    if has_labels:
        labels = table["label_id"].gather(starts).to_list()
    for name, label, start, stop in zip(ids, labels, starts, [*starts[1:], len(table)], strict=True):
        key = f"{name}\0{label}"
        if key in seen:
            raise ExpressionError(
                f"{shown(file)} has corners of cell {name!r} in several places; sort it by cell_id and label_id"
            )
        seen.add(key)
        yield RawOutline(str(name or ""), "", [[xy_px[start:stop]]])


def _geoparquet(file: Path) -> Iterator[RawOutline | None]:
    names = pl.read_parquet_schema(file)
    named = next((name for name in ("cell_id", "id", "__index_level_0__", "index") if name in names), None)
    kinds = next((name for name in ("classification", "cell_type", "class") if name in names), None)
    columns = ["geometry", *filter(None, (named, kinds))]
    for table in parquet_slices(file, columns):
        with reading(file, "GeoParquet"):
            shapes: Any = shapely.from_wkb(table["geometry"].to_list())
        ids = table[named].cast(pl.String).to_list() if named else [""] * len(table)
        classes = table[kinds].cast(pl.String).to_list() if kinds else [""] * len(table)
        for shape, name, kind in zip(shapes, ids, classes, strict=True):
            if shape is None or shape.geom_type not in ("Polygon", "MultiPolygon"):
                yield None
                continue
            parts = [
                [np.asarray(ring.coords) for ring in (part.exterior, *part.interiors)]
                for part in shapely.get_parts(shape)
            ]
            yield RawOutline(name or "", kind or "", parts)
