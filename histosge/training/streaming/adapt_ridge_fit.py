"""Adapting a `ridge` on sections that do not fit into memory: the fit of `histosge.models.adaptation`, from sums."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from histosge.models.adaptation import RIDGE_PENALTIES
from histosge.models.cohort_ridges import ridge_from_sums
from histosge.models.linear_algebra import Affine, Floats, Indices
from histosge.models.presets.ridge import RidgeModel
from histosge.models.ridge_sums import LazySums, RidgeSums
from histosge.training.streaming.cohort import Cohort, Fit
from histosge.training.streaming.gather import GroupSums, gather_sums
from histosge.training.streaming.progress import Passes
from histosge.training.streaming.ridge_fit import SCALES_UM, GeneOutputs, RidgePredictor, StreamedRidge
from histosge.training.streaming.solve_fits import solve_fits


def adapt_ridge(earlier: RidgeModel, columns: Indices, cohort: Cohort, passes: Passes) -> StreamedRidge:
    """Fit `ridge` to what an earlier one lacks at the spots of a surveyed cohort, and add its weights.

    The cohort is read once, as for a training anew: what the earlier weights predict follows from its sums.

    Parameters
    ----------
    columns
        Of the earlier model's genes those of the cohort.
    """
    start = Affine(earlier.affine.weight[:, columns], earlier.affine.offset[columns])
    reference, every = cohort.survey(0).embedding_mean, np.arange(len(columns))
    gather_sums(cohort, SCALES_UM, GeneOutputs(len(columns)), reference, passes.begin("reading"))

    def solve(_: int, fit: Fit) -> RidgeModel:
        groups = _Residuals(GroupSums(cohort, fit, 0, every), start, reference)
        change = ridge_from_sums(groups, reference, RIDGE_PENALTIES)
        weight, offset = start.weight + change.affine.weight, start.offset + change.affine.offset
        return replace(change, affine=Affine(weight, offset))

    solved = solve_fits(cohort, len(reference), len(columns), solve)
    fits = {fit.fold: model for fit, model in zip(cohort.fits, solved, strict=True)}
    held_out = {fold: model for fold, model in fits.items() if fold is not None}
    return StreamedRidge(fits[None], cohort, RidgePredictor(cohort.source, held_out), None)


@dataclass(frozen=True)
class _Residuals(LazySums):
    """Sums of groups with the outputs less what a map of the inputs predicts, made as they are read.

    Parameters
    ----------
    groups
        Sums of inputs less the reference.
    affine
        From inputs to outputs.
    reference
        ``(dim,)``.
    """

    groups: Sequence[RidgeSums]
    affine: Affine
    reference: Floats

    def __len__(self) -> int:
        return len(self.groups)

    def make(self, index: int) -> RidgeSums:
        """Return the sums of one group, by its place."""
        at_reference = self.affine.offset + self.reference @ self.affine.weight
        return self.groups[index].residual(Affine(self.affine.weight, at_reference))
