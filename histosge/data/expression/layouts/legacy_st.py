"""Legacy ST (the arrays before Visium): a table of counts, and a file with the positions of its spots.

Terms
    counts      TSV, spots x genes or genes x spots; a spot is named ``10x13``: its place on the array
    spot file   TSV with ``x y new_x new_y pixel_x pixel_y [selected]``: array places -> slide pixels
    transform   instead of a spot file: nine numbers, an affine from array places to slide pixels,
                as row vectors (last column 0 0 1)
"""

import gzip
import re
import zlib
from collections.abc import Iterator
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TextIO, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import sparse

from featurestore.wording import counted
from histosge.data.expression.expression_layout import ExpressionLayout
from histosge.data.expression.foreign_files import reading
from histosge.data.expression.loaded_expression import (
    LoadedExpression,
    SlideFrame,
    implied_mpp,
    make_spots,
    parse_flags,
)
from histosge.errors import ExpressionError

# Of the arrays of the first ST protocol: 100 µm spots, centre to centre 200 µm.
SPOT_UM, PITCH_UM = 100.0, 200.0
SUFFIXES = (".tsv", ".tsv.gz", ".txt", ".txt.gz", ".csv", ".csv.gz")
MOST_LINE = 1 << 24
"""Letters of a line: a table of all genes has lines of 300,000, one of 10,000 spots some 100,000."""
_WORD = re.compile(r"[._-]+")
_SPOT = re.compile(r"(\d{1,6}(?:\.\d*)?)x(\d{1,6}(?:\.\d*)?)")
_MISNAMED = "give a folder with one counts table and one spot file, or name the table"


def recognises(path: Path) -> bool:
    """Tell whether this is a table of counts whose rows or columns are array places, or a folder with one."""
    return (path.is_file() and _is_counts(path)) or (path.is_dir() and bool(_counts_in(path)))


def read(path: Path, frame: SlideFrame) -> LoadedExpression:
    """Read the spots that the spot file places; `selected` 0 leaves a spot out."""
    tables = [path] if path.is_file() else _counts_in(path)
    if len(tables) != 1:
        listed = ", ".join(table.name for table in tables[:5])
        raise ExpressionError(f"{path} holds {len(tables)} counts tables ({listed}); name one in the sheet")
    names, genes, counts = _read_counts(tables[0])
    if len(set(names)) != len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ExpressionError(f"{tables[0]} has spot {twice!r} twice; give each section a table of its own")
    array = np.array([_place(name) for name in names])
    xy_px, source = _pixels(tables[0], array)
    spots = make_spots(frame, tables[0], names, xy_px * frame.mpp, counts, genes, diameter_um=SPOT_UM)
    lost = len(names) - len(spots)
    notes = [f"placed by {source}", *([f"{counted(lost, 'spot')} not placed there"] if lost else [])]
    return LoadedExpression(spots, "legacy ST", implied_mpp(array * PITCH_UM, xy_px), tuple(notes))


def _is_table(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith(SUFFIXES)


def _counts_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if _is_counts(path)]


def _is_counts(path: Path) -> bool:
    head = _head(path)
    if len(head) < 2 or len(head[1]) < 3:
        return False
    return bool(_SPOT.fullmatch(head[1][0]) or all(_SPOT.fullmatch(name) for name in head[0][1:] or ["-"]))


def _is_spot_file(path: Path) -> bool:
    head = _head(path)
    return bool(head) and "pixel_x" in head[0]


def _head(path: Path) -> list[list[str]]:
    """Return the first two lines of a table, split; empty for what is no table."""
    if not _is_table(path):
        return []
    try:
        return _lines(path, 2)
    # A cut or damaged .gz ends in one of the last two.
    except (OSError, UnicodeDecodeError, EOFError, zlib.error):
        return []


def _lines(path: Path, most: int | None = None) -> list[list[str]]:
    separator = "," if ".csv" in path.name.lower() else "\t"
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as binary:
        stream = TextIOWrapper(cast(BinaryIO, binary), encoding="utf-8-sig")
        lines = (line.rstrip("\n\r") for line in islice(_bounded(stream), most))
        return [[cell.strip('"') for cell in line.split(separator)] for line in lines if line]


def _bounded(stream: TextIO) -> Iterator[str]:
    # Not by iterating over the stream: a file of another kind may be one line of gigabytes.
    while line := stream.readline(MOST_LINE):
        yield line


def _read_counts(path: Path) -> tuple[list[str], list[str], sparse.csr_matrix]:
    """Return the spots' names, the genes' names and counts ``(n_spots, n_genes)``."""
    with reading(path, "a table of counts"):
        rows = _lines(path)
    width = len(rows[1])
    # The header may have a cell for the column of names, or not.
    columns = rows[0][1:] if len(rows[0]) == width else rows[0]
    try:
        if any(len(row) != width for row in rows[1:]) or len(columns) != width - 1 or not all(columns):
            raise ValueError("its rows differ in length")
        values = sparse.csr_matrix(np.array([row[1:] for row in rows[1:]], dtype=np.float32))
    except ValueError as error:
        raise ExpressionError(f"{path} is no table of counts: {error}") from error
    names = [row[0] for row in rows[1:]]
    if _SPOT.fullmatch(names[0]):
        return names, columns, values
    return columns, names, sparse.csr_matrix(values.T)


def _place(name: str) -> tuple[float, float]:
    match = _SPOT.fullmatch(name)
    if match is None:
        raise ExpressionError(f"{name!r} is no place on an ST array such as 10x13")
    return float(match[1]), float(match[2])


def _pixels(counts: Path, array: NDArray[np.float64]) -> tuple[NDArray[np.float64], str]:
    folders = [counts.parent, *sorted(d for d in counts.parent.parent.glob("*[sS]pot*") if d.is_dir())]
    tables = [
        path for folder in dict.fromkeys(folders) for path in sorted(folder.iterdir()) if path != counts
    ]
    spot_files = _best_matches([path for path in tables if _is_spot_file(path)], counts)
    if len(spot_files) > 1:
        listed = ", ".join(path.name for path in spot_files[:5])
        raise ExpressionError(f"{counts} could belong to several spot files ({listed}); {_MISNAMED}")
    if spot_files:
        return _by_spot_file(spot_files[0], array), spot_files[0].name
    transforms = _best_matches([p for p in tables if "transform" in p.name.lower() and p.is_file()], counts)
    if len(transforms) == 1:
        return _by_transform(transforms[0], array), transforms[0].name
    raise ExpressionError(f"{counts} has no spot file (a table with pixel_x, pixel_y) beside it; {_MISNAMED}")


def _best_matches(paths: list[Path], counts: Path) -> list[Path]:
    """Return the files that share most words of their name with a counts table: ``A1``, never ``A10``."""
    words = set(_WORD.split(counts.name)) - {"tsv", "csv", "txt", "gz"}
    shared = [len(words & set(_WORD.split(path.name))) for path in paths]
    return [path for path, n in zip(paths, shared, strict=True) if n == max(shared)]


def _by_spot_file(path: Path, array: NDArray[np.float64]) -> NDArray[np.float64]:
    separator = "," if ".csv" in path.name.lower() else "\t"
    with reading(path, "a spot file"):
        frame = pl.read_csv(path, separator=separator, infer_schema=False)
        if "selected" in frame.columns:
            frame = frame.filter(pl.Series(parse_flags(frame["selected"].to_numpy(), path)))
        frame = frame.with_columns(pl.all().cast(pl.Float64, strict=False))
        pixels = frame.select("pixel_x", "pixel_y").fill_null(np.nan).to_numpy()
        placed = {_key(row): xy for row, xy in zip(frame.select("x", "y").iter_rows(), pixels, strict=True)}
        if len(placed) < len(frame):
            raise ExpressionError(f"{path} places a spot twice; give each section a spot file of its own")
        if {"new_x", "new_y"} <= set(frame.columns):
            # A counts table names its spots by nominal or by corrected places. Where both fit, the nominal one is meant.
            finer = zip(frame.select("new_x", "new_y").iter_rows(), pixels, strict=True)
            placed = {**{_key(row): xy for row, xy in finer}, **placed}
    unplaced = np.full(2, np.nan)
    return np.array([placed.get(_key(place), unplaced) for place in array.tolist()])


def _key(place: "tuple[float, ...] | list[float]") -> tuple[float, ...]:
    """Return a place as tables agree on it: they round fractions of a step differently."""
    return tuple(round(value, 2) if value is not None else np.nan for value in place)


def _by_transform(path: Path, array: NDArray[np.float64]) -> NDArray[np.float64]:
    try:
        numbers = np.array(path.read_text().split(), dtype=np.float64)
        matrix = numbers.reshape(3, 3)
    except ValueError as error:
        raise ExpressionError(f"{path} is no affine of nine numbers: {error}") from error
    return (np.column_stack([array, np.ones(len(array))]) @ matrix)[:, :2]


# Last: to recognise it, the first lines of every table in a folder are read.
RECORD = ExpressionLayout("legacy-st", "legacy ST tables", recognises, read, order=50)
