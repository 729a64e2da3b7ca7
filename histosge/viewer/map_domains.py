"""Spatial domains over a map's patches: from the expression store, or from tables with one row per patch."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featurestore.grid import PatchGrid
from featurestore.location import Location
from featurestore.storage.zarr_metadata import read_values
from histosge.errors import ExportError, ViewError
from histosge.exporting.domain_labels import MAX_LABEL, read_label_table
from histosge.prediction.expression_store import open_optional

Labels = NDArray[np.int16]


def stored_domains(location: Location, path: str, grid: PatchGrid) -> Labels | None:
    """Return an expression store's `domain` array, ``(n_rows, n_cols)``, -1 where a patch has none."""
    array = open_optional(location, f"{path}/domain")
    if array is None or array.shape != grid.shape:
        return None
    # Floats with NaN, or integers with -1.
    values = read_values(array, f"{location.label}/{path}/domain", grid.shape, "fiu").astype(np.float64)
    known = np.isfinite(values) & (values >= 0) & (values <= MAX_LABEL)
    return np.where(known, values, -1).astype(np.int16)


def table_domains(folder: Path, slide_id: str, grid: PatchGrid) -> Labels | None:
    """Return the labels that ``<folder>/<slide id>.parquet`` gives a grid's patches; None if it has no such file.

    Raises
    ------
    ViewError
        If the table is of another grid, or holds no labels.
    """
    # By a listing, not by joining names: a slide id in a store from elsewhere may be any text.
    known = {file.stem: file for file in folder.glob("*.parquet")}
    if slide_id not in known:
        return None
    try:
        return read_label_table(known[slide_id], grid).astype(np.int16)
    except ExportError as error:
        raise ViewError(str(error)) from error
