"""Blocks with a halo and their spots, read from a store in any order: an attention model trains on them.

A block is read when it is wanted, with what of the blocks around it lies within the halo. Threads read ahead of the
caller. Memory holds the objects that were read last (a fixed number of bytes) and, of each section, which spots lie in
which block: it does not grow with the patches of a cohort.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from featurestore.blocks import Block
from featurestore.byte_cache import ByteCache
from featurestore.errors import StoreError
from featurestore.grid import PatchGrid
from featurestore.storage.float16 import nan_rows
from featurestore.storage.raw_read import RawBlocks
from histosge.data.own_pages import in_own_pages
from histosge.data.sections import Patches
from histosge.data.spot_blocks import (
    PlannedBlock,
    PlannedBlocks,
    SpotBlock,
    SpotsOnGrid,
    halo_steps,
    make_block,
)
from histosge.threads import prefetch

Indices = NDArray[np.int64]
CACHE_MB = 256
"""Of stored objects in memory: a block and the eight around it at 1,536 float16 features are 28 MB."""


@dataclass(frozen=True)
class StoredSection:
    """One section: where its blocks are, and what is known of its spots.

    Parameters
    ----------
    slide_id
        Of the slide.
    grid
        Of the slide.
    reader
        Reads its blocks.
    spots
        Returns its spots and the patches under them; called for each block, so that they need not stay in memory.
    target
        Some of its spots -> log1p(CP10k), ``(n_spots, n_genes)``, float32.
    """

    slide_id: str
    grid: PatchGrid
    reader: RawBlocks
    spots: Callable[[], SpotsOnGrid]
    target: Callable[[Indices], NDArray[np.float32]]

    @property
    def block_shape(self) -> tuple[int, int]:
        """Return the patches of one stored object."""
        return self.reader.slot_shape[0], self.reader.slot_shape[1]


class _Part(NamedTuple):
    """The patches of one stored object that have an embedding, as it is stored."""

    rows: Indices
    cols: Indices
    values: NDArray[np.floating]


class StoredBlocks(PlannedBlocks):
    """Blocks of sections in a store: a `histosge.data.spot_blocks.SpotBlocks`.

    Parameters
    ----------
    sections
        With their spots.
    halo_um
        How far beyond the patches under spots the model looks.
    threads
        That read ahead.
    cache_mb
        Of stored objects in memory.

    Attributes
    ----------
    n_objects
        Objects that were read so far; one that was still in memory is not read again.
    """

    def __init__(
        self,
        sections: Sequence[StoredSection],
        halo_um: float,
        *,
        threads: int = 2,
        cache_mb: int = CACHE_MB,
    ) -> None:
        self._sections, self._halo_um, self._threads = sections, halo_um, threads
        super().__init__(
            PlannedBlock(number, spots)
            for number, section in enumerate(sections)
            for spots in section.spots().by_block(section.block_shape)
        )
        self._parts: ByteCache[_Part | None] = ByteCache(cache_mb * 2**20, _part_bytes)
        self.n_objects = 0

    def read(self, numbers: Iterable[int]) -> Iterator[SpotBlock]:
        """Read blocks in the given order; threads are a few blocks ahead.

        Raises
        ------
        StoreError
            If a block is not there any more.
        """
        return prefetch(self._read, numbers, self._threads)

    def _read(self, number: int) -> SpotBlock:
        planned = self.plan[number]
        section = self._sections[planned.section]
        spots = section.spots()
        halo = halo_steps(self._halo_um, section.grid.stride_um)
        under, rows, cols = spots.needed(planned.spots, halo)
        parts = []
        for index in _touched(rows, cols, section.block_shape, section.grid.shape):
            key = (planned.section, *index)
            part = self._parts.get(key, partial(self._load, section, index))
            if part is not None:
                inside = (part.rows >= rows[0]) & (part.rows < rows[1])
                inside &= (part.cols >= cols[0]) & (part.cols < cols[1])
                parts.append(_Part(part.rows[inside], part.cols[inside], part.values[inside]))
        if not parts:
            raise StoreError(
                f"blocks of slide {section.slide_id!r} were removed while it was read; run histosge embed again"
            )
        at_rows, at_cols = (np.concatenate([part[axis] for part in parts]) for axis in (0, 1))
        values = np.concatenate([part.values for part in parts]).astype(np.float32)
        patches = Patches.on_grid(section.slide_id, section.grid, at_rows, at_cols, values)
        return make_block(
            planned.section, patches, spots, under, planned.spots, section.target(planned.spots)
        )

    def _load(self, section: StoredSection, index: tuple[int, int]) -> _Part | None:
        """Read one object; None where there is none, as nothing in it is tissue."""
        reader, (height, width) = section.reader, section.block_shape
        n_rows, n_cols = section.grid.shape
        top, left = index[0] * height, index[1] * width
        block = Block(index, (top, min(top + height, n_rows)), (left, min(left + width, n_cols)))
        loaded = reader.load(block, np.empty(reader.slot_shape, reader.dtype))
        if loaded is None:
            return None
        self.n_objects += 1
        # Padding beyond the grid is cut off; background is NaN, as is a patch that could not be read.
        values = loaded.values[: block.shape[0], : block.shape[1]].reshape(-1, reader.slot_shape[2])
        kept = np.flatnonzero(~nan_rows(np.ascontiguousarray(values)))
        # These stay while the arrays of a few hundred steps come and go.
        own = in_own_pages(values[kept])
        return _Part(top + kept // block.shape[1], left + kept % block.shape[1], own)


def _part_bytes(part: _Part | None) -> int:
    return 1 if part is None else sum(array.nbytes for array in part)


def _touched(
    rows: tuple[int, int], cols: tuple[int, int], block_shape: tuple[int, int], grid_shape: tuple[int, int]
) -> list[tuple[int, int]]:
    """Return the indices of the blocks that a range of rows and columns touches, in row-major order."""
    spans = (
        range(max(0, start) // side, -(-min(stop, n) // side))
        for (start, stop), side, n in zip((rows, cols), block_shape, grid_shape, strict=True)
    )
    down, across = spans
    return [(i, j) for i in down for j in across]
