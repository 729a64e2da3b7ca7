"""Parquet, for polars, DuckDB, R: one row per patch, its place, and a column per gene; streamed."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from polars.io.plugins import register_io_source

from featurestore.whole_file import whole_file
from histosge.data.expression.loaded_expression import unique_names
from histosge.exporting.export_format import ExportFormat, ExportItem, ExportSettings
from histosge.exporting.patch_table import PatchTable

PLACE = {
    "slide": pl.String,
    "row": pl.Int32,
    "col": pl.Int32,
    "x_um": pl.Float64,
    "y_um": pl.Float64,
}


def write_parquet(table: PatchTable, path: Path) -> int:
    """Write one slide's table; return the number of rows.

    A gene called like a column of `PLACE` gets ``gene_`` before its name, and a name that comes twice a number behind it.
    """
    # A gene may be called "row" or "col"; two columns of one name no reader of parquet takes.
    names = [f"gene_{name}" if name in PLACE or name in table.per_patch else name for name in table.names]
    names = list(unique_names([*PLACE, *table.per_patch, *names]))[-len(table.names) :]
    extra = {name: values[table.kept] for name, values in table.per_patch.items()}
    xy_um = table.xy_um

    def frames(
        with_columns: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, batch_size: int | None
    ) -> Iterator[pl.DataFrame]:
        # What polars could push down to the source is not looked at: writing a file takes all rows and columns.
        for rows, values in table.chunks():
            place = {
                "slide": [table.slide_id] * len(values),
                "row": table.rows[rows],
                "col": table.cols[rows],
                "x_um": xy_um[rows, 0],
                "y_um": xy_um[rows, 1],
                **{name: further[rows] for name, further in extra.items()},
            }
            frame = pl.DataFrame(place, schema_overrides=PLACE)
            yield frame.hstack(pl.from_numpy(values, schema=names)).select(list(schema))

    types = {name: pl.Series(values[:0]).dtype for name, values in extra.items()}
    schema: dict[str, Any] = {**PLACE, **types, **dict.fromkeys(names, pl.Float32)}
    with whole_file(path, sweep=True) as partial:
        register_io_source(frames, schema=schema).sink_parquet(partial)
    return len(table)


def _write(items: Sequence[ExportItem], path: Path, settings: ExportSettings) -> str:
    (item,) = items
    write_parquet(item.table, path)
    return item.table.size_in_words


RECORD = ExportFormat(
    "parquet",
    "a row per patch, a column per gene or feature (polars, DuckDB, R)",
    ".parquet",
    _write,
)
