"""One parquet file per slide, one row per patch: where it is, and what an analysis says of it."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurestore.errors import StoreError
from featurestore.grid import PatchGrid
from featurestore.storage.selection import SlideEmbedding
from featurestore.whole_file import whole_file

Columns = Mapping[str, NDArray[np.generic]]


def check_file(file: Path) -> None:
    """Refuse a place that no table can be written to, and make the folder that it is to lie in.

    Raises
    ------
    StoreError
        If it is a URL or a folder, or lies below a file.
    """
    if ":/" in str(file):
        raise StoreError(f"tables are written on this machine, not to {file}; give a path, and copy them on")
    if file.is_dir():
        raise StoreError(f"{file} is a folder; give the path of a file for the table")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise StoreError(
            f"{file} cannot be written: {error.filename} is a file; give another path"
        ) from error


def check_folder(folder: Path) -> None:
    """Make a folder for one table per slide.

    Raises
    ------
    StoreError
        If it is a URL, or lies at or below a file.
    """
    check_file(folder / "slide.parquet")


def places(slide_id: str, grid: PatchGrid, rows: NDArray[np.int64], cols: NDArray[np.int64]) -> pl.DataFrame:
    """Return `slide`, `row`, `col` and the patches' centres `x_um`, `y_um` in microns from the top-left."""
    frame = pl.DataFrame(
        {
            "row": rows.astype(np.int32),
            "col": cols.astype(np.int32),
            "x_um": grid.x_um[cols],
            "y_um": grid.y_um[rows],
        }
    )
    return frame.select(pl.lit(slide_id).alias("slide"), pl.all())


def write_patches(
    folder: Path, slide: SlideEmbedding, rows: NDArray[np.int64], cols: NDArray[np.int64], columns: Columns
) -> Path:
    """Write a slide's table, whole or not at all; rows in row-major order of the grid."""
    frame = places(slide.slide_id, slide.grid, rows, cols).with_columns(
        pl.Series(name, values) for name, values in columns.items()
    )
    return write_table(frame.sort("row", "col"), folder / f"{slide.slide_id}.parquet")


def write_table(frame: pl.DataFrame, file: Path) -> Path:
    """Write a parquet file, whole or not at all."""
    with whole_file(file) as partial:
        frame.write_parquet(partial)
    return file
