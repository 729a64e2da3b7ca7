"""A section without its embeddings: which spots are usable, which patches lie under them, where its embeddings lie.

Every block is read once, and let go: an unreadable patch (NaN) shows in its block alone. What is kept of a section takes
less than a megabyte for thousands of spots.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from featurestore.slides.sample_sheet import Sample
from featurestore.storage.store import Store
from histosge.data.block_bands import SpotPatches
from histosge.data.embedded_slide import EmbeddedSlide, check_complete, read_tissue
from histosge.data.genes import library_size
from histosge.data.section_loading import SpotCounts
from histosge.data.sections import Patches, Spots
from histosge.data.spot_loading import cover, load_spots, read_spots

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Arrays = dict[str, NDArray[Any]]
OnEmbedding = Callable[[NDArray[np.float32]], None]
Step = Callable[[int], int]
"""From a number of patches to the step between those whose embeddings are summed up."""


@dataclass(frozen=True)
class SectionSurvey:
    """What is kept of a section.

    Parameters
    ----------
    usable
        Indices of the usable spots among those of `histosge.data.spot_loading.read_spots`.
    under
        Patches under them.
    xy_um, library
        Of the usable spots, ``(n_spots, 2)`` and ``(n_spots,)``.
    embedding_mean, embedding_variance
        Of its patches, ``(dim,)``.
    """

    usable: Indices
    under: SpotPatches
    xy_um: Floats
    library: Floats
    embedding_mean: Floats
    embedding_variance: Floats

    def arrays(self) -> Arrays:
        """Return everything as named arrays."""
        overlap = self.under.overlap
        return {
            "usable": self.usable,
            "rows": self.under.rows,
            "cols": self.under.cols,
            "weights": overlap.data,
            "patches": overlap.indices,
            "ends": overlap.indptr,
            "xy_um": self.xy_um,
            "library": self.library,
            "embedding_mean": self.embedding_mean,
            "embedding_variance": self.embedding_variance,
        }

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Self:
        """Rebuild."""
        shape = (len(arrays["usable"]), len(arrays["rows"]))
        overlap = sparse.csr_matrix((arrays["weights"], arrays["patches"], arrays["ends"]), shape=shape)
        return cls(
            arrays["usable"],
            SpotPatches(arrays["rows"], arrays["cols"], overlap),
            arrays["xy_um"],
            arrays["library"],
            arrays["embedding_mean"],
            arrays["embedding_variance"],
        )


@dataclass(frozen=True)
class SurveyedSpots:
    """A section's survey, with its usable spots and what was found on the way.

    Parameters
    ----------
    spots
        The usable ones, with counts of all genes.
    marks
        See `histosge.data.distinct_spots`.
    under
        Indices of the patches under the spots, among all that can be read, in the order of blocks.
    """

    survey: SectionSurvey
    spots: Spots
    counts: SpotCounts
    description: str
    marks: NDArray[np.uint64]
    under: Indices


def survey_section(
    sample: Sample,
    store: Store,
    slide: EmbeddedSlide,
    step: Step,
    on_embedding: OnEmbedding,
    *,
    force: bool = False,
) -> SurveyedSpots:
    """Compare a section with its slide, as `load_section` does, and keep no embedding.

    Parameters
    ----------
    step
        Which patches the embeddings' mean and variance are of.
    on_embedding
        Called with the embeddings of each block, ``(n, dim)``.
    force
        Take spots that do not fit the slide, with a warning.

    Raises
    ------
    ExpressionError, StoreError
        If the expression does not fit the slide, no spot is usable, or blocks are missing.
    """
    measured = load_spots(sample, store, slide.stored, force=force)
    check_complete(slide)
    patches, mean, variance = _read_positions(slide, step, on_embedding)
    covered = cover(measured.spots, patches)
    survey = SectionSurvey(
        covered.usable,
        SpotPatches.from_overlap(patches, covered.overlap),
        covered.spots.xy_um,
        library_size(covered.spots),
        mean,
        variance,
    )
    counts = SpotCounts(
        len(covered.spots),
        len(patches),
        covered.n_under_min_counts,
        covered.uncovered,
        measured.alignment,
    )
    under = np.unique(covered.overlap.indices).astype(np.int64)
    return SurveyedSpots(survey, covered.spots, counts, measured.description, measured.marks, under)


def read_surveyed(sample: Sample, store: Store, slide: EmbeddedSlide, survey: SectionSurvey) -> Spots:
    """Read the usable spots of a section that was surveyed."""
    _, spots, _ = read_spots(sample, store, slide.stored)
    return take_spots(spots, survey.usable)


def take_spots(spots: Spots, index: Indices) -> Spots:
    """Return some spots."""
    return replace(
        spots, barcodes=spots.barcodes[index], xy_um=spots.xy_um[index], counts=spots.counts[index]
    )


def _read_positions(
    slide: EmbeddedSlide, step: Step, on_embedding: OnEmbedding
) -> tuple[Patches, Floats, Floats]:
    """Return the patches that have an embedding, without it, and mean and variance of the embeddings of some."""
    every, dim = step(int(slide.stored.is_tissue.sum())), slide.identity.dim
    rows, cols, n_seen, n = list[Indices](), list[Indices](), 0, 0
    # Of differences from the first block's mean: squares of large numbers would lose the variance.
    centre, total, squares = np.zeros(dim), np.zeros(dim), np.zeros(dim)
    for block in slide.stored.planned(slide.array.block_shape):
        row, col, embedding = read_tissue(slide, block)
        rows.append(row)
        cols.append(col)
        on_embedding(embedding)
        some = embedding[-n_seen % every :: every].astype(np.float64)
        n_seen += len(row)
        if len(some) == 0:
            continue
        if n == 0:
            centre = some.mean(axis=0)
        some -= centre
        total += some.sum(axis=0)
        squares += (some**2).sum(axis=0)
        n += len(some)
    shift = total / max(n, 1)
    found = np.concatenate(rows), np.concatenate(cols)
    share = (slide.stored.tissue[found] / np.float32(255)).astype(np.float32)
    empty = np.empty((len(found[0]), 0), np.float32)
    patches = Patches.on_grid(slide.slide_id, slide.stored.grid, *found, empty, share)
    return patches, centre + shift, squares / max(n, 1) - shift**2
