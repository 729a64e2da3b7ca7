"""Adapting a `dense` on sections that do not fit into memory: the fit of `histosge.models.adaptation`, from sums.

The earlier model predicts the spots of each section first. Then the passes are those of a training anew (`dense_fit`),
with the patterns of the residuals beside those of a training anew, on which penalties are chosen.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histosge.models.adaptation import EarlierDense
from histosge.models.cohort_adaptation import AdaptedBasis, pattern_sums, solve_cautiously
from histosge.models.dense import DenseModel
from histosge.models.linear_algebra import Affine, Floats, Indices
from histosge.models.low_rank_targets import LowRankTargets
from histosge.models.ridge_sums import RidgeSums, total
from histosge.models.scale_ridges import SIGMAS_UM, ScaleRidges, average_scales
from histosge.models.target_sums import GeneMoments, gene_products, log_library
from histosge.training.streaming.cohort import Cohort, SectionInput, SectionSource
from histosge.training.streaming.dense_fit import (
    HoldingOut,
    Solved,
    held_out_name,
    hold_out,
    ridge_sums,
    stacking_sums,
)
from histosge.training.streaming.gather import gather_sums
from histosge.training.streaming.hold_out import HeldOutSection, predict_section, take_genes
from histosge.training.streaming.progress import Passes
from histosge.training.streaming.section_tasks import OnStep
from histosge.training.streaming.solve_fits import solve_ridges
from histosge.training.streaming.survey import fit_differences


@dataclass(frozen=True)
class _AdaptedOutputs:
    """Patterns of a training anew and of residuals, of every fit side by side, each followed by depth."""

    bases: Sequence[AdaptedBasis]

    @property
    def n_outputs(self) -> int:
        return 2 * (sum(basis.n_patterns for basis in self.bases) + 1)

    def columns(self, number: int) -> Indices:
        """Return the outputs of one fit: those of a training anew, then those of residuals."""
        n = self.bases[number].n_patterns
        start, half = sum(basis.n_patterns for basis in self.bases[:number]), self.n_outputs // 2
        own = np.append(np.arange(start, start + n), half - 1)
        return np.concatenate([own, half + own])

    def of_section(self, section: SectionInput) -> Callable[[Indices], Floats]:
        assert section.earlier is not None
        patterns, depth = _about_mean(section.earlier)
        log = log_library(section.library) - log_library(section.library).mean()
        anew = [basis.anew.patterns(section.target) for basis in self.bases]
        residual = [basis.residual_patterns(section.target, patterns) for basis in self.bases]
        return np.column_stack([*anew, log, *residual, log - depth]).__getitem__


def _about_mean(earlier: Floats) -> tuple[Floats, Floats]:
    """Split outputs of the earlier model, ``(n_spots, n_earlier + 1)``, into patterns and depth about their means."""
    centred = earlier - earlier.mean(axis=0)
    return centred[:, :-1], centred[:, -1]


@dataclass(frozen=True)
class _Adapted:
    """What one fit came to.

    Parameters
    ----------
    weights, offset
        Of the ridges of the change, and the offset of their mean.
    earlier_mean
        Of the earlier model's outputs at the fit's spots, ``(n_earlier + 1,)``.
    targets
        From the earlier patterns about that mean, and those of the residuals, to genes.
    """

    weights: tuple[float, ...]
    offset: Floats
    earlier_mean: Floats
    targets: LowRankTargets


HeldOutChange = tuple[int, NDArray[np.float32], Floats]
"""A section's fold, and of the patches under its spots what the ridges of the change predict without offsets,
``(n_ridges, n, n_outputs)``, and what the earlier model does, ``(n, n_earlier + 1)``."""


@dataclass(frozen=True)
class AdaptedPredictor:
    """Predicts sections by one of several fits, by fold."""

    fits: Mapping[int, _Adapted]
    has_depth: bool

    def predict(self, section: SectionInput, found: HeldOutChange) -> HeldOutSection:
        """Predict the patches under a section's spots."""
        fold, at_patches, earlier = found
        fit = self.fits[fold]
        change = np.tensordot(np.array(fit.weights), at_patches, axes=1) + fit.offset
        before = earlier - fit.earlier_mean
        # The map's own precision, so that intervals are of what prediction gives.
        patterns = np.hstack([before[:, :-1], change[:, :-1]]).astype(np.float32).astype(np.float64)
        depth = (before[:, -1] + change[:, -1]).astype(np.float32) if self.has_depth else None
        return HeldOutSection(lambda some: take_genes(fit.targets, some).to_genes(patterns), depth)


@dataclass(frozen=True)
class StreamedAdaptation:
    """An adapted `dense`, and its fits without each fold."""

    model: DenseModel
    cohort: Cohort
    predictor: AdaptedPredictor
    # Sums of residuals of another model are none that sections could be added to.
    sums: None = None

    @property
    def held_out(self) -> "StreamedAdaptation":
        """Return itself: it knows the fits without each fold."""
        return self

    def held_out_input(self, index: int) -> HeldOutChange:
        """Return what the passes left of a section."""
        at_patches = self.cohort.folder.load_one(held_out_name(self.cohort, index), "at_patches")
        earlier = self.cohort.folder.load_one(self.cohort.earlier_name(index), "at_patches")
        return int(self.cohort.fold[index]), at_patches, earlier


def adapt_dense(
    earlier: DenseModel, columns: Indices, cohort: Cohort, moments: Sequence[GeneMoments], passes: Passes
) -> StreamedAdaptation:
    """Fit `dense` to what an earlier one lacks at the spots of a surveyed cohort, and add its weights.

    The cohort is read three times: by the earlier model, for sums, and for predictions of held-out sections.

    Parameters
    ----------
    columns
        Of the earlier model's genes those of the cohort.
    """
    start = EarlierDense.take(earlier, columns)
    _predict_by_earlier(cohort, start, passes.begin("earlier model on"))
    bases = _fit_bases(cohort, moments, start.axes)
    outputs, reference = _AdaptedOutputs(bases), cohort.survey(0).embedding_mean
    differences = fit_differences(cohort)
    gather_sums(cohort, SIGMAS_UM, outputs, reference, passes.begin("reading"), differences)

    both_halves = [outputs.columns(number) for number in range(len(cohort.fits))]
    sums_of = [
        ridge_sums(cohort, fit, both, None, differences)
        for fit, both in zip(cohort.fits, both_halves, strict=True)
    ]
    n_patterns = [basis.n_patterns for basis in bases]
    ridges = solve_ridges(cohort, sums_of, reference, n_patterns, differences, solve_cautiously)
    solved = [
        Solved(fit, both[len(both) // 2 :], sums[0].groups, found)
        for fit, both, sums, found in zip(cohort.fits, both_halves, sums_of, ridges, strict=True)
    ]
    hold_out(cohort, solved, HoldingOut(cohort.source, outputs, differences), passes.begin("holding out"))
    held_out = dict[int, _Adapted]()
    for part, basis in zip(solved, bases, strict=True):
        weights = stacking_sums(cohort, part).weights()
        change = average_scales(
            [one.ridge for one in part.ridges],
            weights,
            [one.penalties for one in part.ridges],
            differences,
        )
        merged = GeneMoments.merge([moments[index] for index in part.fit.sections.tolist()])
        depth = np.append(np.zeros(basis.n_patterns), merged.mean_log_library)
        change = replace(change, offset=change.offset + depth)
        mean = _earlier_mean(cohort, part)
        axes = basis.residual_axes(_residual_sums(cohort, part, basis))
        targets = LowRankTargets(
            merged.mean / merged.n,
            np.sqrt(merged.variance / merged.n),
            np.hstack([basis.loadings, axes]),
            _highest(merged, earlier, columns),
        )
        if part.fit.fold is not None:
            held_out[part.fit.fold] = _Adapted(tuple(weights.tolist()), change.offset, mean, targets)
            continue
        # A model without depth has no such output, and here it is 0.
        known = mean if start.has_depth else mean[:-1]
        own = replace(start, axes=basis.loadings)
        linear, both_axes = own.plus(change, axes, known, has_depth=start.has_depth)
        model = DenseModel(linear, replace(targets, axes=both_axes), start.has_depth)
    return StreamedAdaptation(model, cohort, AdaptedPredictor(held_out, start.has_depth))


def _highest(moments: GeneMoments, earlier: DenseModel, columns: Indices) -> Floats:
    # What was measured anywhere is no overshoot.
    if earlier.targets.highest is None:
        return moments.highest
    return np.maximum(moments.highest, earlier.targets.highest[columns])


@dataclass(frozen=True)
class _ByEarlier:
    source: SectionSource
    ridges: ScaleRidges
    has_depth: bool


def _predict_by_earlier(cohort: Cohort, start: EarlierDense, on_step: OnStep) -> None:
    """Write what the earlier model predicts of each section's spots, and of the patches under them."""

    def items() -> Iterator[tuple[str, SectionInput | None]]:
        for index, section in enumerate(cohort.sections):
            is_there = cohort.folder.has(cohort.earlier_name(index))
            yield section.slide_id, None if is_there else cohort.input(index)

    how = _ByEarlier(cohort.source, start.ridges, start.has_depth)
    for index, arrays in enumerate(cohort.tasks.run(_earlier_outputs, how, items(), on_step)):
        if arrays is not None:
            cohort.folder.save(cohort.earlier_name(index), arrays)


def _earlier_outputs(how: _ByEarlier, section: SectionInput) -> dict[str, NDArray[Any]]:
    ridges, n = how.ridges, len(how.ridges.offset)
    assert ridges.weight is not None
    weights = np.split(ridges.weight, len(ridges.sigmas_um), axis=1)
    slide = how.source.open(section.slide_id)
    scales = [Affine(weight, np.zeros(n)) for weight in weights]
    found = predict_section(slide, section.under, ridges.sigmas_um, scales, "float64")
    arrays = {}
    for name, values in (("at_spots", found.at_spots), ("at_patches", found.at_patches)):
        outputs = values.sum(axis=0) + ridges.offset
        arrays[name] = outputs if how.has_depth else np.hstack([outputs, np.zeros((len(outputs), 1))])
    return arrays


def _fit_bases(cohort: Cohort, moments: Sequence[GeneMoments], axes: Floats) -> list[AdaptedBasis]:
    """Compute loadings and patterns of each fit's sections."""
    columns = GeneMoments.merge(moments).choose_basis()
    products = {int(k): np.zeros((len(columns), len(columns))) for k in np.unique(cohort.fold)}
    sums = dict[tuple[int, int], RidgeSums]()
    for index in range(len(cohort.sections)):
        section, fold = cohort.input(index), int(cohort.fold[index])
        assert section.earlier is not None
        products[fold] += gene_products(section.target, columns)
        own, cell = (
            pattern_sums(section.target, _about_mean(section.earlier)[0]),
            (int(cohort.group[index]), fold),
        )
        sums[cell] = sums[cell] + own if cell in sums else own
    bases = []
    for fit in cohort.fits:
        used = [part for fold, part in products.items() if fold != fit.fold]
        cells = {cell: part for cell, part in sums.items() if cell[1] != fit.fold}
        groups = [
            total(part for cell, part in cells.items() if cell[0] == group)
            for group in sorted({group for group, _ in cells})
        ]
        bases.append(AdaptedBasis.fit(groups, np.sum(used, axis=0), columns, axes))
    return bases


def _earlier_mean(cohort: Cohort, part: Solved) -> Floats:
    """Return the mean of the earlier model's outputs over a fit's spots."""
    outputs = [
        cohort.folder.load_one(cohort.earlier_name(index), "at_spots") for index in part.fit.sections.tolist()
    ]
    return np.asarray(
        np.sum([values.sum(axis=0) for values in outputs], axis=0) / sum(len(values) for values in outputs)
    )


def _residual_sums(cohort: Cohort, part: Solved, basis: AdaptedBasis) -> tuple[Floats, Floats] | None:
    """Add up products of residuals of all genes with their patterns, and squares of these; None if all are in the basis."""
    n_genes = len(basis.loadings)
    if len(basis.residual.columns) == n_genes:
        return None
    products, squares = np.zeros((n_genes, basis.n_patterns)), np.zeros(basis.n_patterns)
    for index in part.fit.sections.tolist():
        section = cohort.input(index)
        assert section.earlier is not None
        patterns = _about_mean(section.earlier)[0]
        own = basis.residual_patterns(section.target, patterns)
        products += basis.residual_products(section.target, patterns, own)
        squares += (own**2).sum(axis=0)
    return products, squares
