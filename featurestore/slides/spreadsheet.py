"""The cells of an Excel file's first sheet as text."""

import datetime as dt
import warnings
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from featurestore.errors import SampleSheetError, first_line

MAX_UNPACKED_BYTES = 128 << 20
"""Of all parts of the file: a row takes 500 bytes of XML, so this is room for a quarter of a million slides."""
MAX_ROWS, MAX_COLUMNS = 300_000, 256
"""Cells beyond are refused: a reader yields all before the last one, and Excel has room for 17 billion."""
EXCEL_ROWS = 1 << 20
"""Rows of a sheet, by Excel's own limit: a file may number them as it likes."""
# What openpyxl 3.1 raises on files that are damaged, or made by hand.
_ERRORS = (
    *(zipfile.BadZipFile, ET.ParseError, OSError, LookupError, ValueError, TypeError, AttributeError),
    *(RuntimeError, NotImplementedError, EOFError, ArithmeticError),
)


def read_cells(path: Path) -> list[tuple[int, list[str]]]:
    """Return ``(number, cells)`` of each row of the first sheet that is not empty.

    Cells are as they would be in a CSV: whole numbers without decimals, dates as 2026-01-31, formulas as their last value.

    Raises
    ------
    SampleSheetError
        If it is no such file, or larger than any sample sheet.
    """
    try:
        with warnings.catch_warnings():
            # openpyxl warns of styles, validations and drawings that it leaves out; a sample sheet is its cells.
            warnings.simplefilter("ignore")
            return list(_rows(path))
    except _ERRORS as error:
        if isinstance(error, SampleSheetError):  # a ValueError, too
            raise
        raise SampleSheetError(
            f"{path} cannot be read as an Excel file ({first_line(error)[:120]}); save it as CSV (UTF-8)"
        ) from error


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    from openpyxl import load_workbook  # a quarter of a second, for Excel files alone

    with zipfile.ZipFile(path) as archive:
        unpacked = sum(part.file_size for part in archive.infolist())
        if unpacked > MAX_UNPACKED_BYTES:
            raise SampleSheetError(
                f"{path} unpacks to {unpacked >> 20} MB, more than {MAX_UNPACKED_BYTES >> 20}"
            )
        for name in archive.namelist():
            # Entities, of which a few grow to gigabytes, stand before the first element; Excel writes none.
            with archive.open(name) as part:
                if b"<!DOCTYPE" in part.read(1 << 20):
                    raise SampleSheetError(f"{path}: its XML defines a document type; save it as CSV (UTF-8)")
    # Row by row, and without links to other files, which it would list.
    book = load_workbook(path, read_only=True, data_only=True, keep_links=False)
    try:
        sheet = book.worksheets[0]
        # What a file says of its own extent is often wrong, and trusted otherwise.
        sheet.reset_dimensions()
        for number, row in enumerate(sheet.iter_rows(max_row=EXCEL_ROWS, values_only=True), 1):
            # openpyxl makes the rows that a file leaves out: one row with a high number has a million before it.
            if not row:
                continue
            cells = [_text(value) for value in row]
            if (number > MAX_ROWS and any(cells)) or len(cells) > MAX_COLUMNS:
                raise SampleSheetError(f"{path} has cells beyond row {MAX_ROWS} or column {MAX_COLUMNS}")
            while cells and not cells[-1]:
                cells.pop()
            if cells:
                yield number, cells
    finally:
        book.close()


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # Excel holds all numbers as floating point: an id of 7 is 7.0
    if isinstance(value, dt.datetime):
        return value.date().isoformat() if value.time() == dt.time() else value.isoformat(" ")
    return str(value).strip()
