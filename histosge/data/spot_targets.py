"""What a training loop learns: the counts of measured spots of many sections, and which patches lie under each spot.

Counts and weights stay in memory, embeddings do not: `Loader(store, targets=...)` streams them.

    from histosge import Loader, SpotTargets

    targets = SpotTargets.from_samples("cohort.csv", "store.zarr", genes=250)
    for embedding, counts, *_ in Loader("store.zarr", targets=targets):
        ...
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from featurestore.errors import StoreError
from featurestore.events import OnMessage, ignore_message
from featurestore.slides.sample_sheet import Sample, read_samples
from featurestore.storage.store import Store, StoredGrid
from histosge.data.distinct_spots import DistinctSpots
from histosge.data.gene_choice import GeneChoice, GeneSource
from histosge.data.genes import MIN_COUNTS, SCALE, gene_columns, library_size
from histosge.data.section_loading import MIN_SPOTS, Selection
from histosge.data.sections import Patches
from histosge.data.spot_loading import CoveredSpots, LoadedSpots, cover, load_spots
from histosge.errors import ExpressionError


class SpotBatch(NamedTuple):
    """Some spots, in the order in which they were drawn.

    Parameters
    ----------
    embedding
        Mean of the embeddings of the patches under each spot, weighted by area, ``(n, dim)``, float32.
    counts
        Raw counts of `SpotTargets.genes`, ``(n, n_genes)``, float32.
    library
        Total counts of each spot over all genes of its file, ``(n,)``, float32: log1p(CP10k), which our models
        predict, is ``log1p(counts / library[:, None] * 1e4)``.
    section, spot
        Index into `SpotTargets.sections`, and into that section's spots, ``(n,)``, int64.
    """

    embedding: Any
    counts: Any
    library: Any
    section: Any
    spot: Any


@dataclass(frozen=True)
class SectionTargets:
    """The usable spots of one section.

    Parameters
    ----------
    slide_id
        Which slide they lie on.
    barcodes
        ``(n_spots,)``.
    counts
        Raw counts of the chosen genes, sparse, ``(n_spots, n_genes)``.
    library
        Total counts over all genes, ``(n_spots,)``.
    overlap
        Sparse ``(n_spots, n_under)``: the share of each spot's area over each patch. Rows sum to 1.
    rows, cols
        Places on the grid of the patches that lie under any spot, ``(n_under,)``.
    """

    slide_id: str
    barcodes: NDArray[np.str_]
    counts: sparse.csr_matrix
    library: NDArray[np.float32]
    overlap: sparse.csr_matrix
    rows: NDArray[np.int64]
    cols: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.barcodes)

    def log_rates(self, spots: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return log1p(CP10k) of some spots, ``(len(spots), n_genes)``, float32."""
        counts = self.counts[spots].toarray().astype(np.float64)
        return np.log1p(counts / self.library[spots, None].astype(np.float64) * SCALE).astype(np.float32)


@dataclass(frozen=True)
class SpotTargets:
    """Spots to learn from, section by section.

    Parameters
    ----------
    genes
        The columns of every section's `counts`.
    grid_key, encoder_key
        Of the store: the grid of `rows` and `cols`, and the encoder, if one was named.
    sections
        One per slide.
    """

    genes: tuple[str, ...]
    grid_key: str
    encoder_key: str | None
    sections: tuple[SectionTargets, ...]

    def __len__(self) -> int:
        return sum(map(len, self.sections))

    @property
    def slide_ids(self) -> tuple[str, ...]:
        """Which slide each section lies on."""
        return tuple(section.slide_id for section in self.sections)

    def subset(self, slide_ids: Sequence[str]) -> "SpotTargets":
        """Return the sections of some slides only, such as one fold of a cross-validation.

        Raises
        ------
        StoreError
            If there are no targets for one of them.
        """
        unknown = sorted(set(slide_ids) - set(self.slide_ids))
        if unknown:
            raise StoreError(
                f"there are no targets for slide {unknown[0]!r}; there are for {', '.join(self.slide_ids)}"
            )
        sections = tuple(section for section in self.sections if section.slide_id in set(slide_ids))
        return replace(self, sections=sections)

    @classmethod
    def from_samples(
        cls,
        samples: str | Path,
        store: str | Path,
        genes: GeneSource,
        *,
        selection: Selection | None = None,
        min_counts: int = MIN_COUNTS,
        force: bool = False,
        on_message: OnMessage = ignore_message,
    ) -> "SpotTargets":
        """Read the expression of every row of a sample sheet; embeddings are not read.

        Spots are left out as `histosge train` leaves them out: those with too few counts, and those without a tissue
        patch. A section with fewer than `MIN_SPOTS` usable spots is left out with a message.

        Parameters
        ----------
        samples
            Sample sheet with a column `expression`.
        store
            Feature store with an embedding of every slide.
        genes
            A number (the most variable ones over all these spots), ``all``, ``seurat_v3:N``, ``N+A,B``, a file with one
            gene a line, or names. Unless genes are named, each expression file is read twice: the full counts of one
            section are kept at a time.
        selection
            Grid and encoder, needed where the store holds several.
        min_counts
            Spots with fewer counts are left out.
        force
            Take spots that do not fit their slide, with a warning.
        on_message
            Called with what was found in each section.

        Raises
        ------
        ExpressionError, StoreError
            If a section cannot be used, lacks a gene, or no section is left.
        """
        choice = GeneChoice.parse(genes)
        reader = _Reader(Store.open(str(store)), selection or Selection(), min_counts, force)
        rows = read_samples(str(samples))
        usable_rows, sections = [], []
        ranking = choice.new_ranking()
        distinct = DistinctSpots()
        for sample in rows:
            loaded, covered = reader.read(sample)
            distinct.add(sample, loaded.marks)
            _describe(sample, loaded, covered, min_counts, on_message)
            if len(covered.spots) < MIN_SPOTS:
                continue
            usable_rows.append(sample)
            if choice.is_given:
                sections.append(section_targets(covered, choice.named))
            else:
                ranking.add(covered.spots)
        if not usable_rows:
            raise ExpressionError(
                f"no section of {samples} has the {MIN_SPOTS} usable spots that are needed; are counts raw, and spots "
                "on tissue?"
            )
        chosen = choice.named
        if not choice.is_given:
            # The ranking is known only now, and no section's full counts were kept: expression is read again.
            chosen = choice.choose_from(ranking)
            sections = [section_targets(reader.read(sample)[1], chosen) for sample in usable_rows]
        return cls(chosen, reader.grid_key, reader.selection.encoder, tuple(sections))


def section_targets(covered: CoveredSpots, genes: Sequence[str]) -> SectionTargets:
    """Reduce a section's spots to what a training loop needs.

    Raises
    ------
    ExpressionError
        If the section did not measure one of the genes.
    """
    spots, patches = covered.spots, covered.patches
    # Most patches of a slide lie under no spot; only the others are kept.
    under = np.unique(covered.overlap.indices)
    return SectionTargets(
        spots.slide_id,
        spots.barcodes,
        sparse.csr_matrix(spots.counts[:, gene_columns(spots, genes)]),
        library_size(spots).astype(np.float32),  # of all genes: the chosen ones alone are no measure of depth
        sparse.csr_matrix(covered.overlap[:, under]),
        patches.rows[under],
        patches.cols[under],
    )


class _Reader:
    """Reads one sample after the other; the grid must be the same for all."""

    def __init__(self, store: Store, selection: Selection, min_counts: int, force: bool) -> None:
        self._store, self.selection, self._min_counts = store, selection, min_counts
        self._force = force
        self.grid_key = ""

    def read(self, sample: Sample) -> tuple[LoadedSpots, CoveredSpots]:
        grid_key, _ = self._store.select(self.selection.grid, self.selection.encoder, sample.slide_id)
        # One grid for all: a mean over patches of another size or step is another quantity.
        if self.grid_key and grid_key != self.grid_key:
            raise StoreError(
                f"slide {sample.slide_id!r} has grid {grid_key}, others {self.grid_key}; embed all slides with one grid, "
                "or name it with Selection(grid=...)"
            )
        self.grid_key = grid_key
        stored = self._store.grid(sample.slide_id, grid_key)
        loaded = load_spots(sample, self._store, stored, min_counts=self._min_counts, force=self._force)
        return loaded, cover(loaded.spots, _tissue_patches(stored), self._min_counts)


def _tissue_patches(stored: StoredGrid) -> Patches:
    """Return where a slide's tissue patches are, without their embeddings."""
    rows, cols = np.nonzero(stored.is_tissue)
    nothing = np.empty((len(rows), 0), np.float32)  # overlap is a matter of positions alone
    return Patches.on_grid(stored.slide_id, stored.grid, rows, cols, nothing)


def _describe(
    sample: Sample, loaded: LoadedSpots, covered: CoveredSpots, min_counts: int, on_message: OnMessage
) -> None:
    n = len(covered.spots)
    on_message(f"{sample.slide_id}: {loaded.description}")
    on_message(
        f"{sample.slide_id}: {n} usable spots ({covered.n_under_min_counts} under {min_counts} counts and "
        f"{len(covered.uncovered)} off tissue left out)"
    )
    if loaded.alignment.verdict == "warn":
        on_message(f"{sample.slide_id}: {loaded.alignment.message}")
    if n < MIN_SPOTS:
        on_message(
            f"{sample.slide_id}: left out, since {n} usable spots are too few ({MIN_SPOTS} are needed)"
        )
