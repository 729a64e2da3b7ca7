"""How far a prediction may be off, and which genes cannot be predicted at all: measured on held-out tissue.

Split-conformal: the absolute errors at spots that a model fitted without them has predicted; the width that
covers 90 % of them is put around every prediction. Whole sections are left out in turn where there are two
or more, else buffered stripes of the lone section. The intervals hold for spots of the training's size on
tissue that is no stranger to the training's than its sections are to each other.

Terms
    half width  per gene, in log1p(CP10k): the interval is prediction +- half width, not below 0
    trust       per gene, 0..1: a lower limit (99 %) of the held-out Pearson within sections
    trusted     trust of at least `TRUSTED`; the other genes are to be left unsaid
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from histosge.metrics import correlate
from histosge.models.linear import spatial_groups
from histosge.models.model import Model, State
from histosge.sections import TrainingSection
from histosge.splits import default_buffer_um
from histosge.windows import spots_from_patches

LEVEL = 0.9
TRUSTED = 0.1
CONFIDENCE_Z = 2.33
FOLDS = 4
"""Fits that calibration costs, at most: more sections are left out several at a time."""
MANY_SPOTS = 10_000
"""Beyond, two fits on half the sections each do: they are cheap beside the final one, and hardly worse."""
PREFIX = "calibration."

Fit = Callable[[Sequence[TrainingSection]], Model]
Values = NDArray[np.float32]


@dataclass(frozen=True)
class Intervals:
    """Half widths and trust per gene.

    Parameters
    ----------
    half_width, trust
        ``(n_genes,)``, float32.
    level
        Share of held-out spots that the intervals cover.
    n_spots
        Held-out predictions behind each.
    held_out
        ``section`` or ``block``.
    """

    half_width: Values
    trust: Values
    level: float
    n_spots: int
    held_out: str

    @property
    def trusted(self) -> NDArray[np.bool_]:
        """Tell which genes can be predicted; the others make the abstain list."""
        return np.asarray(self.trust >= TRUSTED)

    def bounds(self, values: Values) -> tuple[Values, Values]:
        """Return lower and upper ends for ``(..., n_genes)`` predictions; NaN stays NaN."""
        return np.maximum(values - self.half_width, 0), values + self.half_width

    def take(self, columns: Sequence[int]) -> "Intervals":
        """Return those of some genes."""
        return replace(self, half_width=self.half_width[list(columns)], trust=self.trust[list(columns)])

    def scores(self, truth: Values, predicted: Values) -> dict[str, float]:
        """Return ``coverage_90`` (named after the level) on held-out spots, and ``trusted_share``."""
        covered = float(coverage(self, truth, predicted).mean())
        return {f"coverage_{round(100 * self.level)}": covered, "trusted_share": float(self.trusted.mean())}

    def config(self) -> dict[str, Any]:
        """Return what is no array."""
        return {"level": self.level, "n_spots": self.n_spots, "held_out": self.held_out}

    def state(self) -> State:
        """Return the arrays."""
        return {f"{PREFIX}half_width": self.half_width, f"{PREFIX}trust": self.trust}

    @classmethod
    def from_state(cls, config: dict[str, Any], state: State) -> Self:
        """Rebuild."""
        return cls(state[f"{PREFIX}half_width"], state[f"{PREFIX}trust"], **config)


def coverage(intervals: Intervals, truth: Values, predicted: Values) -> NDArray[np.float64]:
    """Return per gene the share of spots whose truth lies inside, ``(n_genes,)``."""
    lower, upper = intervals.bounds(predicted)
    return np.asarray(((truth >= lower) & (truth <= upper)).mean(axis=0), dtype=np.float64)


def calibrate(
    fit: Fit, sections: Sequence[TrainingSection], spot_um: float, *, level: float = LEVEL
) -> Intervals | None:
    """Measure a preset's errors on held-out parts of its own training sections.

    Parameters
    ----------
    fit
        Sections -> model: the preset with its settings.
    spot_um
        Diameter of a spot, for the buffer within a lone section.

    Returns
    -------
    Intervals or None
        None where no part can be left out (too few spots, or the buffer leaves none to train on).
    """
    truth, guess, label = [], [], []
    for number, (training, testing) in enumerate(held_out_parts(sections, spot_um)):
        model = fit(training)
        for place, section in enumerate(testing):
            truth.append(section.target)
            guess.append(spots_from_patches(section.overlap, model.predict(section.patches)))
            label.append(np.full(len(section.target), number * len(sections) + place))
    if sum(map(len, truth)) < 1 / (1 - level):
        return None
    target, predicted, labels = (np.concatenate(part) for part in (truth, guess, label))
    return Intervals(
        conformal_width(np.abs(target - predicted), level),
        trust_of(target, predicted, labels),
        level,
        len(target),
        "section" if len(sections) > 1 else "block",
    )


def conformal_width(error: Values, level: float) -> Values:
    """Return per gene the smallest width that covers ceil((n + 1) level) of n errors, ``(n_genes,)``."""
    rank = min(int(np.ceil((len(error) + 1) * level)), len(error)) - 1
    return np.asarray(np.partition(error, rank, axis=0)[rank], dtype=np.float32)


def trust_of(truth: Values, predicted: Values, labels: NDArray[np.int64]) -> Values:
    """Return a lower limit of the Pearson per gene, within labels, by Fisher's transform; 0 at least."""
    pearson, _ = correlate(truth.astype(np.float64), predicted.astype(np.float64), labels)
    freedom = max(len(truth) - len(np.unique(labels)) - 2, 1)
    limit = np.tanh(np.arctanh(np.clip(pearson, -0.999999, 0.999999)) - CONFIDENCE_Z / np.sqrt(freedom))
    return np.asarray(np.maximum(limit, 0.0), dtype=np.float32)


def held_out_parts(
    sections: Sequence[TrainingSection], spot_um: float
) -> Iterator[tuple[list[TrainingSection], list[TrainingSection]]]:
    """Yield training and held-out sections: whole ones, or buffered stripes of a lone one."""
    if len(sections) > 1:
        n_spots = sum(len(s.target) for s in sections)
        fold = np.arange(len(sections)) % (FOLDS if n_spots <= MANY_SPOTS else 2)
        for k in np.unique(fold):
            yield (
                [s for s, f in zip(sections, fold, strict=True) if f != k],
                [s for s, f in zip(sections, fold, strict=True) if f == k],
            )
        return
    (lone,) = sections
    buffer_um = default_buffer_um(spot_um, lone.patches.patch_um)
    stripe = spatial_groups(sections, FOLDS)
    for k in np.unique(stripe):
        gone = stripe == k
        distance = np.asarray(cKDTree(lone.spot_xy_um[gone]).query(lone.spot_xy_um)[0])
        kept = ~gone & (distance >= buffer_um)
        if kept.sum() > 1:
            yield [lone.subset(kept)], [lone.subset(gone)]
