"""No two slides with the same spots: a score on the one would be of spots that training saw on the other.

Terms
    mark   a number made of a spot's barcode and counts: two spots with the same mark are one measurement
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from featurestore.slides.sample_sheet import Sample
from histosge.data.sections import Spots
from histosge.errors import ExpressionError

KEPT = 512
"""Marks kept of a section, the smallest ones: two sections keep the same of the spots that they share, in 4 kB each."""
MIN_COUNTS = 5
"""Of a spot with a mark. Barcodes of two chips are the same, and spots with next to no counts are alike."""
SAME_SHARE = 0.02
"""Two sections may have this share of marks in common: spots with five counts of the same genes occur by chance."""
_ALL = np.iinfo(np.uint64).max


def spot_marks(spots: Spots) -> NDArray[np.uint64]:
    """Return the smallest marks of a section's spots, sorted, at most `KEPT`."""
    total = np.asarray(spots.counts.sum(axis=1), dtype=np.float64).ravel()
    # Whole numbers, far below 2^53: sums are exact in whatever order a matrix keeps its values.
    weights = np.random.default_rng(0).integers(1, 1000, len(spots.genes)).astype(np.float64)
    weighed = np.asarray(spots.counts.astype(np.float64) @ weights).ravel()
    table = pd.DataFrame({"barcode": spots.barcodes.astype(object), "total": total, "weighed": weighed})
    # A fixed hash of pandas, not Python's, whose results differ from run to run.
    marks = pd.util.hash_pandas_object(table[total >= MIN_COUNTS], index=False).to_numpy()
    return np.unique(marks).astype(np.uint64)[:KEPT]


class DistinctSpots:
    """Compares each section's spots with those of all before it."""

    def __init__(self) -> None:
        self._before: list[tuple[Sample, NDArray[np.uint64]]] = []

    def add(self, sample: Sample, marks: NDArray[np.uint64] | Sequence[int] | None) -> None:
        """Refuse spots that another slide has as well.

        Parameters
        ----------
        marks
            Of `spot_marks`; None is not compared.

        Raises
        ------
        ExpressionError
            Naming both slides, and the files that they take their spots from.
        """
        if marks is None or len(marks) == 0:
            return
        new = np.asarray(marks, dtype=np.uint64)
        for other, old in self._before:
            same = np.intersect1d(new, old, assume_unique=True)
            # One section may be a part of the other: the share is of the smaller one, among marks that both could keep.
            limit = min(marks[-1] if len(marks) == KEPT else _ALL for marks in (new, old))
            comparable = min(int((new <= limit).sum()), int((old <= limit).sum()))
            if len(same) > SAME_SHARE * comparable:
                raise ExpressionError(
                    f"slides {other.slide_id!r} and {sample.slide_id!r} have the same spots ({_files(other, sample)}), so "
                    "held-out scores would be of spots that were trained on; name each slide's own section, as "
                    "FILE#NAME, or keep one row"
                )
        self._before.append((sample, new))


def _files(one: Sample, other: Sample) -> str:
    return (
        str(one.expression) if one.expression == other.expression else f"{one.expression}, {other.expression}"
    )
