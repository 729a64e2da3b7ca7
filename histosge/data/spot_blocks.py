"""Blocks of tissue with a halo and the spots in them: what an attention model trains on.

One block is one training example: the embeddings of its patches and of those within the halo, and the spots whose discs
lie on it. Where the embeddings come from is the source's affair: sections in memory (`SectionBlocks`), or a store,
which is read block by block (`histosge.data.stored_blocks`).

Terms
    own     the spots of a block: those whose heaviest patch lies in it, so each spot belongs to exactly one block
    under   the patches under those spots; a disc at the rim reaches into the next block
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from histosge.data.sections import Patches, TrainingSection
from histosge.data.spot_overlap import find_patches, heaviest_patches

Indices = NDArray[np.int64]
BLOCK = (32, 32)
"""Patches of a block of sections in memory: the default of stored blocks."""


@dataclass(frozen=True)
class SpotBlock:
    """One block, ready to be trained on.

    Parameters
    ----------
    section
        Index of the section.
    patches
        All patches within the halo of a patch under the block's spots.
    under
        Indices into `patches`: those under the block's spots, ``(n_under,)``.
    under_in_section
        The same patches as indices into `SpotsOnGrid` of the section, ``(n_under,)``.
    overlap
        Sparse ``(n_spots, n_under)``; rows sum to 1.
    spots
        Indices of the spots in their section, ``(n_spots,)``.
    target
        log1p(CP10k), ``(n_spots, n_genes)``, float32.
    """

    section: int
    patches: Patches
    under: Indices
    under_in_section: Indices
    overlap: sparse.csr_matrix
    spots: Indices
    target: NDArray[np.float32]


class SpotBlocks(Protocol):
    """A source of blocks."""

    @property
    def section_of(self) -> Indices:
        """Return the section of each block, ``(n_blocks,)``."""
        ...

    @property
    def n_spots(self) -> Indices:
        """Return the spots of each block, ``(n_blocks,)``."""
        ...

    def read(self, numbers: Iterable[int]) -> Iterator[SpotBlock]:
        """Read blocks in the given order, ahead of the caller where that pays."""
        ...


class SpotsOnGrid(NamedTuple):
    """The spots of one section, and the grid positions of the patches under them.

    Parameters
    ----------
    rows, cols
        ``(n_under,)``.
    overlap
        Sparse ``(n_spots, n_under)``; rows sum to 1.
    """

    rows: Indices
    cols: Indices
    overlap: sparse.csr_matrix

    @classmethod
    def from_section(cls, section: TrainingSection) -> "SpotsOnGrid":
        """Keep the patches under any spot."""
        under = np.unique(section.overlap.indices).astype(np.int64)
        patches = section.patches
        return cls(patches.rows[under], patches.cols[under], sparse.csr_matrix(section.overlap[:, under]))

    def by_block(self, block_shape: tuple[int, int]) -> list[Indices]:
        """Return the spots of each block that has any, in row-major order of blocks; spots are sorted."""
        height, width = block_shape
        heaviest = heaviest_patches(self.overlap)
        place = np.stack([self.rows[heaviest] // height, self.cols[heaviest] // width])
        _, label = np.unique(place, axis=1, return_inverse=True)
        label = label.ravel()
        return [np.flatnonzero(label == one) for one in range(int(label.max()) + 1)] if len(label) else []

    def needed(self, spots: Indices, halo: int) -> tuple[Indices, tuple[int, int], tuple[int, int]]:
        """Return the patches under some spots, and the range of rows and of columns within a halo of any of them."""
        under = np.unique(self.overlap[spots].indices).astype(np.int64)
        rows, cols = self.rows[under], self.cols[under]
        return (
            under,
            (int(rows.min()) - halo, int(rows.max()) + halo + 1),
            (int(cols.min()) - halo, int(cols.max()) + halo + 1),
        )


def halo_steps(halo_um: float, stride_um: float) -> int:
    """Return a halo in patches, rounded up."""
    # The tolerance keeps a halo of 9 x 56 um at 9 patches, whatever the rounding of the stride.
    return int(np.ceil(halo_um / stride_um - 1e-6))


class PlannedBlock(NamedTuple):
    """The spots of one block of a section."""

    section: int
    spots: Indices


class PlannedBlocks:
    """What every source of blocks knows before it reads: the spots of each block.

    Parameters
    ----------
    plan
        In the order of the blocks' numbers.
    """

    def __init__(self, plan: Iterable[PlannedBlock]) -> None:
        self.plan = list(plan)

    @property
    def section_of(self) -> Indices:
        """Return the section of each block, ``(n_blocks,)``."""
        return np.array([one.section for one in self.plan], np.int64)

    @property
    def n_spots(self) -> Indices:
        """Return the spots of each block, ``(n_blocks,)``."""
        return np.array([len(one.spots) for one in self.plan], np.int64)


class SectionBlocks(PlannedBlocks):
    """Blocks of sections whose embeddings are in memory.

    Parameters
    ----------
    sections
        With their targets.
    halo_um
        How far beyond the patches under spots the model looks.
    block
        Patches of a block, ``(rows, cols)``.
    """

    def __init__(
        self, sections: Sequence[TrainingSection], halo_um: float, block: tuple[int, int] = BLOCK
    ) -> None:
        self._sections, self._halo_um = sections, halo_um
        self._grids = [SpotsOnGrid.from_section(section) for section in sections]
        super().__init__(
            PlannedBlock(number, spots)
            for number, grid in enumerate(self._grids)
            for spots in grid.by_block(block)
        )

    def read(self, numbers: Iterable[int]) -> Iterator[SpotBlock]:
        """Cut blocks out of the sections, one after the other."""
        for number in numbers:
            yield self._cut(self.plan[number])

    def _cut(self, planned: PlannedBlock) -> SpotBlock:
        section, grid = self._sections[planned.section], self._grids[planned.section]
        patches = section.patches
        under, rows, cols = grid.needed(planned.spots, halo_steps(self._halo_um, patches.stride_um))
        inside = (patches.rows >= rows[0]) & (patches.rows < rows[1])
        inside &= (patches.cols >= cols[0]) & (patches.cols < cols[1])
        near = patches.take(inside)
        return make_block(planned.section, near, grid, under, planned.spots, section.target[planned.spots])


def make_block(
    section: int,
    patches: Patches,
    grid: SpotsOnGrid,
    under: Indices,
    spots: Indices,
    target: NDArray[np.float32],
) -> SpotBlock:
    """Put a block together; patches under a spot that have no embedding are left out, and so are spots without any.

    Parameters
    ----------
    patches
        Those with an embedding near the spots.
    under
        Of `grid`: the patches under the spots.
    """
    at = find_patches(patches, grid.rows[under], grid.cols[under])
    under, at = under[at >= 0], at[at >= 0]
    overlap = sparse.csr_matrix(grid.overlap[spots][:, under])
    total = np.asarray(overlap.sum(axis=1)).ravel()
    has = total > 0
    if not has.all():
        overlap, spots, target, total = overlap[has], spots[has], target[has], total[has]
    # Over the patches that exist, as everywhere: where all do, the sum is 1 and weights keep their bits.
    if (np.abs(total - 1) > 1e-9).any():
        overlap = sparse.csr_matrix(sparse.diags(1 / total) @ overlap)
    return SpotBlock(section, patches, at, under, overlap, spots, target)
