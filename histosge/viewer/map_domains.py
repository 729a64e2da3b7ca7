"""Spatial domains over a map's patches: from the expression store, or from tables with one row per patch."""

from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurestore.analysis.patch_tables import MADE_BY
from featurestore.grid import PatchGrid
from featurestore.location import Location
from featurestore.storage.zarr_metadata import read_attrs, read_values
from featurestore.tissue.flags import Flag
from histosge.errors import ExportError, ViewError
from histosge.exporting.domain_labels import MAX_LABEL, read_label_table
from histosge.prediction.expression_store import open_optional

Labels = NDArray[np.int16]
MOST_LETTERS = 200
"""Of what a table says about itself: two lines of a legend."""


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
    file = _table_of(folder, slide_id)
    if file is None:
        return None
    try:
        return read_label_table(file, grid).astype(np.int16)
    except ExportError as error:
        raise ViewError(str(error)) from error


def _table_of(folder: Path, slide_id: str) -> Path | None:
    # By a listing, not by joining names: a slide id in a store from elsewhere may be any text.
    return {file.stem: file for file in folder.glob("*.parquet")}.get(slide_id)


def stored_domains_made_by() -> str:
    """Return who made the domains of an expression store, in words for the legend."""
    return "Spatial domains, as the map's store holds them."


def table_domains_made_by(folder: Path, slide_id: str) -> str:
    """Return who made the domains of a table, in words for the legend: as the table says, if it does."""
    words = "Spatial domains, from the tables of labels that this page was given"
    file = _table_of(folder, slide_id)
    said = pl.read_parquet_metadata(file).get(MADE_BY, "") if file is not None else ""
    # A table from elsewhere may say anything, at any length.
    said = " ".join(said.split())[:MOST_LETTERS]
    return f"{words}: {said}." if said else f"{words}."


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
