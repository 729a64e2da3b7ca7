"""The store -> patches in memory: whole slides for training, block by block with a halo for prediction.

Stored blocks are read whole; patches without tissue or without an embedding (NaN) are left out here,
so that no model ever sees them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from featurestore.errors import AmbiguousSelectionError
from featurestore.events import OnMessage, ignore_message
from featurestore.slides.sample_sheet import Sample, read_samples
from featurestore.storage.store import Store
from histosge.data.alignment_check import AlignmentReport
from histosge.data.embedded_slide import EmbeddedSlide, load_patches, open_embedded
from histosge.data.genes import MIN_COUNTS, library_size, select_target
from histosge.data.sections import Section, TrainingSection
from histosge.data.spot_loading import cover, load_spots, require_expression
from histosge.errors import ModelError


@dataclass(frozen=True)
class LoadedSection:
    """A section, with what was left out on the way and how well spots and slide fit.

    Parameters
    ----------
    few_counts
        Spots under the floor on counts.
    off_tissue
        Spots with enough counts but no embedded patch under their disc.
    found
        What the expression's reader says of it, in one line.
    nowhere
        Barcodes of the spots counted in `off_tissue`.
    """

    section: Section
    slide: EmbeddedSlide
    few_counts: int
    off_tissue: int
    fit: AlignmentReport
    found: str = ""
    nowhere: tuple[str, ...] = ()


def load_section(
    sample: Sample,
    store: Store,
    grid_key: str | None,
    encoder_key: str | None,
    *,
    min_counts: int = MIN_COUNTS,
) -> LoadedSection:
    """Join a slide's embedding with its measured expression.

    Raises
    ------
    ExpressionError
        If the sample names no expression, it does not fit the slide, or no spot is usable.
    """
    require_expression(sample)
    slide = open_embedded(store, sample.slide_id, grid_key, encoder_key)
    # Before the embeddings: what does not belong to the slide is refused without reading gigabytes.
    measured = load_spots(sample, store, slide.stored, min_counts=min_counts)
    covered = cover(measured.spots, load_patches(slide), min_counts)
    section = Section(covered.patches, covered.spots, covered.overlap, slide.stored.rgb)
    nowhere = covered.uncovered
    return LoadedSection(
        section,
        slide,
        covered.n_under_min_counts,
        len(nowhere),
        measured.alignment,
        measured.description,
        nowhere,
    )


MIN_SPOTS = 20
"""A section with fewer cannot be standardised, nor tell a good model from a bad one."""


NAMED = 5
"""Spots without a patch that are named; the others are counted."""


@dataclass(frozen=True)
class Selection:
    """Which of a store's embeddings to use; None where there is only one."""

    grid: str | None = None
    encoder: str | None = None


def load_sections(
    samples: str, store_url: str, selection: Selection, *, on_message: OnMessage = ignore_message
) -> list[LoadedSection]:
    """Load every section of a sample sheet, and check that all embeddings are of one kind.

    Raises
    ------
    ExpressionError, StoreError
        If a section cannot be used; `ModelError` if encoders or grids differ between sections, or if none has
        `MIN_SPOTS` usable spots (a section with fewer is left out, and said).
    """
    store = Store.open(store_url)
    loaded: list[LoadedSection] = []
    for sample in read_samples(samples):
        item = load_section(sample, store, selection.grid, selection.encoder)
        on_message(f"{sample.slide_id}: {item.found}")
        on_message(
            f"{sample.slide_id}: {len(item.section.spots)} spots on {len(item.section.patches)} patches "
            f"({item.few_counts} spots under {MIN_COUNTS} counts and {item.off_tissue} off tissue left out)"
        )
        if item.nowhere:
            more = f" and {len(item.nowhere) - NAMED} more" if len(item.nowhere) > NAMED else ""
            on_message(f"{sample.slide_id}: no embedded patch under {', '.join(item.nowhere[:NAMED])}{more}")
        if item.fit.verdict == "warn":
            on_message(f"{sample.slide_id}: {item.fit.message}")
        if len(item.section.spots) < MIN_SPOTS:
            on_message(
                f"{sample.slide_id}: left out, since {len(item.section.spots)} usable spots are too few "
                f"({MIN_SPOTS} are needed)"
            )
            continue
        loaded.append(item)
    if not loaded:
        raise ModelError(
            f"no section of {samples} has the {MIN_SPOTS} usable spots that are needed; are counts raw, and spots on "
            "tissue?"
        )
    _check_one_kind(loaded)
    return loaded


def _check_one_kind(loaded: Sequence[LoadedSection]) -> None:
    first = loaded[0]
    for other in loaded[1:]:
        a, b = first.slide, other.slide
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
    )
