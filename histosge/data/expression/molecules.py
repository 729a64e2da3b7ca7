"""Single molecules of a section, counted in squares of any side.

A layout yields its molecules in batches, so that memory follows the squares and not the molecules: a run has up to a
billion. They are read twice: for the total counts of all squares, and for the genes of those that are chosen.

Terms
    bin     a square of a lattice from the slide's top-left, with at least one molecule
    kept    molecules of the matrix's genes with a sufficient quality and a position on the slide
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import sparse

from featurestore.input_file import shown
from histosge.data.expression.loaded_expression import FARTHEST_UM, SlideFrame, unique_names
from histosge.data.sections import Spots
from histosge.errors import ExpressionError

Ints = NDArray[np.int64]
MOST_PENDING = 1 << 23
"""Keys that wait to be merged: 64 MB."""
_PLACES = 1 << 20
"""Rows and columns that a bin's number has room for: 1 m in steps of 1 µm. With 8 million genes or cells it fits 63 bits."""
COLUMNS = ("x_um", "y_um", "feature", "qv", "cell", "is_gene")


@dataclass(frozen=True)
class Molecules:
    """Where a section's molecules are, and how they are counted.

    Parameters
    ----------
    file
        For messages.
    genes
        Names of the features that count, as the file has them.
    cells
        Names of the cells that molecules may belong to.
    min_qv
        Least quality of a molecule that counts (Phred scale).
    batches
        Reads them: tables with the columns `COLUMNS`. Positions are microns from the slide's top-left; `cell` is text,
        of no cell where it is none of `cells`; `is_gene` is False for controls, and null or True for others.
    """

    file: Path
    genes: tuple[str, ...]
    cells: tuple[str, ...]
    min_qv: float
    batches: Callable[[], Iterator[pl.DataFrame]]


@dataclass(frozen=True)
class MoleculeBins:
    """All bins of a section, with their total counts.

    Parameters
    ----------
    side_um
        Of a bin.
    places
        Number of each bin, ascending, ``(n_bins,)``.
    counts
        Molecules in each, ``(n_bins,)``.
    n_kept, n_low, n_other, n_off
        Molecules counted; and those left out: below the quality, of controls and other features, without a position on
        the slide.
    min_qv
        Least quality of those counted.
    """

    side_um: float
    places: Ints
    counts: NDArray[np.float64]
    n_kept: int
    n_low: int
    n_other: int
    n_off: int
    min_qv: float

    def __len__(self) -> int:
        return len(self.places)

    @property
    def row_col(self) -> Ints:
        """Rows and columns of the lattice from the slide's top-left, ``(n_bins, 2)``."""
        return np.stack([self.places // _PLACES, self.places % _PLACES], axis=1)

    @property
    def xy_um(self) -> NDArray[np.float64]:
        """Centres ``(x, y)`` in microns, ``(n_bins, 2)``."""
        return np.asarray((self.row_col[:, ::-1].astype(np.float64) + 0.5) * self.side_um)

    def describe_left_out(self) -> str:
        """Return which molecules were not counted, with their numbers."""
        return (
            f"{self.n_low} molecules below quality {self.min_qv:g}, {self.n_other} of controls and other features, and "
            f"{self.n_off} off the slide left out"
        )


def bin_molecules(molecules: Molecules, frame: SlideFrame, side_um: float) -> MoleculeBins:
    """Count molecules in squares of one side, all genes together.

    Raises
    ------
    ExpressionError
        If none of them belongs to a gene of the matrix, or none is kept.
    """
    found = _PairCounts(1)
    n_all = n_low = n_other = n_off = 0
    for batch in _kept(molecules, frame, side_um):
        n_all, n_low, n_other, n_off = (
            n_all + batch.n,
            n_low + batch.n_low,
            n_other + batch.n_other,
            n_off + batch.n_off,
        )
        found.add(batch.place, np.zeros(len(batch.place), np.int64))
    n_kept = n_all - n_other - n_low - n_off
    if n_all and n_other == n_all:
        raise ExpressionError(
            f"none of {n_all} molecules of {shown(molecules.file)} is of a gene of the matrix beside it, such as "
            f"{molecules.genes[:1]}; give the files of one run"
        )
    if not n_kept:
        raise ExpressionError(
            f"{shown(molecules.file)} has no molecule to count: of {n_all}, {n_low} are below quality {molecules.min_qv:g}, "
            f"{n_other} of controls and {n_off} off the slide; check the alignment and the slide's mpp"
        )
    places, counts = found.matrix()
    total = counts.toarray().ravel().astype(np.float64)
    return MoleculeBins(side_um, places, total, n_kept, n_low, n_other, n_off, molecules.min_qv)


def count_genes(
    molecules: Molecules, frame: SlideFrame, bins: MoleculeBins, chosen: Ints
) -> tuple[Spots, sparse.csr_matrix]:
    """Count the genes of some bins; the molecules are read once more.

    Parameters
    ----------
    chosen
        Indices of bins, ascending.

    Returns
    -------
    spots, cells
        Square spots, ``(n_chosen,)``; and how many molecules of each cell each of them has, ``(n_chosen, n_cells)``.
    """
    # Twice through the file: genes of all bins are 50 million numbers for a section of 1 cm², of which few are scored.
    wanted = bins.places[chosen]
    by_gene, by_cell = _PairCounts(len(molecules.genes)), _PairCounts(len(molecules.cells))
    cells = _codes(molecules.cells)
    for batch in _kept(molecules, frame, bins.side_um):
        at = np.minimum(np.searchsorted(wanted, batch.place), len(wanted) - 1)
        inside = wanted[at] == batch.place
        by_gene.add(at[inside], batch.gene[inside])
        cell = _coded(batch.cell.filter(inside), cells)
        by_cell.add(at[inside][cell >= 0], cell[cell >= 0])
    spots = Spots(
        frame.slide_id,
        frame.donor,
        np.array([f"{row}x{col}" for row, col in bins.row_col[chosen].tolist()], dtype=np.str_),
        bins.xy_um[chosen],
        bins.side_um,
        by_gene.spread(len(chosen)),
        unique_names(molecules.genes),
        "square",
    )
    return spots, by_cell.spread(len(chosen))


@dataclass(frozen=True)
class _Kept:
    """The molecules of a batch that count: bin, gene and cell of each; and how many there were, and were left out."""

    place: Ints
    gene: Ints
    cell: pl.Series
    n: int
    n_low: int
    n_other: int
    n_off: int


def _kept(molecules: Molecules, frame: SlideFrame, side_um: float) -> Iterator[_Kept]:
    size_um = np.array(frame.size_px) * frame.mpp if frame.size_px else np.full(2, FARTHEST_UM)
    genes = _codes(molecules.genes)
    for table in molecules.batches():
        gene = _coded(table["feature"], genes)
        is_gene = table["is_gene"].fill_null(value=True).to_numpy() & (gene >= 0)
        # A quality that is missing compares as false, and is too low.
        good = table["qv"].cast(pl.Float64).fill_null(np.nan).to_numpy() >= molecules.min_qv
        xy_um = table.select(pl.col("x_um", "y_um").cast(pl.Float64).fill_null(np.nan)).to_numpy()
        on_slide = ((xy_um >= 0) & (xy_um < size_um)).all(axis=1)
        kept = is_gene & good & on_slide
        col, row = np.floor(xy_um[kept] / side_um).astype(np.int64).T
        yield _Kept(
            row * _PLACES + col,
            gene[kept],
            table["cell"].filter(kept),
            len(table),
            # In this order, so that each molecule is counted under one reason.
            int((is_gene & ~good).sum()),
            int((~is_gene).sum()),
            int((is_gene & good & ~on_slide).sum()),
        )


class _PairCounts:
    """Number of molecules of each (place, code), merged as they come.

    Parameters
    ----------
    n_codes
        Codes are 0 to `n_codes` - 1.
    """

    def __init__(self, n_codes: int) -> None:
        self._n_codes = max(1, n_codes)
        self._keys: Ints = np.empty(0, np.int64)
        self._n: Ints = np.empty(0, np.int64)
        self._pending: list[tuple[Ints, Ints]] = []
        self._n_pending = 0

    def add(self, place: Ints, code: Ints) -> None:
        keys, n = np.unique(place * self._n_codes + code, return_counts=True)
        self._pending.append((keys, n.astype(np.int64)))
        self._n_pending += len(keys)
        # Seldom: each merge sorts all that was found so far.
        if self._n_pending > max(MOST_PENDING, len(self._keys)):
            self._merge()

    def matrix(self) -> tuple[Ints, sparse.csr_matrix]:
        """Return the places, ascending, and their counts, ``(n_places, n_codes)``."""
        self._merge()
        places, index = np.unique(self._keys // self._n_codes, return_inverse=True)
        values = (self._n.astype(np.float32), (index.ravel(), self._keys % self._n_codes))
        return places, sparse.csr_matrix(values, shape=(len(places), self._n_codes))

    def spread(self, n_places: int) -> sparse.csr_matrix:
        """Return the counts of places 0 to `n_places` - 1, ``(n_places, n_codes)``."""
        self._merge()
        values = (self._n.astype(np.float32), (self._keys // self._n_codes, self._keys % self._n_codes))
        return sparse.csr_matrix(values, shape=(n_places, self._n_codes))

    def _merge(self) -> None:
        keys = np.concatenate([self._keys, *(one for one, _ in self._pending)])
        n = np.concatenate([self._n, *(one for _, one in self._pending)])
        self._pending, self._n_pending = [], 0
        self._keys, index = np.unique(keys, return_inverse=True)
        # Whole numbers below 2^53 are exact as float64.
        self._n = np.bincount(index.ravel(), n, len(self._keys)).astype(np.int64)


def _codes(names: tuple[str, ...]) -> pl.DataFrame:
    # The first of two genes with one name: molecules do not say which is meant.
    table = pl.DataFrame(
        {"name": names, "code": np.arange(len(names))}, schema={"name": pl.String, "code": pl.Int64}
    )
    return table.unique("name", keep="first", maintain_order=True)


def _coded(names: pl.Series, codes: pl.DataFrame) -> Ints:
    """Return the number of each name, ``(n,)``; -1 for one that is unknown or missing."""
    wanted = pl.DataFrame({"name": names.cast(pl.String)})
    found = wanted.join(codes, on="name", how="left", maintain_order="left")["code"].fill_null(-1)
    return np.asarray(found.to_numpy(), np.int64)
