"""The sections of a streamed training: who they are, what is held out together, and their files in the work folder."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from featurestore.slides.sample_sheet import Sample
from featurestore.storage.store import Store
from histosge.calibration.held_out_parts import fold_sections, number_donors, what_is_held_out
from histosge.data.block_bands import SpotPatches
from histosge.data.embedded_slide import EmbeddedSlide
from histosge.data.section_loading import Selection
from histosge.data.section_survey import SectionSurvey
from histosge.heldout.donors import named_donors
from histosge.models.scale_ridges import MAX_GROUPS
from histosge.training.streaming.section_tasks import InThisProcess, SectionTasks
from histosge.training.streaming.work_folder import WorkFolder

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class CohortSection:
    """One section, without anything that grows with it.

    Parameters
    ----------
    sample
        Its row of the sheet.
    fingerprint
        Of the slide's file.
    n_spots, n_under_min_counts, n_uncovered
        Usable spots, and those that were left out.
    """

    sample: Sample
    fingerprint: str
    n_spots: int
    n_under_min_counts: int
    n_uncovered: int

    @property
    def slide_id(self) -> str:
        """Return its slide."""
        return self.sample.slide_id

    @property
    def donor(self) -> str:
        """Return whose tissue it is."""
        return self.sample.donor or self.sample.slide_id


@dataclass(frozen=True)
class SectionSource:
    """Where embeddings are. It pickles: a worker opens the same store by itself.

    Parameters
    ----------
    store, selection
        Store, and which of its embeddings.
    """

    store: Store
    selection: Selection

    def open(self, slide_id: str) -> EmbeddedSlide:
        """Open the embedding of a section."""
        return self.selection.open(self.store, slide_id)

    def __reduce__(self) -> tuple[Any, ...]:
        # By its address: handles of files and servers belong to one process.
        return _open_source, (self.store.location.url, self.selection)


def _open_source(url: str, selection: Selection) -> SectionSource:
    return SectionSource(Store.open(url), selection)


@dataclass(frozen=True)
class SectionInput:
    """What a pass needs of a surveyed section beside its embeddings.

    Parameters
    ----------
    slide_id
        Whose it is.
    under
        Patches under its usable spots.
    library
        Total counts of these spots, ``(n_spots,)``.
    target
        log1p(CP10k) of the chosen genes, ``(n_spots, n_genes)``, float32.
    earlier
        Outputs of a model that is adapted, ``(n_spots, n_outputs)``; None without one.
    """

    slide_id: str
    under: SpotPatches
    library: NDArray[np.float64]
    target: sparse.csr_matrix
    earlier: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Cohort:
    """All sections that are trained on, by slide id.

    Parameters
    ----------
    source
        Where their embeddings are.
    sections
        By slide id: sums are rounded, so that another order would change the last bits.
    first
        The embedding of the first section: encoder and grid are those of all.
    folder
        Of the files that each pass leaves.
    calibrated
        Whether folds are held out.
    n_before
        Sections whose sums are there already, so that groups are counted on from them.
    tasks
        What visits sections.
    """

    source: SectionSource
    sections: Sequence[CohortSection]
    first: EmbeddedSlide
    folder: WorkFolder
    calibrated: bool
    n_before: int = 0
    tasks: SectionTasks = field(default_factory=InThisProcess)

    @cached_property
    def donors(self) -> list[str]:
        """Return the donor of each section; empty where the sheet names none."""
        return named_donors(self.sections)

    @cached_property
    def donor_numbers(self) -> Indices:
        """Return the number of each section's donor."""
        return number_donors(self.donors or [""] * len(self.sections))

    @property
    def n_spots(self) -> int:
        """Return the usable spots of all sections."""
        return sum(section.n_spots for section in self.sections)

    @cached_property
    def fold(self) -> Indices:
        """Return the fold that each section is held out in; all 0 where nothing is held out."""
        if not self.calibrated:
            return np.zeros(len(self.sections), np.int64)
        return fold_sections(self.donors or [""] * len(self.sections), self.n_spots)

    @cached_property
    def group(self) -> Indices:
        """Return the group that each section is left out with when penalties are chosen, as `fit_scale_ridges` does."""
        return (self.n_before + np.arange(len(self.sections))) % MAX_GROUPS

    @property
    def held_out(self) -> str:
        """Return whether donors or sections are held out."""
        return what_is_held_out(self.sections, self.donors)

    @cached_property
    def fits(self) -> list["Fit"]:
        """Return the final fit, and one without each fold."""
        everything = np.arange(len(self.sections))
        found = [Fit("whole", everything, None)]
        if self.calibrated:
            found += [Fit(f"fold{k}", everything[self.fold != k], int(k)) for k in np.unique(self.fold)]
        return found

    @cached_property
    def cells(self) -> list["Cell"]:
        """Return the sections of each group and fold, whose sums are kept together."""
        pairs = sorted(set(zip(self.group.tolist(), self.fold.tolist(), strict=True)))
        return [
            Cell(g, k, np.flatnonzero((self.group == g) & (self.fold == k)).astype(np.int64))
            for g, k in pairs
        ]

    def open(self, index: int) -> EmbeddedSlide:
        """Open the embedding of a section: tissue and thumbnails of a thousand slides would not fit into memory."""
        return self.source.open(self.sections[index].slide_id)

    def survey(self, index: int) -> SectionSurvey:
        """Return what pass 1 kept of a section."""
        return SectionSurvey.from_arrays(self.folder.load(f"survey-{self.sections[index].slide_id}"))

    def target(self, index: int) -> sparse.csr_matrix:
        """Return log1p(CP10k) of a section's usable spots, ``(n_spots, n_genes)``, float32."""
        found = self.folder.load(f"target-{self.sections[index].slide_id}")
        return sparse.csr_matrix(
            (found["data"], found["indices"], found["indptr"]), shape=tuple(found["shape"])
        )

    def input(self, index: int) -> SectionInput:
        """Return what passes need of a section whose targets are written."""
        survey, name = self.survey(index), self.earlier_name(index)
        earlier = self.folder.load_one(name, "at_spots") if self.folder.has(name) else None
        return SectionInput(
            self.sections[index].slide_id, survey.under, survey.library, self.target(index), earlier
        )

    def earlier_name(self, index: int) -> str:
        """Return the file of what a model that is adapted predicts of a section."""
        return f"earlier-{self.sections[index].slide_id}"


@dataclass(frozen=True)
class Fit:
    """A fit to some of the sections.

    Parameters
    ----------
    name
        Of its files.
    sections
        Indices of those that it is fitted to.
    fold
        That it is fitted without; None for the final one.
    """

    name: str
    sections: Indices
    fold: int | None


@dataclass(frozen=True)
class Cell:
    """Sections of one group and one fold.

    Parameters
    ----------
    group, fold
        See `Cohort`.
    sections
        Their indices.
    """

    group: int
    fold: int
    sections: Indices

    @property
    def name(self) -> str:
        """Return the name of its file."""
        return f"sums-{self.group}-{self.fold}"
