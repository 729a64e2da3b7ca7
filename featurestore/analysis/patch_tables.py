"""Tables of an analysis: one parquet file per slide, one row per patch with its position and its results."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurestore.analysis.slide_source import SlideArray
from featurestore.errors import StoreError
from featurestore.grid import PatchGrid
from featurestore.whole_file import whole_file

Columns = Mapping[str, NDArray[np.generic]]


def check_file(file: Path) -> None:
    """Check that a table can be written to a path, and make the folder that it will be in.

    Called before an analysis starts, so that hours of reading do not end in this error.

    Raises
    ------
    StoreError
        If it is a URL or a folder, or one of its parents is a file.
    """
    if ":/" in str(file):  # one slash: a Path drops the other
        raise StoreError(
            f"tables are written on this machine, not to {file}; give a path, and copy them there"
        )
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
        If it is a URL, or it or one of its parents is a file.
    """
    check_file(folder / "slide.parquet")


def patch_positions(
    slide_id: str, grid: PatchGrid, rows: NDArray[np.int64], cols: NDArray[np.int64]
) -> pl.DataFrame:
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


MADE_BY = "made_by"
"""Key of a table's metadata that says in words how it was made."""


def write_patches(
    folder: Path,
    slide: SlideArray,
    rows: NDArray[np.int64],
    cols: NDArray[np.int64],
    columns: Columns,
    made_by: str = "",
) -> Path:
    """Write a slide's table, whole or not at all; rows in row-major order of the grid.

    Parameters
    ----------
    made_by
        How it was made, in words; kept in the file's metadata for whoever shows it.
    """
    frame = patch_positions(slide.slide_id, slide.grid, rows, cols).with_columns(
        pl.Series(name, values) for name, values in columns.items()
    )
    metadata = {MADE_BY: made_by} if made_by else None
    return write_table(frame.sort("row", "col"), folder / f"{slide.slide_id}.parquet", metadata)


def write_table(frame: pl.DataFrame, file: Path, metadata: dict[str, str] | None = None) -> Path:
    """Write a parquet file, whole or not at all."""
    with whole_file(file) as partial:
        frame.write_parquet(partial, metadata=metadata)
    return file
