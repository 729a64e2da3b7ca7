"""Pass 1 of a streamed training: usable spots, the choice of genes, their targets on disk, and patterns of genes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from featurestore.events import OnMessage
from featurestore.slides.sample_sheet import Sample
from featurestore.storage.store import Store
from histosge.calibration.embedding_distance import every_patch
from histosge.data.distinct_spots import DistinctSpots
from histosge.data.gene_choice import GeneChoice
from histosge.data.genes import SCALE, gene_columns
from histosge.data.section_loading import (
    Selection,
    check_one_kind,
    no_section,
    report_spots,
)
from histosge.data.section_survey import SectionSurvey, read_surveyed, survey_section
from histosge.data.sections import Spots
from histosge.models.dense import N_PATTERNS
from histosge.models.target_sums import GeneMoments, TargetBasis, gene_products
from histosge.training.streaming.cohort import Cohort, CohortSection
from histosge.training.streaming.work_folder import WorkFolder

OnStep = Callable[[str], None]
"""Called with the slide id of each section before it is worked on."""


@dataclass(frozen=True)
class Surveyed:
    """What pass 1 found: the cohort, and the genes that were chosen on it."""

    cohort: Cohort
    genes: tuple[str, ...]


def survey_cohort(
    samples: Sequence[Sample],
    store_url: str,
    selection: Selection,
    choice: GeneChoice,
    folder: WorkFolder,
    *,
    calibrated: bool,
    force: bool,
    n_before: int,
    on_message: OnMessage,
    on_step: OnStep,
) -> Surveyed:
    """Look at every section once, and choose genes as `histosge.data.section_loading.load_sections` and `choose` do.

    Raises
    ------
    ExpressionError, StoreError, ModelError
        If a section cannot be used, none is left, or encoders or grids differ.
    """
    store = Store.open(store_url)
    distinct, ranking = DistinctSpots(), choice.new_ranking()
    sections, first = list[CohortSection](), None
    for sample in sorted(samples, key=lambda sample: sample.slide_id):
        on_step(sample.slide_id)
        slide = selection.open(store, sample.slide_id)
        name, counts_name = f"survey-{sample.slide_id}", f"counted-{sample.slide_id}"
        if folder.has(counts_name):
            survey = SectionSurvey.from_arrays(folder.load(name))
            under_min, uncovered, is_used = folder.load(counts_name)["counts"].tolist()
            spots = read_surveyed(sample, store, slide, survey)
        else:
            found = survey_section(sample, store, slide, every_patch, force=force)
            distinct.add(sample, found.marks)
            is_used = report_spots(sample.slide_id, found.description, found.counts, on_message)
            under_min, uncovered = found.counts.n_under_min_counts, len(found.counts.uncovered)
            survey, spots = found.survey, found.spots
            folder.save(name, survey.arrays())
            folder.save(counts_name, {"counts": np.array([under_min, uncovered, is_used])})
        if not is_used:
            continue
        ranking.add(spots)
        # Compared with the first as they come: one that differs is refused before the others are read.
        first = first or slide
        check_one_kind([first, slide])
        counts = len(survey.usable), int(under_min), int(uncovered)
        sections.append(CohortSection(sample, slide.fingerprint, *counts))
    if first is None:
        raise no_section("the sample sheet")
    cohort = Cohort(store, selection, sections, first, folder, calibrated, n_before)
    return Surveyed(cohort, choice.choose_from(ranking))


def write_targets(cohort: Cohort, genes: Sequence[str], on_step: OnStep) -> list[GeneMoments]:
    """Write log1p(CP10k) of the chosen genes of each section to the work folder; return the genes' moments."""
    moments = []
    for index, section in enumerate(cohort.sections):
        on_step(section.slide_id)
        name, survey = f"target-{section.slide_id}", cohort.survey(index)
        if not cohort.folder.has(name):
            spots = read_surveyed(section.sample, cohort.store, cohort.open(index), survey)
            target = sparse_target(spots, genes, survey.library)
            parts = {"data": target.data, "indices": target.indices, "indptr": target.indptr}
            cohort.folder.save(name, {**parts, "shape": np.array(target.shape)})
        moments.append(GeneMoments.from_section(cohort.target(index), survey.library))
    return moments


def sparse_target(spots: Spots, genes: Sequence[str], library: np.ndarray) -> sparse.csr_matrix:
    """Return what `histosge.data.genes.select_target` does, sparse."""
    chosen = sparse.csr_matrix(spots.counts[:, gene_columns(spots, genes)], dtype=np.float64)
    # The same operations as there, so that the values are the same bits: a zero stays one.
    scaled = chosen.copy()
    scaled.data *= np.repeat(SCALE / np.maximum(library, 1), np.diff(chosen.indptr))
    scaled.data = np.log1p(scaled.data).astype(np.float32)
    return sparse.csr_matrix((scaled.data, scaled.indices, scaled.indptr), shape=scaled.shape)


def fit_bases(cohort: Cohort, moments: Sequence[GeneMoments]) -> list[TargetBasis]:
    """Compute the patterns of each fit's training sections."""
    columns = GeneMoments.merge(moments).choose_basis()
    products = {int(k): np.zeros((len(columns), len(columns))) for k in np.unique(cohort.fold)}
    for index in range(len(cohort.sections)):
        products[int(cohort.fold[index])] += gene_products(cohort.target(index), columns)
    bases = []
    for fit in cohort.fits:
        used = [part for fold, part in products.items() if fold != fit.fold]
        bases.append(TargetBasis.fit(np.sum(used, axis=0), columns, N_PATTERNS))
    return bases


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
