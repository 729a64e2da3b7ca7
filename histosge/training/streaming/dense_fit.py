"""The preset `dense` on a cohort that does not fit into memory: the fit of `histosge.models.dense`, from sums."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histosge.data.embedded_slide import EmbeddedSlide
from histosge.data.gaussian_pooling import Precision
from histosge.models.cohort_ridges import ScaleSolution, StackingSums
from histosge.models.count_loss import CountHead
from histosge.models.dense import DenseModel
from histosge.models.linear_algebra import Affine, Floats, Indices
from histosge.models.low_rank_targets import LowRankTargets
from histosge.models.scale_differences import ScaleDifferences
from histosge.models.scale_ridges import SIGMAS_UM, ScaleRidges, average_scales
from histosge.models.target_sums import GeneMoments, TargetBasis, log_library
from histosge.training.kept_sums import KeptSums, SumsToKeep, dense_shared
from histosge.training.streaming.cohort import Cohort, Fit, SectionInput, SectionSource
from histosge.training.streaming.gather import GroupSums, SpotOutputs, gather_sums
from histosge.training.streaming.hold_out import (
    HeldOutSection,
    ScaleOutputs,
    predict_section,
    take_genes,
)
from histosge.training.streaming.progress import Passes
from histosge.training.streaming.section_tasks import OnStep
from histosge.training.streaming.solve_fits import solve_ridges
from histosge.training.streaming.start import Start
from histosge.training.streaming.survey import fit_bases, fit_differences


@dataclass(frozen=True)
class _PatternOutputs:
    """Patterns of every fit side by side, and depth: what the ridges are fitted to, see `SpotOutputs`."""

    bases: Sequence[TargetBasis]

    @property
    def n_outputs(self) -> int:
        return sum(int(basis.axes.shape[1]) for basis in self.bases) + 1

    def of_section(self, section: SectionInput) -> Callable[[Indices], Floats]:
        return section_outputs(section, self.bases).__getitem__


def section_outputs(section: SectionInput, bases: Sequence[TargetBasis]) -> Floats:
    """Return the patterns of each basis, and depth about the section's own mean, ``(n_spots, n_outputs)``."""
    log = log_library(section.library)
    return np.column_stack([*(basis.patterns(section.target) for basis in bases), log - log.mean()])


@dataclass(frozen=True)
class Solved:
    """A fit whose ridges are not yet averaged.

    Parameters
    ----------
    fit
        Which sections it is fitted to.
    columns
        Its outputs among those of all fits.
    groups
        Numbers of the groups that were left out in turn.
    ridges
        One solution for each scale, and one for their differences.
    """

    fit: Fit
    columns: Indices
    groups: list[int]
    ridges: list[ScaleSolution]

    @property
    def n_patterns(self) -> int:
        """Return how many outputs come before depth."""
        return len(self.columns) - 1


HeldOutPatterns = tuple[int, NDArray[np.float32]]
"""A section's fold, and what each ridge predicts of the patches under its spots, ``(n_ridges, n, n_outputs)``, less its
offset."""


@dataclass(frozen=True)
class DensePredictor:
    """Predicts sections by one of several fits, from what their ridges predict.

    Parameters
    ----------
    fits
        Ridges and targets by fold.
    heads
        By fold, what turns patterns into genes in place of the targets, for a count loss.
    """

    fits: Mapping[int, tuple[ScaleRidges, LowRankTargets]]
    heads: Mapping[int, CountHead] = field(default_factory=dict)

    def project(self, found: HeldOutPatterns) -> tuple[NDArray[np.float32], LowRankTargets]:
        """Return the patterns and the depth of the patches, and what turns patterns into genes."""
        fold, at_patches = found
        ridges, targets = self.fits[fold]
        # The map's own precision, so that intervals are of what prediction gives.
        projected = np.tensordot(np.array(ridges.weights), at_patches, axes=1) + ridges.offset
        return projected.astype(np.float32), targets

    def predict(self, section: SectionInput, found: HeldOutPatterns) -> HeldOutSection:
        """Predict the patches under a section's spots."""
        projected, targets = self.project(found)
        patterns, depth = projected[:, :-1].astype(np.float64), projected[:, -1]
        if (head := self.heads.get(found[0])) is not None:
            return HeldOutSection(lambda some: head.take(some)(patterns), depth)
        return HeldOutSection(lambda some: take_genes(targets, some).to_genes(patterns), depth)


@dataclass(frozen=True)
class StreamedDense:
    """A fitted `dense`, and what its fits without a section predict of it.

    Parameters
    ----------
    model
        Fitted to all sections.
    predictor
        The fits without each fold.
    sums
        Of the final fit, to be kept; None for a count loss, which does not follow from them.
    weights
        Of the scales, by the name of the fit.
    """

    model: DenseModel
    cohort: Cohort
    predictor: DensePredictor
    sums: SumsToKeep | None
    weights: Mapping[str, Floats]

    @property
    def held_out(self) -> "StreamedDense":
        """Return itself: it knows the fits without each fold."""
        return self

    def held_out_input(self, index: int) -> HeldOutPatterns:
        """Return what pass 3 left of a section."""
        at_patches = self.cohort.folder.load_one(held_out_name(self.cohort, index), "at_patches")
        return int(self.cohort.fold[index]), at_patches

    def held_out_patterns(self, index: int) -> tuple[NDArray[np.float32], LowRankTargets]:
        """Return the patterns of the patches under a section's spots, and what turns them into genes."""
        projected, targets = self.predictor.project(self.held_out_input(index))
        return projected[:, :-1], targets

    def out_of_fold(self, fit: Fit, index: int) -> Floats:
        """Return the patterns at a section's spots as a fit without its group predicts them, about the section's mean.

        It takes a fit with `keeps_out_of_fold`, that the section is part of.
        """
        scales = self.cohort.folder.load_one(held_out_name(self.cohort, index), f"{fit.name}.at_spots")
        patterns = np.tensordot(self.weights[fit.name], scales, axes=1)
        return np.asarray(patterns - patterns.mean(axis=0))


def fit_dense(
    cohort: Cohort,
    moments: Sequence[GeneMoments],
    passes: Passes,
    start: Start | None = None,
    *,
    keeps_out_of_fold: bool = False,
) -> StreamedDense:
    """Fit `dense` to a surveyed cohort whose targets are written.

    The cohort is read twice, for sums and for predictions of held-out sections; with `start` once.

    Parameters
    ----------
    start
        An earlier model, to whose sums those of the cohort are added. Its patterns of genes and the weights of its ridges
        stay. Sums of earlier versions are of the scales alone: the new model has no ridge on their differences then.
    keeps_out_of_fold
        Keep what `StreamedDense.out_of_fold` returns.
    """
    kept = None if start is None else start.kept
    bases = fit_bases(cohort, moments) if kept is None else [kept.basis]
    reference = cohort.survey(0).embedding_mean if kept is None else kept.reference
    differences = fit_differences(cohort) if kept is None else kept.differences
    n_patterns, outputs = bases[0].axes.shape[1], _PatternOutputs(bases)
    gather_sums(cohort, SIGMAS_UM, outputs, reference, passes.begin("reading"), differences)

    columns = [
        np.append(np.arange(k * n_patterns, (k + 1) * n_patterns), outputs.n_outputs - 1)
        for k in range(len(cohort.fits))
    ]
    sums_of = [
        ridge_sums(cohort, fit, own, kept, differences) for fit, own in zip(cohort.fits, columns, strict=True)
    ]
    ridges = solve_ridges(cohort, sums_of, reference, [n_patterns] * len(sums_of), differences)
    solved = [
        Solved(fit, own, sums[0].groups, found)
        for fit, own, sums, found in zip(cohort.fits, columns, sums_of, ridges, strict=True)
    ]
    if start is None:
        how = HoldingOut(cohort.source, outputs, differences, keeps_out_of_fold)
        hold_out(cohort, solved, how, passes.begin("holding out"))
        weights = [stacking_sums(cohort, part).weights() for part in solved]
    else:
        weights = [_weights_of(start.saved.model)]
    fitted = dict[int | None, tuple[ScaleRidges, LowRankTargets]]()
    for part, basis, of_ridges in zip(solved, bases, weights, strict=True):
        found = _genes(cohort, part, basis, moments, kept)
        offset = np.append(np.zeros(n_patterns), found.moments.mean_log_library)
        averaged = average_scales(
            [one.ridge for one in part.ridges], of_ridges, [one.penalties for one in part.ridges], differences
        )
        targets = basis.targets(found.moments, found.loadings)
        fitted[part.fit.fold] = replace(averaged, offset=averaged.offset + offset), targets
        if part.fit.fold is None:
            sums = _sums_to_keep(cohort, part, basis, reference, found, kept, differences)
    model = DenseModel(*fitted.pop(None), has_depth=True)
    held_out = {fold: found for fold, found in fitted.items() if fold is not None}
    names = (part.fit.name for part in solved)
    return StreamedDense(
        model, cohort, DensePredictor(held_out), sums, dict(zip(names, weights, strict=True))
    )


def ridge_sums(
    cohort: Cohort, fit: Fit, columns: Indices, kept: KeptSums | None, differences: ScaleDifferences | None
) -> list[GroupSums]:
    """Return the sums of each scale, and those of the differences."""
    n_ridges = len(SIGMAS_UM) + (differences is not None)
    return [GroupSums(cohort, fit, number, columns, kept) for number in range(n_ridges)]


def _weights_of(model: object) -> Floats:
    """Return the weights of the ridges of a fitted `dense`."""
    assert isinstance(model, DenseModel)
    assert isinstance(model.linear, ScaleRidges)
    return np.array(model.linear.weights)


def held_out_name(cohort: Cohort, index: int) -> str:
    """Return the file of what fits without a section predict of it."""
    return f"heldout-{cohort.sections[index].slide_id}"


@dataclass(frozen=True)
class HoldingOut:
    """How `hold_out` predicts sections; it pickles.

    Parameters
    ----------
    source
        Where embeddings are.
    outputs
        What the ridges are fitted to.
    differences
        Of the scales, that the last ridge sees; None if there is none.
    keeps_at_spots
        Keep what each ridge predicts at the spots, see `StreamedDense.out_of_fold`.
    """

    source: SectionSource
    outputs: SpotOutputs
    differences: ScaleDifferences | None
    keeps_at_spots: bool = False


@dataclass(frozen=True)
class _HeldOutSection:
    """A section with the fits that it is no part of.

    Parameters
    ----------
    weighing
        Names and output columns of the fits whose ridges it helps to weigh.
    ridges
        One for each scale and one for their differences; each of those fits without its group, then of the fit without its
        fold, where `is_calibrating`.
    """

    section: SectionInput
    weighing: Sequence[tuple[str, Indices]]
    is_calibrating: bool
    ridges: Sequence[Affine]


def hold_out(cohort: Cohort, solved: Sequence[Solved], how: HoldingOut, on_step: OnStep) -> None:
    """Write what the fits without a section predict of it: sums for the ridges' weights, and the patches under spots."""

    def items() -> Iterator[tuple[str, _HeldOutSection | None]]:
        for index, section in enumerate(cohort.sections):
            is_there = cohort.folder.has(held_out_name(cohort, index))
            yield section.slide_id, None if is_there else _with_fits(cohort, index, solved)

    found = cohort.tasks.run(_predict_held_out, how, items(), on_step)
    for index, arrays in enumerate(found):
        if arrays is not None:
            cohort.folder.save(held_out_name(cohort, index), arrays)


def _with_fits(cohort: Cohort, index: int, solved: Sequence[Solved]) -> _HeldOutSection:
    group, fold = int(cohort.group[index]), int(cohort.fold[index])
    # Of the fits that the section is in, those without its group; of the fit without its fold, the whole solution.
    weighing = [part for part in solved if part.fit.fold != fold and len(part.groups) > 1]
    calibrating = [part for part in solved if part.fit.fold == fold]
    ridges = list[Affine]()
    for number in range(len(solved[0].ridges)):
        found = [part.ridges[number].without[part.groups.index(group)] for part in weighing]
        found += [part.ridges[number].ridge for part in calibrating]
        ridges.append(
            Affine(np.hstack([fit.weight for fit in found]), np.concatenate([fit.offset for fit in found]))
        )
    named = [(part.fit.name, part.columns[:-1]) for part in weighing]
    return _HeldOutSection(cohort.input(index), named, bool(calibrating), ridges)


def _predict_held_out(how: HoldingOut, item: _HeldOutSection) -> dict[str, NDArray[Any]]:
    section, ridges = item.section, item.ridges
    slide = how.source.open(section.slide_id)
    precision: Precision = "float64" if how.keeps_at_spots else "float32"
    predicted = _predict_ridges(slide, section, ridges, how.differences, precision)
    outputs = how.outputs.of_section(section)(np.arange(len(section.library)))
    arrays, start = dict[str, np.ndarray](), 0
    for name, own in item.weighing:
        sums = StackingSums.zeros(1, len(own), len(ridges))
        columns = slice(start, start + len(own))
        sums.add(0, predicted.at_spots[:, :, columns], outputs[:, own])
        arrays |= {f"{name}.{key}": array for key, array in sums.arrays().items()}
        if how.keeps_at_spots:
            arrays[f"{name}.at_spots"] = predicted.at_spots[:, :, columns]
        start = columns.stop
    if item.is_calibrating:
        # Offsets are added with the weights of the ridges, which are not known yet.
        offsets = np.stack([part.offset[start:] for part in ridges])[:, None, :]
        arrays["at_patches"] = (predicted.at_patches[:, :, start:] - offsets).astype(np.float32)
    return arrays


def _predict_ridges(
    slide: EmbeddedSlide,
    section: SectionInput,
    ridges: Sequence[Affine],
    differences: ScaleDifferences | None,
    precision: Precision,
) -> ScaleOutputs:
    """Predict a section by one ridge for each scale and one for their differences, ``(n_ridges, n, n_outputs)``."""
    if differences is None:
        return predict_section(slide, section.under, SIGMAS_UM, ridges, precision)
    # The last ridge has a part at each scale, beside that scale's own: the slide is read once.
    *own, last = ridges
    parts = [
        Affine(np.hstack([ridge.weight, more]), np.append(ridge.offset, 0 * last.offset))
        for ridge, more in zip(own, differences.to_scales(last.weight), strict=True)
    ]
    predicted = predict_section(slide, section.under, SIGMAS_UM, parts, precision)
    n = len(last.offset)
    return ScaleOutputs(
        *(
            np.concatenate([found[..., :n], found[..., n:].sum(axis=0, keepdims=True) + last.offset])
            for found in (predicted.at_spots, predicted.at_patches)
        )
    )


def stacking_sums(cohort: Cohort, part: Solved) -> StackingSums:
    """Add up what the sections of a fit gave for the weights of the ridges."""
    sums = StackingSums.zeros(len(part.groups), part.n_patterns, len(part.ridges))
    if len(part.groups) < 2:
        return sums
    for index in part.fit.sections.tolist():
        found = cohort.folder.load(held_out_name(cohort, index))
        own = {name: found[f"{part.fit.name}.{name}"] for name in sums.arrays()}
        sums.add_sums(part.groups.index(int(cohort.group[index])), own)
    return sums


@dataclass(frozen=True)
class _Genes:
    """Moments of the genes of a fit's sections, and products with their patterns where the basis lacks some."""

    moments: GeneMoments
    loadings: tuple[Floats, Floats] | None


def _genes(
    cohort: Cohort,
    part: Solved,
    basis: TargetBasis,
    moments: Sequence[GeneMoments],
    kept: KeptSums | None,
) -> _Genes:
    """Add up what the genes of a fit's sections come to."""
    every = [moments[index] for index in part.fit.sections.tolist()]
    if kept is not None:
        every.append(kept.moments)
    n_genes = len(every[0].mean)
    if len(basis.columns) == n_genes:
        return _Genes(GeneMoments.merge(every), None)
    loadings, squares = np.zeros((n_genes, part.n_patterns)), np.zeros(part.n_patterns)
    if kept is not None and kept.loadings is not None:
        loadings, squares = (array.copy() for array in kept.loadings)
    for index in part.fit.sections.tolist():
        target = cohort.target(index)
        patterns = basis.patterns(target)
        loadings += basis.loading_products(target, patterns)
        squares += (patterns**2).sum(axis=0)
    return _Genes(GeneMoments.merge(every), (loadings, squares))


def _sums_to_keep(
    cohort: Cohort,
    part: Solved,
    basis: TargetBasis,
    reference: Floats,
    genes: _Genes,
    kept: KeptSums | None,
    differences: ScaleDifferences | None,
) -> SumsToKeep:
    ridges = ridge_sums(cohort, part.fit, part.columns, kept, differences)
    return SumsToKeep(
        DenseModel.name,
        SIGMAS_UM,
        dense_shared(reference, basis, genes.moments, genes.loadings, differences),
        cohort.n_before + len(cohort.sections),
        ((number, [sums[i] for sums in ridges]) for i, number in enumerate(part.groups)),
        0 if differences is None else differences.n_inputs,
    )
