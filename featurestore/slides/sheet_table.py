"""The rows of a sample sheet as text: from any encoding and separator that spreadsheets write, or one line of refusal."""

import codecs
import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from featurestore.errors import SampleSheetError, first_line
from featurestore.slides.spreadsheet import read_cells

EXCEL = (".xlsx", ".xlsm")
OTHER_SPREADSHEETS = (".xls", ".ods", ".numbers")
SPREADSHEETS = (*EXCEL, *OTHER_SPREADSHEETS)
SHEETS = (".csv", ".tsv", ".txt")
MAX_BYTES = 64 << 20
"""A row takes some 100 bytes, so this is room for half a million slides."""
SEPARATORS = ",;\t"
_SAVE = "save it as CSV (UTF-8)"


def read_table(path: Path, columns: Sequence[str]) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Return the names of a sheet's columns, and its rows by their line in the file.

    Parameters
    ----------
    columns
        Known names: the separator is the one that gives most of them, and case does not count.

    Raises
    ------
    SampleSheetError
        If the file is no text with a header, or a row does not fit it.
    """
    names: list[str] = []
    rows: list[tuple[int, dict[str, str]]] = []
    lines = read_cells(path) if path.suffix.lower() in EXCEL else _csv_cells(path, columns)
    for line, cells in lines:
        values = [cell.strip() for cell in cells]
        if not any(values):
            continue  # spreadsheets write rows of commas for cells that were once used
        if names:
            rows.append((line, _row(path, line, names, values)))
        else:
            names = _header(path, values, columns)
    if not names:
        raise SampleSheetError(f"{path} is no table with a header: it is empty")
    return names, rows


def _csv_cells(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    text = _decode(path)
    separator = max(SEPARATORS, key=lambda mark: _known(text, mark, columns))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as error:
        raise SampleSheetError(
            f"{path} is no CSV with a header: line {reader.line_num}: {first_line(error)}"
        ) from error


def _decode(path: Path) -> str:
    if path.suffix.lower() in OTHER_SPREADSHEETS:
        raise SampleSheetError(f"{path} is a spreadsheet of a kind that is not read; {_SAVE}, or as .xlsx")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SampleSheetError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_BYTES:
        raise SampleSheetError(f"{path} is no CSV with a header: it has more than {MAX_BYTES >> 20} MB")
    # Excel's "Unicode text" is UTF-16, its "CSV UTF-8" begins with a byte-order mark.
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        # Which of the 8-bit encodings it is cannot be known, and a wrong one names another file.
        line = data[: error.start].count(b"\n") + 1
        raise SampleSheetError(f"{path}, line {line}: letters are not in UTF-8; {_SAVE}") from error
    if "\0" in text:
        raise SampleSheetError(f"{path} is no CSV with a header: it holds binary data; {_SAVE}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _known(text: str, separator: str, columns: Sequence[str]) -> int:
    first = next((line for line in text.split("\n") if line.strip()), "")
    return sum(name.strip(' "').lower() in columns for name in first.split(separator))


def _header(path: Path, values: list[str], columns: Sequence[str]) -> list[str]:
    names = [name.lower() if name.lower() in columns else name for name in values]
    while names and not names[-1]:
        names.pop()
    for name in names:
        if names.count(name) > 1:
            raise SampleSheetError(f"{path} has two columns {name!r}; keep one")
    return names


def _row(path: Path, line: int, names: list[str], values: list[str]) -> dict[str, str]:
    if any(values[len(names) :]):
        raise SampleSheetError(
            f"{path}, line {line}: {len(values)} cells, and the header names {len(names)} columns; put a value that "
            "holds a separator in quotes"
        )
    short = [""] * (len(names) - len(values))
    return dict(zip(names, [*values, *short], strict=False))
