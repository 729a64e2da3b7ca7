"""How far a prediction may be off, and which genes cannot be predicted at all: measured on held-out tissue.

Split-conformal: the absolute errors at spots that a model fitted without them has predicted; the width that
covers 90 % of them is put around every prediction. Whole sections are left out in turn where there are two
or more, else buffered stripes of the lone section. The intervals hold for spots of the training's size on
tissue that is no stranger to the training's than its sections are to each other.

A spot with few counts is noisier. Where the model predicts depth, and where that is better on folds left out, each
stratum of predicted depth has half widths of its own (`depth_strata`).

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

from histosge.calibration.depth_strata import DepthStrata, choose_strata, conformal_width
from histosge.data.sections import Patches, TrainingSection
from histosge.data.spot_overlap import spots_from_patches
from histosge.heldout.metrics import correlate
from histosge.heldout.splits import default_buffer_um
from histosge.models.linear_algebra import spatial_groups
from histosge.models.protocol import DepthModel, Model, State

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
    strata
        Half widths by predicted depth, where they are better than one; `half_width` is that one.
    """

    half_width: Values
    trust: Values
    level: float
    n_spots: int
    held_out: str
    strata: DepthStrata | None = None

    @property
    def trusted(self) -> NDArray[np.bool_]:
        """Tell which genes can be predicted; the others make the abstain list."""
        return np.asarray(self.trust >= TRUSTED)

    def bounds(self, values: Values, depth: NDArray[np.floating] | None = None) -> tuple[Values, Values]:
        """Return lower and upper ends for ``(..., n_genes)`` predictions; NaN stays NaN.

        Where there are strata, the depth predicted with them, ``(...,)``, says which holds; without it, the one
        half width of all is used.
        """
        half_width = self.half_width
        if self.strata is not None and depth is not None:
            half_width = self.strata.at(depth)
        return np.maximum(values - half_width, 0), values + half_width

    def take(self, columns: Sequence[int]) -> "Intervals":
        """Return those of some genes."""
        some = list(columns)
        strata = self.strata.take(some) if self.strata else None
        return replace(self, half_width=self.half_width[some], trust=self.trust[some], strata=strata)

    def scores(
        self, truth: Values, predicted: Values, depth: NDArray[np.floating] | None = None
    ) -> dict[str, float]:
        """Return ``coverage_90`` (named after the level) on held-out spots, and ``trusted_share``."""
        covered = float(coverage(self, truth, predicted, depth).mean())
        return {f"coverage_{round(100 * self.level)}": covered, "trusted_share": float(self.trusted.mean())}

    def config(self) -> dict[str, Any]:
        """Return what is no array."""
        strata = len(self.strata.half_width) if self.strata else 1
        return {
            "level": self.level,
            "n_spots": self.n_spots,
            "held_out": self.held_out,
            "depth_strata": strata,
        }

    def state(self) -> State:
        """Return the arrays."""
        arrays = {"half_width": self.half_width, "trust": self.trust}
        if self.strata is not None:
            arrays |= {"depth_edge": self.strata.edges, "half_width_by_depth": self.strata.half_width}
        return {f"{PREFIX}{name}": array for name, array in arrays.items()}

    @classmethod
    def from_state(cls, config: dict[str, Any], state: State) -> Self:
        """Rebuild; models from before there were strata have none."""
        strata, facts = None, {key: value for key, value in config.items() if key != "depth_strata"}
        if config.get("depth_strata", 1) > 1:
            strata = DepthStrata(state[f"{PREFIX}depth_edge"], state[f"{PREFIX}half_width_by_depth"])
        return cls(state[f"{PREFIX}half_width"], state[f"{PREFIX}trust"], **facts, strata=strata)


def coverage(
    intervals: Intervals, truth: Values, predicted: Values, depth: NDArray[np.floating] | None = None
) -> NDArray[np.float64]:
    """Return per gene the share of spots whose truth lies inside, ``(n_genes,)``."""
    lower, upper = intervals.bounds(predicted, depth)
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
    truth, guess, depths, label, fold = [], [], [], [], []
    for number, (training, testing) in enumerate(held_out_parts(sections, spot_um)):
        model = fit(training)
        for place, section in enumerate(testing):
            values, depth = at_spots(model, section)
            truth.append(section.target)
            guess.append(values)
            depths.append(depth)
            label.append(np.full(len(section.target), number * len(sections) + place))
            fold.append(np.full(len(section.target), number))
    if sum(map(len, truth)) < 1 / (1 - level):
        return None
    target, predicted, labels, folds = (np.concatenate(part) for part in (truth, guess, label, fold))
    known = [depth for depth in depths if depth is not None]
    strata = None
    if len(known) == len(depths) and folds.max() > folds.min():
        strata = choose_strata(target, predicted, np.concatenate(known), folds, level)
    return Intervals(
        conformal_width(np.abs(target - predicted), level),
        trust_of(target, predicted, labels),
        level,
        len(target),
        "section" if len(sections) > 1 else "block",
        strata,
    )


def at_spots(model: Model, section: TrainingSection) -> tuple[Values, NDArray[np.float64] | None]:
    """Predict a section's spots, ``(n_spots, n_genes)``, and their depth, ``(n_spots,)``, where the model knows it."""
    values, depth = predict_patches(model, section.patches)
    spots = spots_from_patches(section.overlap, values)
    return spots, None if depth is None else np.asarray(section.overlap @ depth.astype(np.float64))


def predict_patches(model: Model, patches: Patches) -> tuple[Values, Values | None]:
    """Predict all patches, ``(n_patches, n_genes)``, and their depth, ``(n_patches,)``, where the model knows it."""
    if isinstance(model, DepthModel) and model.depth is not None:
        return model.predict_with_depth(patches, np.arange(len(patches)))
    return model.predict(patches), None


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
