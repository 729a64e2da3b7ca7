#!/usr/bin/env python3
"""Write one of several parts of a sample sheet, so that each job of a cluster embeds its own slides.

    sheet_part.py cohort.csv 3 16 > part.csv      # slides 3, 19, 35 ... of all; counted from 0

A slide is in exactly one part. Paths are absolute in the part, so it may lie anywhere. Exit code 3: the part is empty,
because there are fewer slides than parts.
"""

import csv
import sys

from featurestore import read_samples
from featurestore.errors import FeatureStoreError
from featurestore.slides.sample_sheet import COLUMNS, Sample

EMPTY = 3


def main() -> int:
    """Print the part, and return the exit code."""
    try:
        samples, part, parts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
        if not 0 <= part < parts:
            raise ValueError
    except (IndexError, ValueError):
        sys.stderr.write("usage: sheet_part.py SAMPLES PART PARTS, with PART from 0 to PARTS - 1\n")
        return 2
    try:
        # Every PARTS-th slide: neighbours in a sheet are often of one scanner, and so of one size.
        rows = read_samples(samples)[part::parts]
    except FeatureStoreError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if not rows:
        return EMPTY
    # Not the columns that are for people alone, which a sample does not hold.
    columns = [column for column in COLUMNS if hasattr(rows[0], column)]
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(columns)
    table.writerows([_cell(row, column) for column in columns] for row in rows)
    return 0


def _cell(row: Sample, column: str) -> object:
    """Return what stands in the sheet; what was made from a file's name stays empty, as `embed --private` must see."""
    value = getattr(row, column)
    is_made = not row.is_named and column in ("slide_id", "donor") and value == row.slide_id
    return "" if is_made else value


if __name__ == "__main__":
    sys.exit(main())
