"""What an AnnData and the table of a SpatialData have in common: whose a row is, and where the counts are."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histosge.data.expression.loaded_expression import SlideFrame, check_matrix
from histosge.data.expression.section_choice import (
    EVERYTHING,
    MARK,
    choose_section,
    is_named,
    listed,
    no_such_section,
)
from histosge.errors import ExpressionError

LIBRARY_COLUMNS = (
    *("library_id", "library", "library_key", "sample", "sample_id", "sample_name", "section", "section_id"),
    *("slide", "slide_id", "batch", "orig.ident", "image_id", "imageid", "capture_area"),
)
"""Columns of ``obs`` (case does not count) whose values name sections: squidpy's, scanpy's and Seurat's, and usual ones."""
OTHER_COLUMNS = ("region", "dataset", "dataset_id", "puck", "puck_id")
"""Columns that name sections in some files and parts of one section in others: used only where the row's name is in them."""
# A barcode of 10x, with what concatenating appends: "-1", "-C2", "-1-0".
_BARCODE = re.compile(r"[ACGT]{12,}")
_Rows = NDArray[np.bool_]


def choose_rows(
    obs: Any, libraries: list[str], path: Path, frame: SlideFrame
) -> tuple[_Rows, str | None, str]:
    """Return which rows are the section's, the name of its library as far as it is known, and a note.

    Parameters
    ----------
    obs
        A data frame with one row a spot.
    libraries
        Names of sections that the file has in another place; columns with just these values come first.

    Raises
    ------
    ExpressionError
        If there are several sections and none is named like the row, or nothing tells whose a spot is.
    """
    everything = np.ones(len(obs), bool)
    if frame.section == EVERYTHING:
        return everything, None, "all spots of the file"
    columns = _section_columns(obs, libraries)
    if frame.section is not None and "=" in frame.section:
        name, _, value = frame.section.partition("=")
        if name in obs:
            columns, frame = {name: _labels(obs[name])}, replace(frame, section=value)
    several = [
        name for name in columns if name.lower() in LIBRARY_COLUMNS or _is_key(columns[name], libraries)
    ]
    several = [name for name in several if len(set(columns[name]) - {""}) > 1]
    # A file that holds one section may call it anything.
    if frame.section is None and not several and not _named_part(columns, frame):
        one = next((value for value in map(_only, columns.values()) if value in libraries), None)
        if one is None and len(libraries) > 1:
            raise ExpressionError(
                f'{path} has several libraries in uns["spatial"] ({listed(libraries)}), and no column of obs tells '
                'whose a spot is; add obs["library_id"]'
            )
        _refuse_repeated_places(obs, path)
        return everything, one or next(iter(libraries), None), ""
    found = {name: own for name, labels in columns.items() if (own := _find(labels, frame, path, name))}
    rows = {name: columns[name] == value for name, value in found.items()}
    if not rows:
        if frame.section in libraries and len(libraries) == 1:
            return everything, frame.section, ""
        column = next(iter(several or columns), None)
        names = sorted(set(columns[column].tolist()) - {""}) if column else libraries
        what = f"obs {column!r}" if column else 'uns["spatial"]'
        raise no_such_section(names or [EVERYTHING], frame, path, what)
    first, *others = list(rows)
    part, value = rows[first], found[first]
    if any((rows[name] != part).any() for name in others):
        listing = ", ".join(f"{path.name}{MARK}{name}={named}" for name, named in found.items())
        raise ExpressionError(f"{path}: several columns of obs hold the row's name; give one of {listing}")
    note = f"obs {first!r} is {value!r} for {int(part.sum())} of {len(obs)} spots"
    return part, value, "" if part.all() else note


def _section_columns(obs: Any, libraries: list[str]) -> dict[str, NDArray[np.str_]]:
    """Return the columns that may tell whose a spot is, those that name the libraries first."""
    known = [*LIBRARY_COLUMNS, *OTHER_COLUMNS]
    found = {}
    for name in obs.columns:
        is_known = str(name).lower() in known
        if is_known or (libraries and obs[name].dtype.kind not in "fiu"):
            labels = _labels(obs[name])
            n = len(set(labels) - {""})
            # A column with a value of its own for each spot names spots.
            if n > 0 and (n <= 1 or 2 * n <= len(labels)) and (is_known or _is_key(labels, libraries)):
                found[str(name)] = labels
    order = {name: (not _is_key(found[name], libraries), _rank(name, known)) for name in found}
    return {name: found[name] for name in sorted(found, key=lambda name: order[name])}


def _rank(name: str, known: list[str]) -> int:
    return known.index(name.lower()) if name.lower() in known else len(known)


def _labels(column: Any) -> NDArray[np.str_]:
    """Return a column as text; empty where a value is missing."""
    missing = column.isna().to_numpy()
    values = ["" if gone else str(value) for value, gone in zip(column.tolist(), missing, strict=True)]
    return np.array(values, dtype=np.str_)


def _is_key(labels: NDArray[np.str_], libraries: list[str]) -> bool:
    values = set(labels.tolist()) - {""}
    return bool(values) and values <= set(libraries)


def _only(labels: NDArray[np.str_]) -> str | None:
    values = set(labels.tolist())
    return values.pop() if len(values) == 1 else None


def _named_part(columns: Mapping[str, NDArray[np.str_]], frame: SlideFrame) -> bool:
    """Tell whether a column of any kind holds the row's name for some spots and another for others."""
    return any(
        _only(labels) is None and any(is_named(v, frame) for v in set(labels)) for labels in columns.values()
    )


def _find(labels: NDArray[np.str_], frame: SlideFrame, path: Path, name: str) -> str | None:
    values = sorted(set(labels.tolist()) - {""})
    if not any(is_named(value, frame) for value in values):
        return None
    return choose_section(values, frame, path, f"obs {name!r}") if len(values) > 1 else values[0]


def _refuse_repeated_places(obs: Any, path: Path) -> None:
    """Refuse spots of several chips in one: two spots of a chip have neither one place nor one barcode."""
    fix = f'add obs["library_id"] with the section of each spot, or name {path.name}{MARK}{EVERYTHING} if all are of one'
    if {"array_row", "array_col"} <= set(obs.columns):
        n = int(obs[["array_row", "array_col"]].dropna().duplicated().sum())
        if n and n < len(obs) - 1:  # all alike: a column that was filled in
            raise ExpressionError(
                f"{path} holds several sections: {n} places of the array occur again; {fix}"
            )
    names = obs.index.astype(str)
    cores = [match[0] if (match := _BARCODE.search(name)) else name for name in names]
    n = len(cores) - len(set(cores))
    if n:
        raise ExpressionError(f"{path} holds several sections: {n} barcodes occur again; {fix}")


def choose_counts(data: Any, path: Path) -> tuple[Any, list[str], str]:
    """Return the first of ``layers["counts"]``, ``X`` and ``raw.X`` that holds whole numbers, its genes, and a note.

    Raises
    ------
    ExpressionError
        If there are no counts, or the matrix is damaged.
    """
    places: list[tuple[str, Any, Any]] = []
    if "counts" in data.layers:
        places.append(
            ('layers["counts"]', data.layers["counts"], data.var_names)
        )  # X is often normalised then
    if data.X is not None:
        places.append(("X", data.X, data.var_names))
    if data.raw is not None and data.raw.X is not None:
        places.append(("raw.X", data.raw.X, data.raw.var_names))
    if not places:
        layers = f" (layers hold {listed(sorted(data.layers))})" if len(data.layers) else ""
        raise ExpressionError(f'{path} has no counts: put them in X or layers["counts"]{layers}')
    for name, matrix, _ in places:
        check_matrix(matrix, f"{path}, {name}")
    # If none does, the first one is refused with its reason.
    name, matrix, genes = next((place for place in places if _are_whole(place[1])), places[0])
    note = f"counts of {name} taken, since {places[0][0]} is normalised" if name != places[0][0] else ""
    return matrix, genes.astype(str).tolist(), note


def _are_whole(matrix: Any) -> bool:
    values = matrix.data if hasattr(matrix, "tocsr") else matrix
    if values.dtype.kind in "biu":
        return bool((values >= 0).all())
    return bool((values >= 0).all() and np.array_equal(values, np.round(values)))
