"""The preset `ridge` on a cohort that does not fit into memory: the fit of `histosge.models.presets.ridge`, from sums."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from histosge.models.cohort_ridges import ridge_from_sums
from histosge.models.linear_algebra import Floats, Indices
from histosge.models.presets.ridge import RidgeModel
from histosge.models.target_sums import GeneMoments, read_rows
from histosge.training.kept_sums import SumsToKeep
from histosge.training.streaming.cohort import Cohort, Fit, SectionInput, SectionSource
from histosge.training.streaming.gather import GroupSums, gather_sums
from histosge.training.streaming.hold_out import HeldOutSection, predict_section
from histosge.training.streaming.progress import Passes
from histosge.training.streaming.solve_fits import solve_fits
from histosge.training.streaming.start import Start

SCALES_UM = (0.0,)
"""The embedding under the disc alone."""


@dataclass(frozen=True)
class GeneOutputs:
    """log1p(CP10k) of all genes."""

    n_outputs: int

    def of_section(self, section: SectionInput) -> Callable[[Indices], Floats]:
        """Return what gives those of some spots, ``(n, n_genes)``."""
        # A few spots at a time: of all genes, the targets of a section are not held as an array.
        return lambda spots: read_rows(section.target, spots).astype(np.float64)


@dataclass(frozen=True)
class RidgePredictor:
    """Predicts sections by one of several ridges.

    Parameters
    ----------
    source
        Where embeddings are.
    models
        By fold.
    """

    source: SectionSource
    models: Mapping[int, RidgeModel]

    def predict(self, section: SectionInput, found: int) -> HeldOutSection:
        """Predict the patches under a section's spots; `found` is its fold."""
        slide, affine = self.source.open(section.slide_id), self.models[found].affine
        predicted = predict_section(slide, section.under, SCALES_UM, [affine]).at_patches[0]
        values = np.maximum(predicted, 0.0).astype(np.float32)
        return HeldOutSection(lambda some: values[:, some], None)


@dataclass(frozen=True)
class StreamedRidge:
    """A fitted `ridge`, and those without each fold."""

    model: RidgeModel
    cohort: Cohort
    predictor: RidgePredictor
    # None of an adapted model: sums of residuals of another model are none that sections could be added to.
    sums: SumsToKeep | None

    @property
    def held_out(self) -> "StreamedRidge":
        """Return itself: it knows the fits without each fold."""
        return self

    def held_out_input(self, index: int) -> int:
        """Return the fold of a section."""
        return int(self.cohort.fold[index])


def fit_ridge(
    cohort: Cohort, moments: Sequence[GeneMoments], passes: Passes, start: Start | None = None
) -> StreamedRidge:
    """Fit `ridge` to a surveyed cohort whose targets are written; the cohort is read once.

    Parameters
    ----------
    start
        An earlier model, to whose sums those of the cohort are added.
    """
    n_genes, kept = len(moments[0].mean), None if start is None else start.kept
    reference = cohort.survey(0).embedding_mean if kept is None else kept.reference
    gather_sums(cohort, SCALES_UM, GeneOutputs(n_genes), reference, passes.begin("reading"))
    every = np.arange(n_genes)

    def solve(_: int, fit: Fit) -> RidgeModel:
        return ridge_from_sums(GroupSums(cohort, fit, 0, every, kept), reference)

    solved = solve_fits(cohort, len(reference), n_genes, solve)
    fits = {fit.fold: model for fit, model in zip(cohort.fits, solved, strict=True)}
    held_out = {fold: model for fold, model in fits.items() if fold is not None}
    whole = GroupSums(cohort, cohort.fits[0], 0, every, kept)
    n_sections = cohort.n_before + len(cohort.sections)
    groups = ((number, [whole[i]]) for i, number in enumerate(whole.groups))
    sums = SumsToKeep(RidgeModel.name, SCALES_UM, {"reference": reference}, n_sections, groups)
    return StreamedRidge(fits[None], cohort, RidgePredictor(cohort.source, held_out), sums)
