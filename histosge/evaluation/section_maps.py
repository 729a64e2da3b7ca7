"""Held-out maps of every section and gene, small enough for the page of an evaluation.

A collector takes one section's predictions fold by fold and keeps what a screen can show: patches are pooled k x k where
there are very many, and genes beyond a limit of bytes are left out. It fits nothing and draws nothing.

Terms
    cell    a square of k x k patches of the grid; one patch where k is 1
    plane   one gene's values on one section, spots first and then cells
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from histosge.data.sections import Section
from histosge.heldout.metrics import correlate
from histosge.reporting.plots import robust_range
from histosge.reporting.value_maps import SlideMaps, Values

MAP_BYTES = 30_000_000
"""Of all planes, a byte a value: 40 MB as base64 at worst, and the page stays below the 50 MB of the viewer's one file."""
CELL_LIMITS = (20_000, 10_000, 5_000, 2_500)
"""Cells of a section, and as many spots, tried in turn until all genes fit: a panel of the page is 350 pixels wide, so
that 20,000 cells are finer than it shows, and 2,500 still show where a gene is high."""
LEAST_GENES = 20
"""Kept of each section in any case: where even these do not fit, sections are left out."""


@dataclass(frozen=True)
class SectionPrediction:
    """One fold's prediction of one section.

    Parameters
    ----------
    genes
        The fold's genes.
    truth, predicted_spots
        log1p(CP10k) of the section's spots that the fold holds out, ``(n_held_out, n_genes)`` each.
    held_out
        Which spots those are, ``(n_spots,)``.
    predicted
        log1p(CP10k) of the patches that are this fold's to predict, ``(n_own, n_genes)``.
    own
        Which patches those are, ``(n_patches,)``.
    """

    genes: tuple[str, ...]
    truth: NDArray[np.float64]
    predicted_spots: NDArray[np.float64]
    held_out: NDArray[np.bool_]
    predicted: NDArray[np.float32]
    own: NDArray[np.bool_]


@dataclass(frozen=True)
class MapBudget:
    """What of the sections' maps is kept.

    Parameters
    ----------
    cell_limit
        Cells of a section, and spots, at most.
    genes
        The genes with maps; None: all.
    slide_ids
        The sections with maps.
    """

    cell_limit: int
    genes: frozenset[str] | None
    slide_ids: frozenset[str]

    @classmethod
    def choose(
        cls,
        sections: Sequence[Section],
        genes: Sequence[str],
        first: Sequence[str] = (),
        limit: int | None = None,
    ) -> Self:
        """Choose the finest maps of all genes that fit; where none do, keep the genes that come first.

        Parameters
        ----------
        sections
            In the order in which they are kept.
        genes
            Best first.
        first
            Genes that are kept before the others, such as those that a user named.
        limit
            In bytes; `MAP_BYTES` if None.
        """
        limit = MAP_BYTES if limit is None else limit
        for cell_limit in CELL_LIMITS:
            plane = sum(_plane_bytes(section, cell_limit) for section in sections)
            if plane * len(genes) <= limit:
                return cls(cell_limit, None, frozenset(section.slide_id for section in sections))
        ordered = tuple(dict.fromkeys((*(gene for gene in first if gene in set(genes)), *genes)))
        n_genes = min(len(ordered), max(LEAST_GENES, limit // max(plane, 1)))
        kept: list[str] = []
        used = 0
        for section in sections:
            used += _plane_bytes(section, cell_limit) * n_genes
            if kept and used > limit:
                break
            kept.append(section.slide_id)
        return cls(cell_limit, frozenset(ordered[:n_genes]), frozenset(kept))


class SectionMapCollector:
    """Adds up one section's held-out predictions, cell by cell, fold by fold.

    Parameters
    ----------
    section
        Whose maps.
    budget
        What is kept of them.
    """

    def __init__(self, section: Section, budget: MapBudget) -> None:
        self.section = section
        self._budget = budget
        patches, shape = section.patches, section.thumbnail.shape[:2]
        self._side = _pooled_side(section, budget.cell_limit)
        n_cols = -(-shape[1] // self._side)
        cell_of = (patches.rows // self._side) * n_cols + patches.cols // self._side
        self._cells, self._cell_of_patch = np.unique(cell_of, return_inverse=True)
        self._grid = (-(-shape[0] // self._side), n_cols)
        self._spots = np.arange(0, len(section.spots), _spot_step(section, budget.cell_limit))
        self._genes: dict[str, int] = {}
        self._sums = np.empty((0, 0), np.float32)
        self._counts = np.zeros(len(self._cells), np.int64)
        self._measured = np.empty((0, 0), np.float32)
        self._correlations = np.empty(0)
        self._folds_of_gene = np.empty(0, np.int64)
        self._n_folds = 0

    def add(self, prediction: SectionPrediction) -> None:
        """Add what one fold predicts."""
        if not self._genes:
            keep = self._budget.genes
            names = [gene for gene in prediction.genes if keep is None or gene in keep]
            self._genes = {gene: i for i, gene in enumerate(names)}
            self._sums = np.zeros((len(self._cells), len(names)), np.float32)
            self._measured = np.full((len(self._spots), len(names)), np.nan, np.float32)
            self._correlations, self._folds_of_gene = np.zeros(len(names)), np.zeros(len(names), np.int64)
        here = [i for i, gene in enumerate(prediction.genes) if gene in self._genes]
        columns = np.asarray([self._genes[prediction.genes[i]] for i in here], np.int64)
        self._n_folds += 1
        self._folds_of_gene[columns] += 1
        truth, guess = prediction.truth[:, here], prediction.predicted_spots[:, here]
        r, _ = correlate(truth, guess, np.zeros(len(truth), np.int64))
        self._correlations[columns] += r
        self._sums[:, columns] += self._pooling(prediction.own) @ prediction.predicted[:, here]
        self._counts += np.bincount(self._cell_of_patch[prediction.own], minlength=len(self._cells))
        shown = np.flatnonzero(prediction.held_out[self._spots])
        place = np.cumsum(prediction.held_out) - 1
        self._measured[np.ix_(shown, columns)] = truth[place[self._spots[shown]]]

    def _pooling(self, own: NDArray[np.bool_]) -> sparse.csr_matrix:
        """Return ``(n_cells, n_own)``: one where a patch lies in a cell."""
        cells = self._cell_of_patch[own]
        n = len(cells)
        return sparse.csr_matrix((np.ones(n, np.float32), (cells, np.arange(n))), shape=(len(self._cells), n))

    def maps(self) -> SlideMaps | None:
        """Return the maps of all genes that every fold of this section has chosen; None if there is none."""
        # Each fold chooses its own genes; a gene that one lacks would leave a hole in the map.
        complete = {gene: i for gene, i in self._genes.items() if self._folds_of_gene[i] == self._n_folds}
        if not complete:
            return None
        patches, side = self.section.patches, self._side
        shown = np.isfinite(self._measured[:, next(iter(complete.values()))])
        corner = (patches.patch_um - patches.stride_um) / 2
        rows, cols = np.divmod(self._cells, self._grid[1])
        picture = _pooled_picture(self.section.thumbnail, side)
        return SlideMaps(
            slide_id=self.section.slide_id,
            names=tuple(complete),
            notes=tuple(
                f"held-out r = {self._correlations[i] / self._n_folds:.3f}" for i in complete.values()
            ),
            values=self._values(complete, shown),
            spot_xy_um=self.section.spots.xy_um[self._spots[shown]],
            spot_um=self.section.spots.diameter_um,
            rows=rows,
            cols=cols,
            picture=picture,
            step_um=patches.stride_um * side,
            # A pixel stands for the stride's square around a patch's centre, not for the patch.
            corner_um=(patches.origin_um[0] + corner, patches.origin_um[1] + corner),
            pooled=side,
            spot_step=_spot_step(self.section, self._budget.cell_limit),
        )

    def _values(self, genes: dict[str, int], shown: NDArray[np.bool_]) -> Iterator[Values]:
        counts = np.maximum(self._counts, 1)
        for i in genes.values():
            measured = self._measured[shown, i]
            # A patch that no fold predicts would be 0, which is a value.
            cells = np.where(self._counts > 0, self._sums[:, i] / counts, np.nan).astype(np.float32)
            yield Values(measured, cells, robust_range(measured))


def _plane_bytes(section: Section, cell_limit: int) -> int:
    side = _pooled_side(section, cell_limit)
    spots = -(-len(section.spots) // _spot_step(section, cell_limit))
    return -(-len(section.patches) // side**2) + spots


def _pooled_side(section: Section, cell_limit: int) -> int:
    """Return k of the k x k patches of a cell."""
    return int(np.ceil(np.sqrt(max(1.0, len(section.patches) / cell_limit))))


def _spot_step(section: Section, limit: int) -> int:
    """Return of how many spots one is shown."""
    return max(1, -(-len(section.spots) // limit))


def _pooled_picture(picture: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Return means of ``side x side`` pixels, fewer at the right and lower edge."""
    if side == 1:
        return picture
    n_rows, n_cols = picture.shape[:2]
    rows, cols = np.arange(0, n_rows, side), np.arange(0, n_cols, side)
    sums = np.add.reduceat(np.add.reduceat(picture.astype(np.float64), rows, axis=0), cols, axis=1)
    heights, widths = np.diff([*rows, n_rows]), np.diff([*cols, n_cols])
    means = sums / (heights[:, None] * widths)[..., None]
    return np.asarray(np.rint(means), np.uint8)
