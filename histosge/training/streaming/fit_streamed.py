"""A streamed training from the sheet to a fitted model with its intervals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from featurestore.events import OnMessage, OnProgress
from featurestore.slides.sample_sheet import Sample
from featurestore.storage.store import Store
from featurestore.wording import counted
from histosge.calibration.conformal import Intervals, coverage, measure_intervals
from histosge.calibration.depth_strata import gene_parts
from histosge.calibration.embedding_distance import EmbeddingReference
from histosge.data.gene_choice import GeneChoice
from histosge.data.genes import GeneVariance
from histosge.data.section_loading import Selection
from histosge.data.seurat_ranks import SeuratRanks
from histosge.errors import ModelError
from histosge.models.dense import DenseModel
from histosge.models.estimators import class_name
from histosge.models.linear_algebra import Affine
from histosge.models.presets.ridge import RidgeModel
from histosge.models.protocol import SQUARED_ERROR, Model
from histosge.models.scale_ridges import ScaleRidges
from histosge.models.target_sums import GeneMoments
from histosge.training.kept_sums import SumsToKeep
from histosge.training.streaming.adapt_dense_fit import adapt_dense
from histosge.training.streaming.adapt_ridge_fit import adapt_ridge
from histosge.training.streaming.cohort import Cohort, SectionInput, SectionSource
from histosge.training.streaming.count_fit import fit_counts
from histosge.training.streaming.dense_fit import fit_dense
from histosge.training.streaming.hold_out import (
    HeldOutFits,
    HeldOutSection,
    collect_held_out,
    predict_section,
    take_genes,
)
from histosge.training.streaming.progress import Passes
from histosge.training.streaming.ridge_fit import RidgePredictor, fit_ridge
from histosge.training.streaming.section_tasks import InThisProcess, SectionTasks
from histosge.training.streaming.start import Start, StartFromWeights
from histosge.training.streaming.survey import Surveyed, SurveyPlan, survey_cohort, write_targets
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

    @property
    def sums(self) -> SumsToKeep | None:
        """Return the sums that it was fitted from; None for a model that does not follow from sums alone."""
        ...

    @property
    def held_out(self) -> HeldOutFits | None:
        """Return the fits without each fold; None for a model whose fits take long."""
        ...


class FitFromSums(Protocol):
    """Fits a model to a cohort, and to the sums of an earlier model where there is one."""

    def __call__(
        self, cohort: Cohort, moments: Sequence[GeneMoments], passes: Passes, start: Start | None = None
    ) -> StreamedFit:
        """Fit; the cohort is surveyed, and its targets are written."""
        ...


Fitter = Callable[[Cohort, Sequence[GeneMoments], Passes], StreamedFit]
FITTERS: dict[type, tuple[FitFromSums, int]] = {DenseModel: (fit_dense, 5), RidgeModel: (fit_ridge, 4)}
"""What follows from sums, by the class of the model, and how many passes over the sections it takes."""


def is_attention(estimator: object) -> bool:
    """Tell whether a class is the preset `attention`, which is fitted to what `dense` lacks."""
    # By its name first, so that training something else does not import torch.
    return getattr(estimator, "name", "") == "attention" and class_name(cast(type, estimator)) == "attention"


def _fitter(estimator: type[Model], loss: str, seed: int, epochs: int | None) -> tuple[Fitter, int]:
    if loss != SQUARED_ERROR:
        return partial(fit_counts, loss=loss), FITTERS[DenseModel][1]
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
    sums
        What the model was fitted from; None for one that does not follow from sums alone.
    covered
        Of a training that goes on from another: share of the new sections' values that the earlier model's intervals cover
        with its own predictions, and their spots; None where it has no intervals.
    """

    model: Model
    genes: tuple[str, ...]
    cohort: Cohort
    intervals: Intervals | None
    sums: SumsToKeep | None
    covered: tuple[float, int] | None = None


def embedding_bytes(samples: Sequence[Sample], store: str | Path, selection: Selection) -> int:
    """Return what the embeddings of some sections take in memory; none of them is read."""
    opened, found = Store.open(str(store)), 0
    for sample in samples:
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
    if loss != SQUARED_ERROR and estimator is not DenseModel:
        return f"loss {loss} is streamed for dense alone"
    if stains:
        return "--stains needs the patches' embeddings"
    if selection.others:
        return "several encoders are joined patch by patch"
    if calibrated and is_attention(estimator):
        return "intervals of attention take further fits"
    if n_sections < LEAST_SECTIONS:
        return f"{n_sections} sections are fewer than {LEAST_SECTIONS}"
    return ""


def why_adapted_in_memory(model: Model, n_sections: int) -> str:
    """Return why an adaptation to so many new sections cannot be streamed, in a few words; empty if it can."""
    if not isinstance(model, (DenseModel, RidgeModel)):
        return "the network of attention is adapted in memory"
    if n_sections < LEAST_SECTIONS:
        return f"{counted(n_sections, 'new section')} are fewer than {LEAST_SECTIONS}"
    return ""


@dataclass(frozen=True)
class StreamedInputs:
    """What a streamed training works on.

    Parameters
    ----------
    samples
        Rows of the sheet.
    store, selection
        Where their embeddings are.
    choice
        Of genes.
    folder
        For files of the training.
    calibrated
        Whether intervals are measured.
    force
        Take spots that do not fit their slide, with a warning.
    tasks
        What visits sections.
    """

    samples: Sequence[Sample]
    store: str
    selection: Selection
    choice: GeneChoice
    folder: WorkFolder
    calibrated: bool
    force: bool
    tasks: SectionTasks = field(default_factory=InThisProcess)

    def survey(
        self, passes: Passes, on_message: OnMessage, *, n_before: int = 0, has_folds: bool = False
    ) -> Surveyed:
        """Look at every section once.

        Parameters
        ----------
        n_before
            Sections whose sums are there already.
        has_folds
            Whether fits without each fold are wanted.
        """
        source = SectionSource(Store.open(self.store), self.selection)
        plan = SurveyPlan(source, self.choice, self.folder, self.tasks, has_folds, self.force, n_before)
        return survey_cohort(self.samples, plan, on_message, passes.begin("survey of"))


def fit_streamed(
    inputs: StreamedInputs,
    estimator: type[Model],
    on_message: OnMessage,
    on_progress: OnProgress,
    *,
    loss: str = SQUARED_ERROR,
    seed: int = 0,
    epochs: int | None = None,
) -> StreamedTraining | None:
    """Fit a model of `FITTERS` to all sections, one section at a time.

    Parameters
    ----------
    loss
        Another than squared error is for `dense`.
    seed, epochs
        For `attention`.

    Returns
    -------
    StreamedTraining or None
        None where too few sections are usable: they fit into memory.

    Raises
    ------
    ExpressionError, StoreError, ModelError
        If a section cannot be used, or the disk is full.
    """
    fitter, n_passes = _fitter(estimator, loss, seed, epochs)
    passes = Passes(len(inputs.samples), n_passes, on_progress)
    # `attention` learns what fits without a fold lack, whether or not intervals are measured.
    has_folds = inputs.calibrated or is_attention(estimator)
    surveyed = inputs.survey(passes, on_message, has_folds=has_folds)
    cohort, genes = surveyed.cohort, surveyed.genes
    if min(len(fit.sections) for fit in cohort.fits) < 2:
        return None
    moments = write_targets(cohort, genes, passes.begin("genes of"))
    fitted = fitter(cohort, moments, passes)
    intervals = _intervals(inputs, cohort, len(genes), fitted, passes)
    passes.finish()
    return StreamedTraining(fitted.model, genes, cohort, intervals, fitted.sums)


def _intervals(
    inputs: StreamedInputs, cohort: Cohort, n_genes: int, fitted: StreamedFit, passes: Passes
) -> Intervals | None:
    """Measure intervals and trust on held-out sections; None where they are not wanted."""
    if not inputs.calibrated:
        return None
    assert fitted.held_out is not None  # `why_in_memory` has refused intervals of `attention`
    spots = collect_held_out(cohort, n_genes, fitted.held_out, passes.begin("intervals on"))
    surveys = (cohort.survey(index) for index in range(len(cohort.sections)))
    reference = EmbeddingReference.from_moments(
        [(survey.embedding_mean, survey.embedding_variance) for survey in surveys]
    )
    names = tuple(dict.fromkeys(cohort.donors))
    return measure_intervals(spots, cohort.held_out, names, reference, threads=cohort.tasks.threads)


def fit_from_sums(
    inputs: StreamedInputs, start: Start, on_message: OnMessage, on_progress: OnProgress
) -> StreamedTraining:
    """Add sections to the sums of a saved model, and solve it anew; its own sections are not read.

    Raises
    ------
    ExpressionError, StoreError, ModelError
        If a section cannot be used, its embeddings are of another kind, or the disk is full.
    """
    fitter, _ = FITTERS[type(start.saved.model)]
    passes = Passes(len(inputs.samples), 4, on_progress)
    surveyed = inputs.survey(passes, on_message, n_before=start.kept.n_sections)
    cohort, genes = surveyed.cohort, surveyed.genes
    start.saved.check_fits(cohort.first.identity, cohort.first.stored.grid)
    moments = write_targets(cohort, genes, passes.begin("genes of"))
    covered = None
    if start.saved.intervals is not None:
        # By the earlier model, which has not seen these sections: afterwards none would be held out.
        earlier = ByEarlierModel(start.saved.model, cohort.source)
        spots = collect_held_out(cohort, len(genes), earlier, passes.begin("intervals on"))
        parts = [
            coverage(
                start.saved.intervals.take(some.tolist()), spots.truth[:, some], spots.predicted[:, some]
            )
            for some in gene_parts(np.arange(len(genes)), len(spots.truth))
        ]
        covered = float(np.concatenate(parts).mean()), len(spots.truth)
    fitted = fitter(cohort, moments, passes, start)
    passes.finish()
    return StreamedTraining(fitted.model, genes, cohort, start.saved.intervals, fitted.sums, covered)


def fit_adapted(
    inputs: StreamedInputs, start: StartFromWeights, on_message: OnMessage, on_progress: OnProgress
) -> StreamedTraining | None:
    """Adapt a saved model to all sections, one section at a time.

    Parameters
    ----------
    inputs
        Of the new sections, with `MeasuredGenes` as choice.

    Returns
    -------
    StreamedTraining or None
        None where too few sections are usable: they fit into memory.

    Raises
    ------
    ExpressionError, StoreError, ModelError
        If a section cannot be used, no gene is in common, its embeddings are of another kind, or the disk is full.
    """
    model = start.saved.model
    passes = Passes(len(inputs.samples), 4 if isinstance(model, RidgeModel) else 6, on_progress)
    surveyed = inputs.survey(passes, on_message, has_folds=inputs.calibrated)
    cohort = surveyed.cohort
    start.saved.check_fits(cohort.first.identity, cohort.first.stored.grid)
    if min(len(fit.sections) for fit in cohort.fits) < 2:
        return None
    genes, columns = start.common_genes(surveyed.genes, on_message)
    moments = write_targets(cohort, genes, passes.begin("genes of"))
    fitted: StreamedFit
    if isinstance(model, RidgeModel):
        fitted = adapt_ridge(model, columns, cohort, passes)
    else:
        assert isinstance(model, DenseModel)  # `why_adapted_in_memory` has refused others
        fitted = adapt_dense(model, columns, cohort, moments, passes)
    intervals = _intervals(inputs, cohort, len(genes), fitted, passes)
    passes.finish()
    return StreamedTraining(fitted.model, genes, cohort, intervals, None)


@dataclass(frozen=True)
class GenesOfSums(GeneChoice):
    """The genes of a model to whose sums sections are added: all of them, and no others.

    Parameters
    ----------
    origin
        The model's folder.
    """

    def choose_from(self, ranking: GeneVariance | SeuratRanks) -> tuple[str, ...]:
        """Return the genes.

        Raises
        ------
        ModelError
            If not all new sections have all of them.
        """
        measured = set(ranking.genes)
        if missing := [gene for gene in self.named if gene not in measured]:
            raise ModelError(
                f"the new sections lack {len(missing)} of the {len(self.named)} genes of {self.origin}, whose sums take all "
                f"of them; name genes alike ({missing[0]!r} is missing), or adapt the model with --adapt"
            )
        return self.named


@dataclass(frozen=True)
class MeasuredGenes(GeneChoice):
    """All genes that all sections measured, also those that do not vary."""

    n_variable: int | None = None

    def choose_from(self, ranking: GeneVariance | SeuratRanks) -> tuple[str, ...]:
        """Return the genes of a ranking."""
        return ranking.genes


@dataclass(frozen=True)
class ByEarlierModel:
    """Predicts sections by a model of `FITTERS` that has not seen them."""

    model: Model
    source: SectionSource

    @property
    def predictor(self) -> "ByEarlierModel":
        """Return itself."""
        return self

    def held_out_input(self, index: int) -> None:
        """Return nothing: the model and the section are enough."""

    def predict(self, section: SectionInput, found: None) -> HeldOutSection:
        """Predict the patches under a section's spots."""
        model = self.model
        if isinstance(model, RidgeModel):
            return RidgePredictor(self.source, {0: model}).predict(section, 0)
        assert isinstance(model, DenseModel)
        linear, targets = model.linear, model.targets
        assert isinstance(linear, ScaleRidges)
        assert linear.weight is not None
        n = len(linear.offset)
        weights = np.split(linear.weight, len(linear.sigmas_um), axis=1)
        ridges = [Affine(weight, np.zeros(n)) for weight in weights]
        slide = self.source.open(section.slide_id)
        scales = predict_section(slide, section.under, linear.sigmas_um, ridges).at_patches
        patterns = (scales.sum(axis=0) + linear.offset)[:, : targets.axes.shape[1]]
        return HeldOutSection(lambda some: take_genes(targets, some).to_genes(patterns), None)
