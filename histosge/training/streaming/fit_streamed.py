"""A streamed training from the sheet to a fitted model with its intervals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, cast

from featurestore.events import OnMessage, OnProgress
from featurestore.slides.sample_sheet import read_samples
from featurestore.storage.store import Store
from histosge.calibration.conformal import Intervals, measure_intervals
from histosge.calibration.embedding_distance import EmbeddingReference
from histosge.data.gene_choice import GeneChoice
from histosge.data.section_loading import Selection
from histosge.models.dense import DenseModel
from histosge.models.estimators import class_name
from histosge.models.presets.ridge import RidgeModel
from histosge.models.protocol import Model
from histosge.models.target_sums import GeneMoments
from histosge.training.streaming.cohort import Cohort
from histosge.training.streaming.dense_fit import fit_dense
from histosge.training.streaming.hold_out import HeldOutSection, collect_held_out
from histosge.training.streaming.progress import Passes
from histosge.training.streaming.ridge_fit import fit_ridge
from histosge.training.streaming.survey import survey_cohort, write_targets
from histosge.training.streaming.work_folder import WorkFolder

STREAM_FROM_BYTES = 1 << 30
"""Embeddings of all sections in memory, from which on sections are streamed. Below, all of them fit beside what a training
takes anyway, and reading them once is faster than twice."""
LEAST_SECTIONS = 4
"""With fewer, a fit without one fold has a single section, whose stripes are left out in turn: that takes its spots."""


class StreamedFit(Protocol):
    """What fits a model to a cohort from sums."""

    @property
    def model(self) -> Model:
        """Return the model of all sections."""
        ...

    def predict_held_out(self, index: int) -> HeldOutSection:
        """Predict a section by the fit without its fold."""
        ...


Fitter = Callable[[Cohort, Sequence[GeneMoments], Passes], StreamedFit]
FITTERS: dict[type, tuple[Fitter, int]] = {DenseModel: (fit_dense, 5), RidgeModel: (fit_ridge, 4)}
"""What follows from sums, by the class of the model, and how many passes over the sections it takes."""


def is_attention(estimator: object) -> bool:
    """Tell whether a class is the preset `attention`, which is fitted to what `dense` lacks."""
    # By its name first, so that training something else does not import torch.
    return getattr(estimator, "name", "") == "attention" and class_name(cast(type, estimator)) == "attention"


def _fitter(estimator: type[Model], seed: int, epochs: int | None) -> tuple[Fitter, int]:
    if not is_attention(estimator):
        return FITTERS[estimator]
    from histosge.training.streaming.attention_fit import fit_attention

    return partial(fit_attention, seed=seed, epochs=epochs), FITTERS[DenseModel][1]


@dataclass(frozen=True)
class StreamedTraining:
    """What a streamed training gives.

    Parameters
    ----------
    intervals
        None where none were wanted.
    """

    model: Model
    genes: tuple[str, ...]
    cohort: Cohort
    intervals: Intervals | None


def embedding_bytes(samples: str | Path, store: str | Path, selection: Selection) -> int:
    """Return what the embeddings of all sections of a sheet take in memory; none of them is read."""
    opened, found = Store.open(str(store)), 0
    for sample in read_samples(str(samples)):
        slide = selection.open(opened, sample.slide_id)
        found += int(slide.stored.is_tissue.sum()) * slide.identity.dim * 4
    return found


def why_in_memory(
    estimator: object,
    n_sections: int,
    selection: Selection,
    loss: str,
    *,
    stains: bool,
    calibrated: bool = False,
) -> str:
    """Return why a training cannot be streamed, in a few words; empty if it can."""
    if not isinstance(estimator, type) or not (estimator in FITTERS or is_attention(estimator)):
        return "this preset is not fitted from sums, as dense and ridge are"
    if loss != "mse":
        return f"loss {loss} is not fitted from sums"
    if stains:
        return "--stains needs the patches' embeddings"
    if selection.others:
        return "several encoders are joined patch by patch"
    if calibrated and is_attention(estimator):
        return "intervals of attention take further fits"
    if n_sections < LEAST_SECTIONS:
        return f"{n_sections} sections are fewer than {LEAST_SECTIONS}"
    return ""


def fit_streamed(
    samples: str | Path,
    store: str | Path,
    selection: Selection,
    choice: GeneChoice,
    estimator: type[Model],
    folder: WorkFolder,
    *,
    calibrated: bool,
    seed: int = 0,
    epochs: int | None = None,
    force: bool,
    on_message: OnMessage,
    on_progress: OnProgress,
) -> StreamedTraining | None:
    """Fit a model of `FITTERS` to all sections of a sheet, one section at a time.

    Returns
    -------
    StreamedTraining or None
        None where too few sections are usable: they fit into memory.

    Raises
    ------
    ExpressionError, StoreError, ModelError
        If a section cannot be used, or the disk is full.
    """
    fitter, n_passes = _fitter(estimator, seed, epochs)
    passes = Passes(len(read_samples(str(samples))), n_passes, on_progress)
    surveyed = survey_cohort(
        str(samples),
        str(store),
        selection,
        choice,
        folder,
        # `attention` learns what fits without a fold lack, whether or not intervals are measured.
        calibrated=calibrated or is_attention(estimator),
        force=force,
        on_message=on_message,
        on_step=passes.begin("survey of"),
    )
    cohort, genes = surveyed.cohort, surveyed.genes
    if min(len(fit.sections) for fit in cohort.fits) < 2:
        return None
    moments = write_targets(cohort, genes, passes.begin("genes of"))
    fitted = fitter(cohort, moments, passes)
    intervals = None
    if calibrated:
        spots = collect_held_out(cohort, len(genes), fitted.predict_held_out, passes.begin("intervals on"))
        surveys = (cohort.survey(index) for index in range(len(cohort.sections)))
        reference = EmbeddingReference.from_moments(
            [(survey.embedding_mean, survey.embedding_variance) for survey in surveys]
        )
        intervals = measure_intervals(spots, cohort.held_out, tuple(dict.fromkeys(cohort.donors)), reference)
    passes.finish()
    return StreamedTraining(fitted.model, genes, cohort, intervals)
