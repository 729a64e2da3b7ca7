"""Sections of a sample sheet: each slide's embedding in memory, joined with its measured spots.

Every section is checked against its slide, and all of them against each other, before anything is fitted.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featurestore.errors import AmbiguousSelectionError
from featurestore.events import OnMessage, ignore_message
from featurestore.slides.sample_sheet import Sample, read_samples
from featurestore.storage.store import Store
from featurestore.wording import counted
from histosge.data.alignment_check import AlignmentReport
from histosge.data.distinct_spots import DistinctSpots
from histosge.data.embedded_slide import EmbeddedSlide, load_patches, open_embedded
from histosge.data.genes import MIN_COUNTS, library_size, select_target
from histosge.data.sections import Section, TrainingSection
from histosge.data.spot_loading import cover, load_spots, require_expression
from histosge.errors import ModelError


@dataclass(frozen=True)
class LoadedSection:
    """A section, with what was left out on the way and how well spots and slide agree.

    Parameters
    ----------
    n_under_min_counts
        Spots with too few counts.
    alignment
        How well spots and slide agree; never a refusal.
    description
        What the expression's reader found, in one line.
    uncovered
        Barcodes of spots with enough counts but no embedded patch under their disc.
    marks
        Of the file's spots: see `histosge.data.distinct_spots`.
    """

    section: Section
    slide: EmbeddedSlide
    n_under_min_counts: int
    alignment: AlignmentReport
    description: str = ""
    uncovered: tuple[str, ...] = ()
    marks: NDArray[np.uint64] | None = None


def load_section(
    sample: Sample,
    store: Store,
    grid_key: str | None,
    encoder_key: str | None,
    *,
    others: tuple[str, ...] = (),
    min_counts: int = MIN_COUNTS,
    force: bool = False,
) -> LoadedSection:
    """Join a slide's embedding with its measured expression.

    Parameters
    ----------
    others
        Further encoders, see `Selection`.
    force
        Take spots that do not fit the slide, with a warning.

    Raises
    ------
    ExpressionError
        If the sample names no expression, it does not fit the slide (unless `force`), or no spot is usable.
    """
    require_expression(sample)
    slide = Selection(grid_key, encoder_key, others).open(store, sample.slide_id)
    # Before the embeddings: spots that do not belong to the slide are refused without reading gigabytes.
    measured = load_spots(sample, store, slide.stored, min_counts=min_counts, force=force)
    covered = cover(measured.spots, load_patches(slide), min_counts)
    return LoadedSection(
        Section(covered.patches, covered.spots, covered.overlap, slide.stored.rgb),
        slide,
        covered.n_under_min_counts,
        measured.alignment,
        measured.description,
        covered.uncovered,
        measured.marks,
    )


MIN_SPOTS = 20
"""Usable spots that a section needs: with fewer, genes cannot be standardised, and scores tell no model from another."""


NAMED_SPOTS = 5
"""Barcodes of spots without a patch that a message names; the others are counted."""


@dataclass(frozen=True)
class Selection:
    """Which of a store's embeddings to use; None where there is only one.

    Parameters
    ----------
    grid, encoder
        Key of each.
    others
        Further encoders, whose embeddings a model gets beside the first one's, also where their grids differ.
    """

    grid: str | None = None
    encoder: str | None = None
    others: tuple[str, ...] = ()

    def open(self, store: Store, slide_id: str) -> EmbeddedSlide:
        """Open a slide's embeddings; see `open_embedded`."""
        return open_embedded(
            store, slide_id, self.grid, self.encoder, [(None, encoder) for encoder in self.others]
        )


def load_sections(
    samples: str,
    store_url: str,
    selection: Selection,
    *,
    among: Collection[str] | None = None,
    force: bool = False,
    on_message: OnMessage = ignore_message,
) -> list[LoadedSection]:
    """Load the sections of a sample sheet, and check that all embeddings are of one kind.

    Parameters
    ----------
    among
        Slide ids of the rows to load; None means all.
    force
        Take spots that do not fit their slide, with a warning.

    Raises
    ------
    ExpressionError, StoreError
        If a section cannot be used; `ModelError` if encoders or grids differ between sections, or if none has
        `MIN_SPOTS` usable spots (a section with fewer is left out with a message).
    """
    store = Store.open(store_url)
    loaded: list[LoadedSection] = []
    distinct = DistinctSpots()
    rows = (sample for sample in read_samples(samples) if among is None or sample.slide_id in among)
    for sample in rows:
        item = load_section(
            sample, store, selection.grid, selection.encoder, others=selection.others, force=force
        )
        # Also of a section that is left out below: the sheet is wrong, whatever its spots are worth.
        distinct.add(sample, item.marks)
        section = item.section
        counts = SpotCounts(
            len(section.spots), len(section.patches), item.n_under_min_counts, item.uncovered, item.alignment
        )
        if report_spots(sample.slide_id, item.description, counts, on_message):
            loaded.append(item)
    if not loaded:
        raise no_section(samples)
    _check_one_kind(loaded)
    return loaded


@dataclass(frozen=True)
class SpotCounts:
    """What is left of a section's spots, and what was found on the way.

    Parameters
    ----------
    n_spots, n_patches
        Usable spots, and embedded patches.
    n_under_min_counts, uncovered, alignment
        As of `LoadedSection`.
    """

    n_spots: int
    n_patches: int
    n_under_min_counts: int
    uncovered: tuple[str, ...]
    alignment: AlignmentReport


def report_spots(slide_id: str, description: str, counts: SpotCounts, on_message: OnMessage) -> bool:
    """Tell what was found in a section; return whether it has spots enough to be used."""
    on_message(f"{slide_id}: {description}")
    on_message(
        f"{slide_id}: {counted(counts.n_spots, 'spot')} on {counted(counts.n_patches, 'patch')} "
        f"({counted(counts.n_under_min_counts, 'spot')} under {MIN_COUNTS} counts and "
        f"{len(counts.uncovered)} off tissue left out)"
    )
    if counts.uncovered:
        n_more = len(counts.uncovered) - NAMED_SPOTS
        more = f" and {n_more} more" if n_more > 0 else ""
        on_message(f"{slide_id}: no embedded patch under {', '.join(counts.uncovered[:NAMED_SPOTS])}{more}")
    if counts.alignment.verdict == "warn":
        on_message(f"{slide_id}: {counts.alignment.message}")
    # Left out, not refused: one poor section should not stop a whole cohort.
    if counts.n_spots < MIN_SPOTS:
        on_message(
            f"{slide_id}: left out, since {counts.n_spots} usable spots are too few ({MIN_SPOTS} are needed)"
        )
    return counts.n_spots >= MIN_SPOTS


def no_section(samples: str) -> ModelError:
    """Return the error of a sample sheet without a usable section."""
    return ModelError(
        f"no section of {samples} has the {MIN_SPOTS} usable spots that are needed; are counts raw, and spots on tissue?"
    )


def _check_one_kind(loaded: Sequence[LoadedSection]) -> None:
    check_one_kind([item.slide for item in loaded])


def check_one_kind(slides: Sequence[EmbeddedSlide]) -> None:
    """Refuse embeddings of several kinds.

    Raises
    ------
    ModelError, AmbiguousSelectionError
        With both encoders, or both grids.
    """
    a = slides[0]
    for b in slides[1:]:
        # Fingerprints, not keys: one key may stand for other weights or another pooling.
        if a.identity.fingerprint != b.identity.fingerprint:
            raise ModelError(
                f"{a.slide_id} holds embeddings of {a.identity.key!r} ({a.identity.fingerprint[:16]}), {b.slide_id} of "
                f"{b.identity.key!r} ({b.identity.fingerprint[:16]}); embed all slides with one encoder"
            )
        if a.stored.grid.spec != b.stored.grid.spec:
            raise AmbiguousSelectionError(
                f"{a.slide_id} has grid {a.stored.grid.spec.key}, {b.slide_id} has {b.stored.grid.spec.key}; "
                "embed all slides with one grid, or name it with --grid"
            )


def training_section(section: Section, genes: tuple[str, ...]) -> TrainingSection:
    """Return what a model learns from: patches, overlap, log1p(CP10k) of the chosen genes, total counts."""
    return TrainingSection(
        section.patches,
        section.overlap,
        section.spots.xy_um,
        select_target(section.spots, genes),
        library_size(section.spots),
        donor=section.spots.donor,
    )
