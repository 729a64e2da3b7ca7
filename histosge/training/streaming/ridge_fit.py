"""The preset `ridge` on a cohort that does not fit into memory: the fit of `histosge.models.presets.ridge`, from sums."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from histosge.models.cohort_ridges import ridge_from_sums
from histosge.models.linear_algebra import Floats, Indices
from histosge.models.presets.ridge import RidgeModel
from histosge.models.target_sums import GeneMoments, read_rows
from histosge.training.kept_sums import SumsToKeep
from histosge.training.streaming.cohort import Cohort
from histosge.training.streaming.gather import GroupSums, gather_sums
from histosge.training.streaming.hold_out import HeldOutSection, predict_section
from histosge.training.streaming.progress import Passes
from histosge.training.streaming.start import Start

SCALES_UM = (0.0,)
"""The embedding under the disc alone."""


@dataclass(frozen=True)
class _GeneOutputs:
    """log1p(CP10k) of all genes."""

    cohort: Cohort
    n_outputs: int

    def of_section(self, index: int, spots: Indices) -> Floats:
        return read_rows(self.cohort.target(index), spots).astype(np.float64)


@dataclass(frozen=True)
class StreamedRidge:
    """A fitted `ridge`, and those without each fold."""

    model: RidgeModel
    cohort: Cohort
    held_out: dict[int, RidgeModel]
    sums: SumsToKeep

    def predict_held_out(self, index: int) -> HeldOutSection:
        """Predict the patches under a section's spots by the fit without its fold."""
        model = self.held_out[int(self.cohort.fold[index])]
        predicted = predict_section(self.cohort, index, SCALES_UM, [model.affine]).at_patches[0]
        values = np.maximum(predicted, 0.0).astype(np.float32)
        return HeldOutSection(lambda some: values[:, some], None)


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
    gather_sums(cohort, SCALES_UM, _GeneOutputs(cohort, n_genes), reference, passes.begin("reading"))
    every, fits = np.arange(n_genes), dict[int | None, RidgeModel]()
    for fit in cohort.fits:
        fits[fit.fold] = ridge_from_sums(GroupSums(cohort, fit, 0, every, kept), reference)
    held_out = {fold: model for fold, model in fits.items() if fold is not None}
    whole = GroupSums(cohort, cohort.fits[0], 0, every, kept)
    n_sections = cohort.n_before + len(cohort.sections)
    groups = ((number, [whole[i]]) for i, number in enumerate(whole.groups))
    sums = SumsToKeep(RidgeModel.name, SCALES_UM, {"reference": reference}, n_sections, groups)
    return StreamedRidge(fits[None], cohort, held_out, sums)
