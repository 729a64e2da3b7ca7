"""Pass 1 of a streamed training: usable spots, the choice of genes, their targets on disk, and patterns of genes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from featurestore.events import OnMessage
from featurestore.slides.sample_sheet import Sample
from histosge.calibration.embedding_distance import every_patch
from histosge.data.distinct_spots import DistinctSpots
from histosge.data.gene_choice import GeneChoice
from histosge.data.genes import SCALE, GeneVariance, check_shared, gene_columns
from histosge.data.section_loading import (
    SpotCounts,
    check_one_kind,
    no_section,
    report_spots,
)
from histosge.data.section_survey import SectionSurvey, read_surveyed, survey_section
from histosge.data.sections import Spots
from histosge.data.seurat_ranks import SeuratRanks
from histosge.models.dense import N_PATTERNS
from histosge.models.linear_algebra import Floats
from histosge.models.scale_differences import PatchSample, ScaleDifferences, is_projected
from histosge.models.scale_ridges import differences_of
from histosge.models.target_sums import GeneMoments, TargetBasis, gene_products
from histosge.threads import FEW_THREADS, prefetch
from histosge.training.streaming.cohort import Cohort, CohortSection, Fit, SectionSource
from histosge.training.streaming.section_tasks import OnStep, SectionTasks
from histosge.training.streaming.work_folder import WorkFolder


@dataclass(frozen=True)
class Surveyed:
    """What pass 1 found: the cohort, and the genes that were chosen on it."""

    cohort: Cohort
    genes: tuple[str, ...]


@dataclass(frozen=True)
class _ToSurvey:
    """A section that is surveyed, or that was in an earlier run: then its genes alone are ranked."""

    sample: Sample
    earlier: SectionSurvey | None


@dataclass(frozen=True)
class _HowToSurvey:
    source: SectionSource
    choice: GeneChoice
    force: bool


@dataclass(frozen=True)
class _Found:
    """What one section gave.

    Parameters
    ----------
    survey, counts, description, marks
        See `SurveyedSpots`; None of a section that was surveyed in an earlier run.
    ranking
        Of its genes.
    patches
        Some of its embeddings, see `PatchSample`; None where they are not needed.
    """

    survey: SectionSurvey | None
    counts: SpotCounts | None
    description: str
    marks: NDArray[np.uint64] | None
    ranking: GeneVariance | SeuratRanks
    patches: NDArray[np.float16] | None = None


def _survey(how: _HowToSurvey, section: _ToSurvey) -> _Found:
    sample, store, ranking = section.sample, how.source.store, how.choice.new_ranking()
    slide = how.source.open(sample.slide_id)
    if section.earlier is not None:
        ranking.add(read_surveyed(sample, store, slide, section.earlier))
        return _Found(None, None, "", None, ranking)
    patches = PatchSample()
    # Of short embeddings none are needed: they are not projected.
    dim = slide.identity.dim
    on_embedding = patches.add if is_projected(dim) else _ignore
    found = survey_section(sample, store, slide, every_patch, on_embedding, force=how.force)
    ranking.add(found.spots)
    some = patches.rows(dim, found.under) if is_projected(dim) else None
    return _Found(found.survey, found.counts, found.description, found.marks, ranking, some)


def _ignore(embedding: NDArray[np.float32]) -> None:
    pass


@dataclass(frozen=True)
class SurveyPlan:
    """How a cohort is surveyed.

    Parameters
    ----------
    source
        Where embeddings are.
    choice
        Of genes.
    folder
        For files of the training.
    tasks
        What visits sections.
    calibrated
        Whether folds are held out.
    force
        Take spots that do not fit their slide, with a warning.
    n_before
        Sections whose sums are there already.
    """

    source: SectionSource
    choice: GeneChoice
    folder: WorkFolder
    tasks: SectionTasks
    calibrated: bool
    force: bool
    n_before: int


def survey_cohort(
    samples: Sequence[Sample], plan: SurveyPlan, on_message: OnMessage, on_step: OnStep
) -> Surveyed:
    """Look at every section once, and choose genes as `histosge.data.section_loading.load_sections` and `choose` do.

    Raises
    ------
    ExpressionError, StoreError, ModelError
        If a section cannot be used, none is left, or encoders or grids differ.
    """
    folder, distinct, ranking = plan.folder, DistinctSpots(), plan.choice.new_ranking()
    sections, first = list[CohortSection](), None
    ordered = sorted(samples, key=lambda sample: sample.slide_id)

    def items() -> Iterator[tuple[str, _ToSurvey]]:
        for sample in ordered:
            earlier = None
            if folder.has(_counted(sample)):
                earlier = SectionSurvey.from_arrays(folder.load(_surveyed(sample)))
            yield sample.slide_id, _ToSurvey(sample, earlier)

    how = _HowToSurvey(plan.source, plan.choice, plan.force)
    for sample, found in zip(ordered, plan.tasks.run(_survey, how, items(), on_step), strict=True):
        assert found is not None
        if found.survey is not None and found.counts is not None:
            distinct.add(sample, found.marks)
            is_used = report_spots(sample.slide_id, found.description, found.counts, on_message)
            counted = [found.counts.n_under_min_counts, len(found.counts.uncovered), is_used]
            folder.save(_surveyed(sample), found.survey.arrays())
            if found.patches is not None:
                folder.save(_sampled(sample), {"embedding": found.patches})
            folder.save(_counted(sample), {"counts": np.array(counted)})
        under_min, uncovered, is_used = folder.load(_counted(sample))["counts"].tolist()
        if not is_used:
            continue
        # Refused as it comes: the others would be surveyed for nothing.
        before = ranking.genes if sections else found.ranking.genes
        merge_rankings(ranking, found.ranking)
        check_shared(ranking.genes, sample.slide_id, found.ranking.genes, before)
        slide = plan.source.open(sample.slide_id)
        # Compared with the first as they come: one that differs is refused before the others are read.
        first = first or slide
        check_one_kind([first, slide])
        n_spots = len(folder.load_one(_surveyed(sample), "usable"))
        sections.append(CohortSection(sample, slide.fingerprint, n_spots, int(under_min), int(uncovered)))
    if first is None:
        raise no_section("the sample sheet")
    cohort = Cohort(plan.source, sections, first, folder, plan.calibrated, plan.n_before, plan.tasks)
    return Surveyed(cohort, plan.choice.choose_from(ranking))


def _surveyed(sample: Sample) -> str:
    return f"survey-{sample.slide_id}"


def _sampled(sample: Sample) -> str:
    return f"patches-{sample.slide_id}"


def fit_differences(cohort: Cohort) -> ScaleDifferences | None:
    """Return what `histosge.models.scale_ridges.fit_differences` does, from what pass 1 kept of each section."""
    files = (_sampled(section.sample) for section in cohort.sections)
    samples = (cohort.folder.load_one(file, "embedding") for file in files)
    return differences_of(cohort.first.identity.dim, samples)


def _counted(sample: Sample) -> str:
    return f"counted-{sample.slide_id}"


def merge_rankings(ranking: GeneVariance | SeuratRanks, other: GeneVariance | SeuratRanks) -> None:
    """Add a section's ranking of genes to that of the sections before it."""
    if isinstance(ranking, GeneVariance):
        assert isinstance(other, GeneVariance)
        ranking.merge(other)
    else:
        assert isinstance(other, SeuratRanks)
        ranking.merge(other)


def write_targets(cohort: Cohort, genes: Sequence[str], on_step: OnStep) -> list[GeneMoments]:
    """Write log1p(CP10k) of the chosen genes of each section to the work folder; return the genes' moments."""

    def items() -> Iterator[tuple[str, _Untargeted | None]]:
        for index, section in enumerate(cohort.sections):
            is_there = cohort.folder.has(f"target-{section.slide_id}")
            yield section.slide_id, None if is_there else _Untargeted(section.sample, cohort.survey(index))

    how, moments = _HowToTarget(cohort.source, tuple(genes)), []
    for index, target in enumerate(cohort.tasks.run(_target, how, items(), on_step)):
        if target is not None:
            parts = {"data": target.data, "indices": target.indices, "indptr": target.indptr}
            name = f"target-{cohort.sections[index].slide_id}"
            cohort.folder.save(name, {**parts, "shape": np.array(target.shape)})
        moments.append(GeneMoments.from_section(cohort.target(index), cohort.survey(index).library))
    return moments


@dataclass(frozen=True)
class _HowToTarget:
    source: SectionSource
    genes: tuple[str, ...]


@dataclass(frozen=True)
class _Untargeted:
    sample: Sample
    survey: SectionSurvey


def _target(how: _HowToTarget, section: _Untargeted) -> sparse.csr_matrix:
    slide = how.source.open(section.sample.slide_id)
    spots = read_surveyed(section.sample, how.source.store, slide, section.survey)
    return sparse_target(spots, how.genes, section.survey.library)


def sparse_target(spots: Spots, genes: Sequence[str], library: np.ndarray) -> sparse.csr_matrix:
    """Return what `histosge.data.genes.select_target` does, sparse."""
    chosen = sparse.csr_matrix(spots.counts[:, gene_columns(spots, genes)], dtype=np.float64)
    # The same operations as there, so that the values are the same bits: a zero stays one.
    scaled = chosen.copy()
    scaled.data *= np.repeat(SCALE / np.maximum(library, 1), np.diff(chosen.indptr))
    scaled.data = np.log1p(scaled.data).astype(np.float32)
    return sparse.csr_matrix((scaled.data, scaled.indices, scaled.indptr), shape=scaled.shape)


def fit_bases(cohort: Cohort, moments: Sequence[GeneMoments]) -> list[TargetBasis]:
    """Compute the patterns of each fit's training sections, on the threads of the cohort's tasks."""
    columns, threads = GeneMoments.merge(moments).choose_basis(), min(cohort.tasks.threads, FEW_THREADS)
    products = {int(k): np.zeros((len(columns), len(columns))) for k in np.unique(cohort.fold)}

    def of_section(index: int) -> Floats:
        return gene_products(cohort.target(index), columns)

    # Added up in the order of the sections: the same bits on any number of threads.
    for index, found in enumerate(prefetch(of_section, range(len(cohort.sections)), threads)):
        products[int(cohort.fold[index])] += found

    def basis(fit: Fit) -> TargetBasis:
        used = [part for fold, part in products.items() if fold != fit.fold]
        return TargetBasis.fit(np.sum(used, axis=0), columns, N_PATTERNS)

    return list(prefetch(basis, cohort.fits, threads))


def card_sections(cohort: Cohort) -> tuple[dict[str, object], ...]:
    """Return what a model's card tells of each section."""
    return tuple(
        {
            "slide_id": section.slide_id,
            "donor": section.donor,
            "slide_fingerprint": section.fingerprint,
            "spots": section.n_spots,
            "few_counts": section.n_under_min_counts,
            "off_tissue": section.n_uncovered,
        }
        for section in cohort.sections
    )
