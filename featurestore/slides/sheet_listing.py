"""Rows of a new sample sheet, and the file that they make."""

import csv
import os
from dataclasses import dataclass
from pathlib import Path

from featurestore.slides.sample_sheet import COLUMNS, KNOWN

PATHS = ("slide", "expression", "mask")


@dataclass(frozen=True)
class SheetListing:
    """What was found for a sample sheet.

    Parameters
    ----------
    rows
        One for each slide: values of the sheet's columns, paths absolute; what a row does not name is empty.
    left_out
        ``name: reason`` for each slide that cannot be used.
    """

    rows: tuple[dict[str, str], ...]
    left_out: tuple[str, ...] = ()


def write_sheet(listing: SheetListing, out: Path, place: Path) -> None:
    """Write a sample sheet; the column `known` stands in it where some row has it.

    Parameters
    ----------
    out
        Where the sheet will stand: paths below its folder are written relative to it, so that both can be moved.
    place
        Where to write it now.
    """
    home = out.absolute().parent
    columns = [name for name in COLUMNS if name != KNOWN or any(row.get(KNOWN) for row in listing.rows)]
    with place.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", restval="")
        writer.writeheader()
        for row in listing.rows:
            paths = {name: _relative(row.get(name, ""), home) for name in PATHS}
            writer.writerow({**row, **paths})


def _relative(path: str, home: Path) -> str:
    return os.path.relpath(path, home) if path and Path(path).is_relative_to(home) else path
