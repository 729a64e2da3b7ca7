"""Prediction intervals and trust per gene, measured on held-out spots of the training sections.

Split-conformal prediction: the absolute errors at spots predicted by a model that was fitted without them; the width
that covers 90 % of these errors is put around every prediction. Whole sections are left out in turn where there are two
or more, else buffered stripes of the lone section. The intervals hold for spots of the training's size on tissue that
differs from the training sections no more than those differ from each other.

A spot with few counts is noisier. Where the model predicts depth, and where that is better on folds left out, each
stratum of predicted depth has half widths of its own (`depth_strata`).

Terms
    half width  per gene, in log1p(CP10k): the interval is prediction +- half width, not below 0
    trust       per gene, 0..1: a lower confidence limit (99 %) of the held-out Pearson within sections
    trusted     trust of at least `TRUSTED`; the predictions of other genes should not be used
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Self

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from featurestore.documents import convert
from histosge.calibration.depth_strata import DepthStrata, choose_strata, conformal_width, interval_bounds
from histosge.data.sections import Patches, TrainingSection
from histosge.data.spot_overlap import spots_from_patches
from histosge.heldout.metrics import correlate
from histosge.heldout.splits import default_buffer_um
from histosge.models.linear_algebra import spatial_groups
from histosge.models.nested_state import take
from histosge.models.protocol import DepthModel, Model, State

LEVEL = 0.9
TRUSTED = 0.1
"""Trust from which on a gene counts as predictable."""
# The one-sided 99 % quantile of the normal distribution.
CONFIDENCE_Z = 2.33
MAX_FOLDS = 4
"""Fits that calibration costs, at most: more sections are left out several at a time."""
MANY_SPOTS = 10_000
"""Beyond, two folds are enough: two fits on half the sections each are cheap, and the errors hardly larger."""
PREFIX = "calibration."

Fit = Callable[[Sequence[TrainingSection]], Model]
Values = NDArray[np.float32]


@dataclass(frozen=True)
class Intervals:
    """Half widths and trust per gene, and what they were measured on.

    Parameters
    ----------
    half_width, trust
        ``(n_genes,)``, float32.
    level
        Share of held-out spots that the intervals cover.
    n_spots
        Held-out spots that both were measured on.
    held_out
        ``section``, or ``block`` for stripes of a lone section.
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
        """Return which genes can be predicted, ``(n_genes,)``."""
        return np.asarray(self.trust >= TRUSTED)

    @property
    def scope(self) -> str:
        """Return what was held out, in words: the tissue that intervals and trust hold for."""
        return "held-out sections" if self.held_out == "section" else "held-out blocks of one section"

    def bounds(self, values: Values, depth: NDArray[np.floating] | None = None) -> tuple[Values, Values]:
        """Return lower and upper ends for ``(..., n_genes)`` predictions; NaN stays NaN.

        Parameters
        ----------
        depth
            Predicted depth, ``(...,)``, which selects the stratum. None, or no strata: one half width for all.
        """
        half_width = self.half_width
        if self.strata is not None and depth is not None:
            half_width = self.strata.half_width_at(depth)
        return interval_bounds(values, half_width)

    def take(self, columns: Sequence[int]) -> "Intervals":
        """Return the intervals of some genes."""
        index = list(columns)
        strata = self.strata.take(index) if self.strata else None
        return replace(self, half_width=self.half_width[index], trust=self.trust[index], strata=strata)

    def scores(
        self, truth: Values, predicted: Values, depth: NDArray[np.floating] | None = None
    ) -> dict[str, float]:
        """Return ``coverage_90`` (named after the level) on held-out spots, and ``trusted_share``."""
        covered = float(coverage(self, truth, predicted, depth).mean())
        return {f"coverage_{round(100 * self.level)}": covered, "trusted_share": float(self.trusted.mean())}

    def config(self) -> dict[str, Any]:
        """Return everything but the arrays, JSON-ready."""
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
        """Rebuild."""
        facts, strata = convert(config, _Config, "the configuration", at="calibration"), None
        half_width = take(state, f"{PREFIX}half_width", None)
        n_genes = len(half_width)
        if facts.depth_strata > 1:
            strata = DepthStrata(
                take(state, f"{PREFIX}depth_edge", facts.depth_strata - 1),
                take(state, f"{PREFIX}half_width_by_depth", facts.depth_strata, n_genes),
            )
        trust = take(state, f"{PREFIX}trust", n_genes)
        return cls(half_width, trust, facts.level, facts.n_spots, facts.held_out, strata)


class _Config(msgspec.Struct):
    """What `Intervals.config` wrote. Models of the first versions name no strata: they have one width a gene."""

    level: Annotated[float, msgspec.Meta(gt=0, lt=1)]
    n_spots: Annotated[int, msgspec.Meta(ge=0)]
    held_out: str
    depth_strata: Annotated[int, msgspec.Meta(ge=1, le=100)] = 1


def coverage(
    intervals: Intervals, truth: Values, predicted: Values, depth: NDArray[np.floating] | None = None
) -> NDArray[np.float64]:
    """Return per gene the share of spots whose truth lies inside the interval, ``(n_genes,)``."""
    lower, upper = intervals.bounds(predicted, depth)
    return np.asarray(((truth >= lower) & (truth <= upper)).mean(axis=0), dtype=np.float64)


def calibrate(
    fit: Fit, sections: Sequence[TrainingSection], spot_um: float, *, level: float = LEVEL
) -> Intervals | None:
    """Measure a model's errors on held-out parts of its own training sections.

    Parameters
    ----------
    fit
        Sections -> model, with the settings of the final fit.
    spot_um
        Diameter of a spot in microns, for the buffer within a lone section.
    level
        Share of spots that the intervals must cover.

    Returns
    -------
    Intervals or None
        None where no part can be left out (too few spots, or the buffer leaves none to train on).
    """
    truth, predictions, depths, label, fold = [], [], [], [], []
    for number, (training, testing) in enumerate(held_out_parts(sections, spot_um)):
        model = fit(training)
        for place, section in enumerate(testing):
            values, depth = predict_spots(model, section)
            truth.append(section.target)
            predictions.append(values)
            depths.append(depth)
            # Sections have labels of their own within a fold: trust is measured within them.
            label.append(np.full(len(section.target), number * len(sections) + place))
            fold.append(np.full(len(section.target), number))
    # With fewer, the conformal rank exceeds the number of errors: no width has the level.
    if sum(map(len, truth)) < 1 / (1 - level):
        return None
    target, predicted, labels, folds = (np.concatenate(part) for part in (truth, predictions, label, fold))
    predicted_depths = [depth for depth in depths if depth is not None]
    strata = None
    # Strata are chosen on folds left out in turn, which takes two.
    if len(predicted_depths) == len(depths) and folds.max() > folds.min():
        strata = choose_strata(target, predicted, np.concatenate(predicted_depths), folds, level)
    return Intervals(
        conformal_width(np.abs(target - predicted), level),
        pearson_lower_limit(target, predicted, labels),
        level,
        len(target),
        "section" if len(sections) > 1 else "block",
        strata,
    )


def predict_spots(model: Model, section: TrainingSection) -> tuple[Values, NDArray[np.float64] | None]:
    """Predict a section's spots, ``(n_spots, n_genes)``, and their depth, ``(n_spots,)``; None without a depth model."""
    values, depth = predict_patches(model, section.patches)
    spots = spots_from_patches(section.overlap, values)
    return spots, None if depth is None else np.asarray(section.overlap @ depth.astype(np.float64))


def predict_patches(model: Model, patches: Patches) -> tuple[Values, Values | None]:
    """Predict all patches, ``(n_patches, n_genes)``, and their depth, ``(n_patches,)``; None without a depth model."""
    if isinstance(model, DepthModel) and model.depth is not None:
        return model.predict_with_depth(patches, np.arange(len(patches)))
    return model.predict(patches), None


def pearson_lower_limit(truth: Values, predicted: Values, labels: NDArray[np.int64]) -> Values:
    """Return per gene a lower confidence limit (99 %) of the Pearson within labels, at least 0, ``(n_genes,)``.

    By Fisher's transform, which takes spots as independent.
    """
    pearson, _ = correlate(truth.astype(np.float64), predicted.astype(np.float64), labels)
    # A mean per label is removed before correlating, and costs a degree of freedom each.
    freedom = max(len(truth) - len(np.unique(labels)) - 2, 1)
    # arctanh(1) is infinite.
    limit = np.tanh(np.arctanh(np.clip(pearson, -0.999999, 0.999999)) - CONFIDENCE_Z / np.sqrt(freedom))
    return np.asarray(np.maximum(limit, 0.0), dtype=np.float32)


def held_out_parts(
    sections: Sequence[TrainingSection], spot_um: float
) -> Iterator[tuple[list[TrainingSection], list[TrainingSection]]]:
    """Yield training and held-out sections: whole ones, or buffered stripes of a lone one."""
    if len(sections) > 1:
        n_spots = sum(len(s.target) for s in sections)
        fold = np.arange(len(sections)) % (MAX_FOLDS if n_spots <= MANY_SPOTS else 2)
        for k in np.unique(fold):
            yield (
                [s for s, f in zip(sections, fold, strict=True) if f != k],
                [s for s, f in zip(sections, fold, strict=True) if f == k],
            )
        return
    (lone,) = sections
    # Training spots near a held-out one see the same tissue: they are left out of that fit.
    buffer_um = default_buffer_um(spot_um, lone.patches.receptive_um)
    stripe = spatial_groups(sections, MAX_FOLDS)
    for k in np.unique(stripe):
        held_out = stripe == k
        distance = np.asarray(cKDTree(lone.spot_xy_um[held_out]).query(lone.spot_xy_um)[0])
        training = ~held_out & (distance >= buffer_um)
        # A small section may lie within the buffer altogether.
        if training.sum() > 1:
            yield [lone.subset(training)], [lone.subset(held_out)]
