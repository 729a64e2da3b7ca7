"""Number of patches, and mean and standard deviation of their features, of each slide and of the cohort: one pass.

Moments are merged as in Chan, Golub & LeVeque (1979), "Updating formulae and a pairwise algorithm for computing
sample variances", in float64: no two large sums of squares are subtracted from each other.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurestore.analysis.patch_stream import PatchBlock, PatchStream


class Moments:
    """Count, mean and squared deviations of each feature, of all rows added so far."""

    def __init__(self, dim: int) -> None:
        self.n = 0
        self.mean = np.zeros(dim)
        self.squares = np.zeros(dim)

    def add(self, patches: PatchBlock) -> None:
        """Add the patches of one block; there may be none."""
        self.add_rows(patches.values)

    def add_rows(self, values: NDArray[Any]) -> None:
        """Add rows, ``(n, dim)``; n may be 0."""
        if not len(values):
            return
        centred = values.astype(np.float64)
        part = Moments(values.shape[1])
        part.n, part.mean = len(values), centred.mean(axis=0)
        centred -= part.mean
        part.squares = np.einsum("nd,nd->d", centred, centred)
        self.merge(part)

    def merge(self, other: Self) -> None:
        """Add the rows that another has counted."""
        if not other.n:
            return
        total = self.n + other.n
        step = other.mean - self.mean
        self.mean = self.mean + step * (other.n / total)
        self.squares = self.squares + other.squares + step**2 * (self.n * other.n / total)
        self.n = total

    @property
    def sd(self) -> NDArray[np.float64]:
        """Standard deviation of each feature with n - 1, ``(dim,)``; NaN of fewer than two rows."""
        if self.n < 2:
            return np.full(len(self.mean), np.nan)
        deviation: NDArray[np.float64] = np.sqrt(self.squares / (self.n - 1))
        return deviation


def summarise(stream: PatchStream) -> pl.DataFrame:
    """Summarise the slides of a cohort in one pass.

    Returns
    -------
    polars.DataFrame
        One row per slide and, last, one with a null `slide` for the cohort. `patches`; `absent`, tissue patches
        without an embedding; `shift`, the distance of the slide's mean from the cohort's, in the cohort's standard
        deviations (root mean square over features: a large one means another stain, scanner or tissue);
        `mean` and `sd` (n - 1) of each feature, null where there are too few patches. Where the features have names,
        as the genes of expression maps, each has a column of its means and one, ``sd_<name>``, of its deviations.
    """
    cohort = Moments(stream.dim)
    slides: list[tuple[str, Moments]] = []
    for slide, moments in stream.fold_slides(partial(Moments, stream.dim)):
        cohort.merge(moments)
        slides.append((slide.slide_id, moments))
    absent = stream.counts.absent
    rows = [_row(name, moments, absent[name], cohort) for name, moments in slides]
    vector = pl.Array(pl.Float64, stream.dim)
    frame = pl.DataFrame(
        [*rows, _row(None, cohort, absent.total(), cohort)],
        schema={
            "slide": pl.String,
            "patches": pl.Int64,
            "absent": pl.Int64,
            "shift": pl.Float64,
            "mean": vector,
            "sd": vector,
        },
        orient="row",
    )
    return frame if stream.columns is None else with_named_features(frame, stream.columns)


def with_named_features(frame: pl.DataFrame, names: Sequence[str]) -> pl.DataFrame:
    """Replace the vectors `mean` and `sd` by a column of each for every feature."""
    return frame.drop("mean", "sd").with_columns(
        frame[kind].arr.get(number, null_on_oob=True).alias(prefix + name)
        for kind, prefix in (("mean", ""), ("sd", "sd_"))
        for number, name in enumerate(names)
    )


def _row(slide_id: str | None, moments: Moments, absent: int, cohort: Moments) -> tuple[object, ...]:
    mean = moments.mean if moments.n else None
    sd = moments.sd if moments.n > 1 else None
    return slide_id, moments.n, absent, shift_from(moments, cohort), mean, sd


def shift_from(moments: Moments, cohort: Moments) -> float | None:
    """Return the distance of a mean from the cohort's, in the cohort's standard deviations; None of no rows."""
    varies = cohort.squares > 0  # a constant feature has no standard deviation to measure in
    if not moments.n or not varies.any():
        return None
    steps = (moments.mean - cohort.mean)[varies] / cohort.sd[varies]
    return float(np.sqrt(np.mean(steps**2)))
