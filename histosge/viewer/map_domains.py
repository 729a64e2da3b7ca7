"""Spatial domains over a map's patches: from the expression store, or from tables with one row per patch."""

from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurestore.grid import PatchGrid
from featurestore.location import Location
from histosge.errors import ViewError
from histosge.prediction.expression_store import open_optional

Labels = NDArray[np.int16]
NAMES = ("domain", "cluster")
"""Columns of a table that may hold the labels, the first found."""


def stored_domains(location: Location, path: str, grid: PatchGrid) -> Labels | None:
    """Return an expression store's `domain` array, ``(n_rows, n_cols)``, -1 where a patch has none."""
    array = open_optional(location, f"{path}/domain")
    if array is None or array.shape != grid.shape:
        return None
    values = np.asarray(array[...], dtype=np.float64)
    return np.where(np.isfinite(values) & (values >= 0), values, -1).astype(np.int16)


def table_domains(folder: Path, slide_id: str, grid: PatchGrid) -> Labels | None:
    """Return the labels that ``<folder>/<slide id>.parquet`` gives a grid's patches; None if it has no such file.

    Raises
    ------
    ViewError
        If the table is of another grid, or holds no labels.
    """
    known = {file.stem: file for file in folder.glob("*.parquet")}
    if slide_id not in known:
        return None
    frame = pl.read_parquet(known[slide_id])
    name = next((n for n in NAMES if n in frame.columns), None)
    if name is None or not {"row", "col"} <= set(frame.columns):
        raise ViewError(
            f"{known[slide_id]} needs columns row, col and one of {', '.join(NAMES)}; it has {', '.join(frame.columns)}"
        )
    rows, cols = frame["row"].to_numpy(), frame["col"].to_numpy()
    inside = len(rows) > 0 and rows.max() < grid.n_rows and cols.max() < grid.n_cols
    if not inside or not _same_places(frame, grid):
        raise ViewError(f"{known[slide_id]} is of another grid than {grid.spec.key}; make it on that grid")
    labels = np.full(grid.shape, -1, np.int16)
    labels[rows, cols] = frame[name].cast(pl.Int16).fill_null(-1).to_numpy()
    return labels


def _same_places(frame: pl.DataFrame, grid: PatchGrid) -> bool:
    if not {"x_um", "y_um"} <= set(frame.columns):
        return True
    x, y = frame["x_um"].to_numpy(), frame["y_um"].to_numpy()
    expected = grid.x_um[frame["col"].to_numpy()], grid.y_um[frame["row"].to_numpy()]
    return bool(np.allclose(x, expected[0], atol=0.5) and np.allclose(y, expected[1], atol=0.5))
