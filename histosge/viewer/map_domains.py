"""Spatial domains over a map's patches: from the expression store, or from tables with one row per patch."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featurestore.grid import PatchGrid
from featurestore.location import Location
from featurestore.storage.zarr_metadata import read_attrs, read_values
from featurestore.tissue.flags import Flag
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


def domains_made_by(is_stored: bool) -> str:
    """Return who made the domains, in words for the legend."""
    if is_stored:
        return "Spatial domains, as the map's store holds them."
    return "Spatial domains, from the tables of labels that this page was given."


def quality_names(location: Location, path: str, grid: PatchGrid) -> list[str]:
    """Return the names of a grid's quality flags, by bit; none where the store holds no such array.

    Parameters
    ----------
    location
        Of a feature store.
    path
        Of the grid in it.
    """
    array = open_optional(location, f"{path}/quality")
    if array is None or array.shape != grid.shape or array.dtype != np.uint8:
        return []
    attrs = read_attrs(location, f"{path}/quality")
    masks, words = attrs.get("flag_masks"), attrs.get("flag_meanings")
    # A store from elsewhere may hold anything.
    if not isinstance(masks, list) or not isinstance(words, str):
        return [f"flag {bit + 1}" for bit in range(8)]
    named = {
        mask: word[:40] for mask, word in zip(masks, words.split(), strict=False) if isinstance(mask, int)
    }
    # It tells that focus was measured, which is true of nearly every patch: no flag to colour a map by.
    named.pop(Flag.FOCUS_KNOWN, None)
    last = max((bit for bit in range(8) if 1 << bit in named), default=7)
    return [named.get(1 << bit, f"flag {bit + 1}") for bit in range(last + 1)]
