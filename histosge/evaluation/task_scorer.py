"""Fit a method on one fold, and score it on the fold's held-out spots, and its intervals there."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from histosge.calibration.conformal import calibrate, widest_spot_um
from histosge.data.genes import library_size
from histosge.data.sections import Section
from histosge.errors import ModelError
from histosge.evaluation.bin_scores import BinScores, HeldOutBins
from histosge.evaluation.methods import (
    AblationMethod,
    FittedMethod,
    MapModel,
    Method,
    ModelMethod,
)
from histosge.evaluation.paired_bootstrap import HeldOutSpots
from histosge.evaluation.section_maps import SectionPrediction
from histosge.evaluation.shown_maps import EvaluationMaps
from histosge.evaluation.tasks import Task
from histosge.heldout.donors import named_donors
from histosge.heldout.metric_registry import METRICS, ScoredSpots
from histosge.heldout.metrics import GeneScores, pearson_all_spots, score_genes


@dataclass(frozen=True)
class MethodScore:
    """One method, fitted on one fold and scored on its held-out spots.

    Parameters
    ----------
    task
        As the method prepared it.
    predicted
        log1p(CP10k) of the held-out spots, ``(n_spots, n_genes)``.
    all_spots
        The published figure, over training spots, too; None where it was not asked for.
    bins
        Scores at finer bins; None without such bins or without a map.
    """

    task: Task
    held_out: HeldOutSpots
    predicted: NDArray[np.float64]
    genes: GeneScores
    all_spots: float | None
    fitted: FittedMethod
    bins: BinScores | None = None


@dataclass(frozen=True)
class TaskScorer:
    """Fits and scores methods on one task.

    Parameters
    ----------
    with_all_spots
        Whether the published figure is given for every method, not for ablations alone.
    fitted
        Scores by name of what was fitted: variants that differ in their figure alone share a fit.
    bins
        The fold's bins, if maps are scored at bins, too.
    """

    task: Task
    epochs: int | None
    with_all_spots: bool
    fitted: dict[str, MethodScore] = field(default_factory=dict)
    bins: HeldOutBins | None = None

    def score(self, method: Method, maps: EvaluationMaps | None = None) -> MethodScore:
        """Fit on the task's training spots, and score all of its held-out spots; `maps` take the maps, if given."""
        if not isinstance(method, AblationMethod):
            return self._score(method, maps, with_all_spots=self.with_all_spots)
        name = method.fit_name(self.task)
        if name not in self.fitted:
            self.fitted[name] = self._score(method, maps, with_all_spots=True)
        return self.fitted[name]

    def _score(self, method: Method, maps: EvaluationMaps | None, *, with_all_spots: bool) -> MethodScore:
        task = method.prepare(self.task)
        fitted = method.fit(task, self.epochs)
        sections = task.held_out()
        predicted = np.concatenate([fitted.predict_spots(section) for section, _ in sections]).astype(
            np.float64
        )
        held_out = _held_out_spots(task, sections)
        xy_um = np.concatenate([section.spots.xy_um for section, _ in sections])
        # A model may be anybody's: its number of genes is the one thing that the arithmetic below cannot name.
        if predicted.shape != held_out.truth.shape:
            raise ModelError(
                f"{method.name} predicts {predicted.shape[1]} genes, {held_out.truth.shape[1]} were trained on"
            )
        spots = ScoredSpots(held_out.depth, held_out.section, xy_um)
        genes = score_genes(held_out.truth, predicted, spots, METRICS.records())
        if maps is not None:
            _add_maps(maps, task, fitted, (held_out, predicted), genes.pearson)
        all_spots = _all_spots(task, fitted) if with_all_spots else None
        at_bins = None if self.bins is None else self.bins.score_method(task, fitted)
        return MethodScore(task, held_out, predicted, genes, all_spots, fitted, at_bins)


def check_intervals(method: Method, result: MethodScore, epochs: int | None) -> dict[str, float]:
    """Return how often intervals from the training part hold on held-out spots, and the share of trusted genes.

    Nothing for methods whose training measures no intervals.
    """
    if not isinstance(method, ModelMethod) or not method.estimator.capabilities.calibrated_by_default:
        return {}
    # On the fold's training part: intervals are measured as `histosge train` would, then met with held-out spots.
    task = result.task
    spots = task.training_spots()
    intervals = calibrate(
        lambda parts: method.fit_sections(parts, task.seed, epochs),
        task.training(),
        widest_spot_um(spots),
        donors=named_donors(spots),
    )
    if intervals is None:
        return {}
    depth = None
    if intervals.strata is not None and isinstance(result.fitted, MapModel):
        depth = np.concatenate([result.fitted.predict_spot_depth(section) for section, _ in task.held_out()])
    # In single precision, as intervals are stored and maps are read.
    truth = result.held_out.truth.astype(np.float32)
    return intervals.scores(truth, result.predicted.astype(np.float32), depth)


def _add_maps(
    maps: EvaluationMaps,
    task: Task,
    fitted: FittedMethod,
    scored: tuple[HeldOutSpots, NDArray[np.float64]],
    pearson: NDArray[np.float64],
) -> None:
    """Add the maps of the sections of which this fold holds out spots, if the method predicts patches.

    All of their patches are drawn, also those that neither training nor held-out spots may see: no score looks at them.
    """
    held_out, predicted = scored
    maps.start_fold(task.genes, pearson)
    for section, target in task.all_spots():
        own = maps.owned_patches(section.slide_id, task.fold)
        # One section at a time: the maps of a cohort would not fit into memory together.
        whole = None if own is None else fitted.predict_map(section)
        if own is None or whole is None:
            continue
        spots = held_out.section == section.slide_id
        part = SectionPrediction(
            task.genes,
            held_out.truth[spots],
            predicted[spots],
            task.fold.test[section.slide_id],
            whole[own],
            own,
        )
        maps.add(task.fold, section.slide_id, part, pearson, target)


def _held_out_spots(task: Task, sections: Sequence[tuple[Section, NDArray[np.float32]]]) -> HeldOutSpots:
    ids = [section.slide_id for section, _ in sections]
    return HeldOutSpots(
        task.fold.name,
        task.seed,
        task.genes,
        np.concatenate([target for _, target in sections]).astype(np.float64),
        np.concatenate([library_size(section.spots) for section, _ in sections]),
        np.concatenate([np.full(len(section.spots), section.slide_id) for section, _ in sections]),
        np.concatenate([np.flatnonzero(task.fold.test[slide_id]) for slide_id in ids]),
    )


def _all_spots(task: Task, fitted: FittedMethod) -> float:
    """Return the published figure: over all spots, those trained on included."""
    sections = task.all_spots()
    truth = np.concatenate([target for _, target in sections])
    predicted = np.concatenate([fitted.predict_spots(section) for section, _ in sections])
    label = np.concatenate([np.full(len(section.spots), section.slide_id) for section, _ in sections])
    return pearson_all_spots(truth, predicted, label)
