"""A sample's measured spots, compared with its slide and with the patches of a grid; no embedding is read here."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from featurestore.slides.sample_sheet import Sample
from featurestore.storage.store import Store, StoredGrid
from histosge.data.alignment_check import AlignmentReport, check_alignment, check_scale
from histosge.data.distinct_spots import spot_marks
from histosge.data.expression.find_expression import find_expression
from histosge.data.expression.loaded_expression import LoadedExpression, SlideFrame
from histosge.data.expression.pseudo_spots import needs_pooling, pool_spots
from histosge.data.genes import MIN_COUNTS, usable
from histosge.data.sections import Patches, Spots
from histosge.data.spot_overlap import spot_overlap
from histosge.data.tissue_map import TissueMap
from histosge.errors import ExpressionError


@dataclass(frozen=True)
class LoadedSpots:
    """The spots of one sample, compared with its slide; no embedding is read for it.

    Parameters
    ----------
    spots
        All of the file's, pooled into squares where single ones hold too few counts.
    alignment
        How well spots and slide agree; never a refusal.
    description
        What the expression's reader found, in one line.
    marks
        Of the spots as the file has them, before pooling: see `histosge.data.distinct_spots`.
    """

    spots: Spots
    alignment: AlignmentReport
    description: str
    marks: NDArray[np.uint64]


def require_expression(sample: Sample) -> str:
    """Return where a sample's expression is.

    Raises
    ------
    ExpressionError
        If the sample names none.
    """
    if sample.expression is None:
        raise ExpressionError(
            f"slide {sample.slide_id!r} has no expression; name a file in the sample sheet's expression column"
        )
    return sample.expression


def load_spots(
    sample: Sample,
    store: Store,
    stored: StoredGrid,
    *,
    min_counts: int = MIN_COUNTS,
    force: bool = False,
) -> LoadedSpots:
    """Read a sample's spots, and compare them with the tissue and the stain of its slide.

    Parameters
    ----------
    force
        Take spots that do not fit the slide, with a warning.

    Raises
    ------
    ExpressionError
        If the sample names no expression, it cannot be read, or it does not fit the slide (unless `force`).
    """
    record = store.slide(sample.slide_id)
    found, spots, description = read_spots(sample, store, stored, min_counts=min_counts)
    # The slide's own size, not the grid's: the grid ends before the slide by up to one patch.
    size_um = (record.size_px[0] * record.mpp, record.size_px[1] * record.mpp)
    # Of the spots as they are: squares of a lattice would blur their positions.
    alignment = check_alignment(found.spots, TissueMap.from_grid(stored, size_um), record.mpp)
    if force:
        alignment = alignment.forced()
    if alignment.verdict == "refuse":
        raise ExpressionError(alignment.message)
    # Positions in pixels land on tissue under any mpp, so the scale is compared on its own.
    alignment = check_scale(alignment, sample.slide_id, record.mpp, found.implied_mpp)
    return LoadedSpots(spots, alignment, description, spot_marks(found.spots))


def slide_frame(sample: Sample, store: Store) -> SlideFrame:
    """Return the slide that a sample's spots lie on."""
    record = store.slide(sample.slide_id)
    return SlideFrame(sample.slide_id, sample.donor, record.mpp, record.size_px)


def read_spots(
    sample: Sample, store: Store, stored: StoredGrid, *, min_counts: int = MIN_COUNTS
) -> tuple[LoadedExpression, Spots, str]:
    """Read a sample's spots, and compare them with nothing.

    Returns
    -------
    found, spots, description
        What the file holds; its spots, pooled into squares where single ones hold too few counts; both in one line.

    Raises
    ------
    ExpressionError
        If the sample names no expression, or it cannot be read.
    """
    frame, stride_um = slide_frame(sample, store), stored.grid.stride_um
    found = find_expression(require_expression(sample), frame)
    spots, description = found.spots, found.describe(frame.mpp)
    # Before counts are compared with the minimum.
    if needs_pooling(spots, stride_um, min_counts):
        spots = pool_spots(spots, stride_um)
        description += f"; too few counts each, so pooled into {len(spots)} squares of {stride_um:g} µm"
    return found, spots, description


@dataclass(frozen=True)
class CoveredSpots:
    """The usable spots of a section: enough counts, and a patch under their disc.

    Parameters
    ----------
    patches
        As handed in.
    spots, overlap
        The usable ones, and ``(n_spots, n_patches)`` weights that sum to 1 for each.
    n_under_min_counts
        Spots under the floor on counts.
    uncovered
        Barcodes of spots with enough counts but no patch under their disc.
    usable
        Indices of the usable spots among those handed in.
    """

    patches: Patches
    spots: Spots
    overlap: sparse.csr_matrix
    n_under_min_counts: int
    uncovered: tuple[str, ...]
    usable: NDArray[np.int64]


def cover(spots: Spots, patches: Patches, min_counts: int = MIN_COUNTS) -> CoveredSpots:
    """Keep the usable spots, and weigh the patches under each.

    Raises
    ------
    ExpressionError
        If no spot is usable.
    """
    # Both conditions for every spot, so that messages can tell one reason from the other.
    enough = usable(spots, min_counts)
    overlap = spot_overlap(spots, patches)
    covered = np.asarray(overlap.sum(axis=1)).ravel() > 0
    keep = enough & covered
    uncovered = spots.barcodes[enough & ~covered]
    n_under = int((~enough).sum())
    if not keep.any():
        raise ExpressionError(
            f"section {spots.slide_id!r}: none of {len(spots)} spots is usable "
            f"({n_under} under {min_counts} counts, {len(uncovered)} off tissue)"
        )
    kept = replace(spots, barcodes=spots.barcodes[keep], xy_um=spots.xy_um[keep], counts=spots.counts[keep])
    places = np.flatnonzero(keep).astype(np.int64)
    return CoveredSpots(patches, kept, overlap[keep], n_under, tuple(uncovered.tolist()), places)
