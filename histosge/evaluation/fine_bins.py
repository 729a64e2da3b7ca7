"""Measured bins that are finer than the spots of training: read from the sections' files, pooled to one size.

A model is trained on spots (55 µm discs of Visium, or squares of one step of the grid). Visium HD and Xenium measure more
finely than that, so their files hold the truth between and below the spots. Here it is brought to squares of a stated
side. What cannot be measured at that side is refused with the numbers.

Terms
    unit    what the file counts in: a bin of Visium HD, a cell of Xenium
    bin     a square of the stated side: one unit, or several pooled
    touched a bin touches a spot if one of the bin's units lies nearest to that spot
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree

from featurestore.slides.sample_sheet import Sample, read_samples
from featurestore.storage.store import Store, StoredGrid
from featurestore.wording import counted
from histosge.data.expression.find_expression import find_molecules
from histosge.data.expression.loaded_expression import SlideFrame
from histosge.data.expression.molecules import Molecules, bin_molecules, count_genes
from histosge.data.genes import library_size
from histosge.data.section_loading import MIN_SPOTS, LoadedSection
from histosge.data.sections import Patches, Section, Spots
from histosge.data.spot_loading import read_spots, require_expression, slide_frame
from histosge.data.spot_overlap import square_overlap
from histosge.errors import ExpressionError, HistosgeError
from histosge.evaluation.results import BinFacts, BinnedSection
from histosge.evaluation.unit_pooling import pool_units

Floats = NDArray[np.float64]

MOST_STEPS = 4.0
"""A bin may be this much finer than the map's step. Beyond it, 16 bins and more would share each value of the map."""
MIN_BIN_COUNTS = 10
"""Bins with fewer counts are left out: with 9, one molecule is 1,111 of 10,000. On synthetic bins with a median of 20 counts
the true rates correlate with what is measured by 0.19 without a floor, 0.20 with 10, and 0.23 with 20, which leaves out half
of the bins."""
MOST_LEFT_OUT = 0.5
"""Share of the bins that may have too few counts. Beyond it, the bins that are left are those of dense tissue alone."""
MOST_BINS = 20_000
"""Bins scored in a section. A whole one of Visium HD has 400,000 at 8 µm: truth and prediction of 250 genes would be
1.6 GB, and a correlation over 20,000 bins is known to 0.01."""
TURNED_DEGREES = 5.0
"""From here on it is said that bins lie askew: their area is taken as parallel to the slide's sides."""


@dataclass(frozen=True)
class SectionBins:
    """The bins of one section.

    Parameters
    ----------
    spots
        Square spots, ``(n_bins,)``.
    touched
        Which spots of the section each bin touches, ``(n_bins, n_spots)``.
    facts
        For the report.
    """

    spots: Spots
    touched: sparse.csr_matrix
    facts: BinnedSection

    def held_out(self, test: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Tell which bins hold no count of a spot outside the mask `test`, ``(n_spots,)``."""
        # Not by the bin's centre: a bin across the border of two pooled squares has counts that training saw.
        counted = np.asarray(self.touched @ (~test).astype(np.float32)).ravel()
        return np.asarray(counted == 0)


@dataclass(frozen=True)
class MoleculeUnits:
    """Single molecules, not read yet.

    Parameters
    ----------
    molecules
        Where they are.
    frame
        Of the slide.
    cells
        The cells that molecules belong to, as the section's file has them: spots of training are these, or pooled from them.
    """

    molecules: Molecules
    frame: SlideFrame
    cells: Spots


@dataclass(frozen=True)
class FineBins:
    """Bins of one size, of all sections that can give them.

    Parameters
    ----------
    side_um
        Of a bin.
    spot_um
        Widest spot of any section: what a model sees of expression in training.
    sections
        Slide id -> its bins.
    facts
        For the report.
    """

    side_um: float
    spot_um: float
    sections: Mapping[str, SectionBins]
    facts: BinFacts

    @classmethod
    def read(
        cls, samples: str, store_url: str, loaded: Sequence[Sequence[LoadedSection]], side_um: float
    ) -> Self:
        """Read the expression of every section once more, as its file has it, and pool it.

        Parameters
        ----------
        loaded
            The sections of each encoder, with the same spots; bins are those that every encoder's patches cover.

        Raises
        ------
        HistosgeError
            If no section can give bins of this size, with the reason of each.
        """
        store = Store.open(store_url)
        by_id = {sample.slide_id: sample for sample in read_samples(samples)}
        sections = [
            (items[0].section, [item.section.patches for item in items], items[0].slide.stored)
            for items in zip(*loaded, strict=True)
        ]
        measured = (
            (section, patches, _read_units(by_id[section.slide_id], store, stored))
            for section, patches, stored in sections
        )
        return cls.from_sections(measured, side_um, max(one[0].spots.diameter_um for one in sections))

    @classmethod
    def from_sections(
        cls,
        measured: Iterable[tuple[Section, Sequence[Patches], "Spots | MoleculeUnits"]],
        side_um: float,
        spot_um: float,
    ) -> Self:
        """Pool measured units of sections.

        Parameters
        ----------
        measured
            Section, its patches under each encoder, and the units of its file or its molecules; read one by one.
        """
        found: dict[str, SectionBins] = {}
        refused: list[str] = []
        maps: dict[str, None] = {}
        for section, patches, units in measured:
            try:
                found[section.slide_id] = _bins_of(section, patches, units, side_um, spot_um)
                maps |= dict.fromkeys(_describe_map(each) for each in patches)
            except ExpressionError as error:
                refused.append(f"{section.slide_id}: {error}")
        if not found:
            more = f" (and {counted(len(refused) - 1, 'section')} more)" if len(refused) > 1 else ""
            raise HistosgeError(f"nothing can be scored at {side_um:g} µm: {refused[0]}{more}")
        facts = BinFacts(
            side_um,
            spot_um,
            tuple(bins.facts for bins in found.values()),
            tuple(maps),
            tuple(f"Not scored at {side_um:g} µm: {reason}." for reason in refused),
        )
        return cls(side_um, spot_um, found, facts)


@dataclass(frozen=True)
class _Pooled:
    """All bins of a section.

    Parameters
    ----------
    xy_um, counts
        Centre and total counts of each, ``(n_bins, 2)`` and ``(n_bins,)``.
    take
        Returns some of the bins by their indices, and which spots they touch, ``(n_chosen, n_spots)``.
    measured, n_units
        In what the file counts, and how many of them there are.
    unit_um
        The least step from one size of bins to another.
    turned
        Degrees by which the bins lie askew.
    left_out
        Units that were not pooled, in words; empty if none was left out.
    """

    xy_um: Floats
    counts: Floats
    take: Callable[[NDArray[np.int64]], tuple[Spots, sparse.csr_matrix]]
    measured: str
    n_units: int
    unit_um: float
    turned: float = 0.0
    left_out: str = ""


def _read_units(sample: Sample, store: Store, stored: StoredGrid) -> Spots | MoleculeUnits:
    spots = read_spots(sample, store, stored)[0].spots
    frame = slide_frame(sample, store)
    molecules = find_molecules(require_expression(sample), frame)
    return spots if molecules is None else MoleculeUnits(molecules, frame, spots)


def _pool(section: Section, units: Spots | MoleculeUnits, side_um: float) -> _Pooled:
    if isinstance(units, Spots):
        bins, bin_of_unit, turned = pool_units(units, side_um)
        what = "bins" if units.shape == "square" else "cells"
        touched = _touched(section.spots, units, bin_of_unit, len(bins))

        def take(some: NDArray[np.int64]) -> tuple[Spots, sparse.csr_matrix]:
            chosen = replace(
                bins, barcodes=bins.barcodes[some], xy_um=bins.xy_um[some], counts=bins.counts[some]
            )
            return chosen, touched[some]

        measured = f"{what} of {units.diameter_um:.3g} µm"
        return _Pooled(bins.xy_um, library_size(bins), take, measured, len(units), units.diameter_um, turned)
    molecules, frame, cells = units.molecules, units.frame, units.cells
    found = bin_molecules(molecules, frame, side_um)

    def count(some: NDArray[np.int64]) -> tuple[Spots, sparse.csr_matrix]:
        chosen, of_cell = count_genes(molecules, frame, found, some)
        # Cells without a position are none of the section's: no training spot has their molecules.
        number = {name: i for i, name in enumerate(molecules.cells)}
        of_cell = of_cell[:, [number[name] for name in cells.barcodes.tolist()]]
        spot_of_cell = _touched(section.spots, cells, np.arange(len(cells)), len(cells))
        over = _overlapping(section.spots, chosen.xy_um, side_um)
        return chosen, sparse.csr_matrix(of_cell @ spot_of_cell + over)

    measured = f"molecules of quality {found.min_qv:g} or more"
    return _Pooled(
        found.xy_um, found.counts, count, measured, found.n_kept, 1.0, left_out=found.describe_left_out()
    )


def _overlapping(spots: Spots, xy_um: Floats, side_um: float) -> sparse.csr_matrix:
    """Return which spots share area with squares around `xy_um`, ``(n_squares, n_spots)``."""
    reach = side_um / 2 + spots.diameter_um / 2
    # The corner of a square is 1.41 times as far away as its edge.
    near: Any = cKDTree(spots.xy_um).query_ball_point(
        xy_um, reach * 1.5
    )  # typed as one list (scipy-stubs 1.15)
    square = np.repeat(np.arange(len(xy_um)), [len(each) for each in near])
    spot = np.fromiter(chain.from_iterable(near), np.int64, len(square))
    away = np.abs(xy_um[square] - spots.xy_um[spot])
    if spots.shape == "square":
        shared = (away < reach).all(axis=1)
    else:
        outside = np.maximum(away - side_um / 2, 0)
        shared = np.hypot(*outside.T) < spots.diameter_um / 2
    ones = np.ones(int(shared.sum()), np.float32)
    return sparse.csr_matrix((ones, (square[shared], spot[shared])), shape=(len(xy_um), len(spots)))


def _bins_of(
    section: Section,
    patches: Sequence[Patches],
    units: Spots | MoleculeUnits,
    side_um: float,
    spot_um: float,
) -> SectionBins:
    step = max(each.stride_um for each in patches)
    if side_um * MOST_STEPS < step * (1 - 1e-6):
        raise ExpressionError(
            f"{side_um:g} µm is finer than a map with one value every {step:g} µm can show; give --at "
            f"{step / MOST_STEPS:.4g} or more, or embed with a --stride or --tokens of at most {side_um * MOST_STEPS:g} µm"
        )
    pooled = _pool(section, units, side_um)
    counts = pooled.counts
    covered = np.ones(len(counts), bool)
    for each in patches:
        covered &= np.asarray(square_overlap(pooled.xy_um, side_um, each).sum(axis=1)).ravel() > 0
    # Files of spots hold those under tissue; molecules lie on bare glass, too, so that most bins hold one or two of them.
    on_tissue = np.ones(len(counts), bool) if isinstance(units, Spots) else covered
    few = on_tissue & (counts < MIN_BIN_COUNTS)
    if few.sum() > MOST_LEFT_OUT * on_tissue.sum():
        middle = max(float(np.median(counts[on_tissue])), 0.5)
        wide = pooled.unit_um * np.ceil(side_um * np.sqrt(MIN_BIN_COUNTS / middle) * 1.01 / pooled.unit_um)
        raise ExpressionError(
            f"{int(few.sum())} of {int(on_tissue.sum())} bins have fewer than {MIN_BIN_COUNTS} counts (median "
            f"{np.median(counts[on_tissue]):g}); give --at {wide:g} or more"
        )
    usable = np.flatnonzero((counts >= MIN_BIN_COUNTS) & covered)
    if len(usable) < MIN_SPOTS:
        raise ExpressionError(
            f"{len(usable)} of {len(counts)} bins have {MIN_BIN_COUNTS} counts and a patch, {MIN_SPOTS} are needed"
        )
    kept = _draw(pooled.xy_um, usable, spot_um)
    facts = BinnedSection(
        section.slide_id,
        pooled.measured,
        pooled.n_units,
        len(counts),
        int(few.sum()),
        int((~few & ~covered).sum()),
        len(kept),
        float(np.median(counts[usable])),
        pooled.turned if pooled.turned > TURNED_DEGREES else 0.0,
        pooled.left_out,
    )
    chosen, touched = pooled.take(kept)
    return SectionBins(chosen, touched, facts)


def _draw(xy_um: Floats, usable: NDArray[np.int64], spot_um: float) -> NDArray[np.int64]:
    """Draw whole squares as wide as a spot until there are `MOST_BINS` bins; all, where there are fewer."""
    if len(usable) <= MOST_BINS:
        return usable
    # Whole squares, since what varies within a spot is scored from the bins within one.
    square = spot_squares(xy_um[usable], spot_um)
    order = np.random.default_rng(0).permutation(int(square.max()) + 1)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    n = np.cumsum(np.bincount(square, minlength=len(order))[order])
    last = max(1, int(np.searchsorted(n, MOST_BINS, side="right")))
    return usable[rank[square] < last]


def spot_squares(xy_um: Floats, spot_um: float) -> NDArray[np.int64]:
    """Number the squares as wide as a spot, from the slide's corner, in which positions lie, ``(n,)``."""
    place = np.floor(xy_um / spot_um).astype(np.int64)
    return np.unique(place, axis=0, return_inverse=True)[1].ravel().astype(np.int64)


def _touched(spots: Spots, units: Spots, bin_of_unit: NDArray[np.int64], n_bins: int) -> sparse.csr_matrix:
    # In the maximum norm a square's own units are nearest to it, in its corners, too.
    norm = np.inf if spots.shape == "square" else 2
    distance, nearest = (
        np.asarray(a) for a in cKDTree(spots.xy_um).query(units.xy_um, k=[1, 2, 3, 4], p=norm)
    )
    # A unit on the border of two squares, or at the corner of four, was pooled into one of them: it touches all.
    is_near = distance <= distance[:, :1] + 1e-6 * spots.diameter_um
    unit, rank = np.nonzero(is_near & np.isfinite(distance) & (bin_of_unit >= 0)[:, None])
    ones = np.ones(len(unit), np.float32)
    return sparse.csr_matrix((ones, (bin_of_unit[unit], nearest[unit, rank])), shape=(n_bins, len(spots)))


def _describe_map(patches: Patches) -> str:
    seen = (
        f"patches of {patches.patch_um:g} µm"
        if patches.token_um is None
        else f"tokens that see {patches.token_um:g} µm"
    )
    return f"one value every {patches.stride_um:g} µm, from {seen}"
