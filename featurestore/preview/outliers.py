"""Which slides look unlike the others to an encoder: far means, by the distances of `featurestore.analysis.summary`."""

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from featurestore.analysis.patch_stream import PatchStream
from featurestore.analysis.slide_source import EmbeddingSource
from featurestore.analysis.summary import summarise
from featurestore.events import OnProgress
from featurestore.location import PathOrUrl

MIN_SLIDES = 8
"""Slides from which on one of them can be called far: quartiles of fewer say little."""
FENCE = 3.0
"""Interquartile ranges above the third quartile: Tukey's "far out" (Exploratory Data Analysis, 1977)."""


def commonest_embedding(embeddings: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    """Return the grid and encoder that most slides have, of as many the first by name; None if there is none."""
    counted = Counter(embeddings)
    return min(counted, key=lambda name: (-counted[name], name), default=None)


def slide_shifts(store: PathOrUrl, grid: str, encoder: str, on_progress: OnProgress) -> dict[str, float]:
    """Return the distance of each slide's mean embedding from the cohort's, in the cohort's standard deviations.

    Every block of the embedding is read once.

    Raises
    ------
    StoreError
        If the slides cannot be compared.
    """
    frame = summarise(PatchStream(EmbeddingSource(store, None, grid, encoder), on_progress))
    rows = frame.select("slide", "shift").drop_nulls()
    return dict(zip(rows["slide"].to_list(), rows["shift"].to_list(), strict=True))


def far_slides(shifts: Mapping[str, float]) -> set[str]:
    """Return the slides whose distance is far above those of the others; none of fewer than `MIN_SLIDES`."""
    if len(shifts) < MIN_SLIDES:
        return set()
    first, third = np.percentile(list(shifts.values()), [25, 75])
    return {name for name, shift in shifts.items() if shift > third + FENCE * (third - first)}
