"""Batches of spots with the mean embedding of the patches under each, streamed block by block.

Sections come in an order that the seed decides, the blocks under a section's spots row by row. A spot whose disc
reaches over several blocks is complete when the last of them was read. Only spots at the rim of what was read so far
are unfinished, so memory does not grow with sections. Complete spots go into a buffer, from which batches are drawn.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from featurestore.blocks import Block, plan_blocks
from featurestore.storage.float16 import nan_rows
from featurestore.storage.raw_read import RawBlocks
from featurestore.storage.selection import SlideEmbedding
from histosge.data.load_settings import EpochReads, LoadSettings
from histosge.data.spot_targets import SectionTargets, SpotBatch
from histosge.threads import prefetch

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


class _SpotsOverBlock(NamedTuple):
    """One block, and the spots of a section over it.

    Parameters
    ----------
    section, block
        Which.
    spots
        Of the section, ``(n_spots,)``.
    n_blocks
        How many blocks each of them reaches over, ``(n_spots,)``.
    overlap
        ``(n_spots, n_patches)``: shares of the spots' areas.
    rows, cols
        Places of those patches in the block, ``(n_patches,)``.
    """

    section: int
    block: Block
    spots: Indices
    n_blocks: Indices
    overlap: sparse.csr_matrix
    rows: Indices
    cols: Indices


class _BlockSums(NamedTuple):
    """What one block gives to the spots over it: weighted sums of embeddings, and the weights that went in."""

    over: _SpotsOverBlock
    total: Floats
    weight: Floats
    n_unreadable: int
    is_there: bool


class SpotBatches:
    """Batches of spots from the slides of a store.

    Parameters
    ----------
    slides, readers
        The embedding of each section's slide, in the sections' order, and what reads its blocks.
    sections
        Spots and weights.
    settings
        Batch, seed, buffer, rank.
    n_threads
        That read blocks.
    """

    def __init__(
        self,
        slides: Sequence[SlideEmbedding],
        readers: Sequence[RawBlocks],
        sections: Sequence[SectionTargets],
        settings: LoadSettings,
        n_threads: int,
    ) -> None:
        self._slides, self._readers, self._sections = slides, readers, sections
        self._settings, self._n_threads = settings, n_threads
        # Of each section, as far as it is known: spots that an epoch found without a readable patch are taken off.
        self._n_spots = np.array([len(section) for section in sections], np.int64)
        self.reads = EpochReads()

    def n_items(self, epoch: int, rank: int, world_size: int) -> int:
        """Return the spots of one rank's part of an epoch; those known to have no readable patch are not counted."""
        return int(self._n_spots[self._order(epoch, rank, world_size)].sum())

    def epoch(self, number: int) -> Iterator[SpotBatch]:
        """Go through the spots of this rank's sections once: the same number gives the same batches."""
        s = self._settings
        self.reads = EpochReads()
        rng = np.random.default_rng([s.seed, number, s.rank]) if s.shuffle else None
        buffer = _SpotBuffer(self._buffer_spots(), self._slides[0].dim, rng)
        for section, spots, embedding in self._completed(self._order(number, s.rank, s.world_size)):
            for start, stop in buffer.pieces(len(spots)):
                buffer.add(section, spots[start:stop], embedding[start:stop])
                if buffer.is_full:
                    yield self._batch(*buffer.draw(s.batch))
        while buffer.size >= (s.batch if s.drop_last else 1):
            yield self._batch(*buffer.draw(min(s.batch, buffer.size)))

    def _buffer_spots(self) -> int:
        s = self._settings
        # In order, one batch at a time leaves the buffer as it was filled.
        return max(s.batch, s.buffer_mb * 2**20 // (4 * self._slides[0].dim)) if s.shuffle else s.batch

    def _order(self, epoch: int, rank: int, world_size: int) -> Indices:
        """Return one rank's sections, in the order of an epoch."""
        order = np.arange(len(self._sections))
        if self._settings.shuffle:
            order = np.random.default_rng([self._settings.seed, epoch]).permutation(order)
        return order[rank::world_size]

    def _batch(self, section: Indices, spot: Indices, embedding: NDArray[np.float32]) -> SpotBatch:
        # Counts stay sparse in memory, and only a batch's are made dense.
        n_genes = self._sections[0].counts.shape[1]
        counts, library = np.empty((len(spot), n_genes), np.float32), np.empty(len(spot), np.float32)
        for number in np.unique(section):
            here = section == number
            counts[here] = self._sections[number].counts[spot[here]].toarray()
            library[here] = self._sections[number].library[spot[here]]
        return SpotBatch(embedding, counts, library, section, spot)

    def _completed(self, order: Indices) -> Iterator[tuple[int, Indices, NDArray[np.float32]]]:
        """Yield a section, which of its spots a block has completed, and their mean embeddings."""
        unfinished: dict[int, list[Any]] = {}
        work = (over for section in order.tolist() for over in self._blocks_of(section))
        n_uncovered = np.zeros_like(self._n_spots)
        # In the order of the plan, whichever read is done first: the buffer's draws depend on it.
        for sums in prefetch(self._read, work, self._n_threads):
            section = sums.over.section
            spots, total, weight = _complete(sums, unfinished)
            has = weight > 0
            self._count(sums, int(has.sum()), int((~has).sum()))
            n_uncovered[section] += (~has).sum()
            known = len(self._sections[section]) - n_uncovered[section]
            self._n_spots[section] = min(self._n_spots[section], known)
            yield section, spots[has], (total[has] / weight[has, None]).astype(np.float32)

    def _count(self, sums: _BlockSums, n_spots: int, n_uncovered: int) -> None:
        slide_id, reads = self._sections[sums.over.section].slide_id, self.reads
        reads.spots += n_spots
        if n_uncovered:
            reads.uncovered[slide_id] += n_uncovered
        if not sums.is_there:
            reads.missing[slide_id] += 1
            return
        reads.blocks += 1
        reads.patches += len(sums.over.rows) - sums.n_unreadable
        if sums.n_unreadable:
            reads.unreadable[slide_id] += sums.n_unreadable

    def _blocks_of(self, number: int) -> Iterator[_SpotsOverBlock]:
        """Yield the blocks under a section's spots, in row-major order."""
        section, slide = self._sections[number], self._slides[number]
        blocks = list(plan_blocks(slide.grid.shape, slide.array.block_shape))
        height, width = slide.array.block_shape
        across = -(-slide.grid.n_cols // width)
        # Row-major order of blocks is the order of these numbers.
        block_of = section.rows // height * across + section.cols // width
        by_patch = section.overlap.tocsc()
        pairs = section.overlap.tocoo()
        reached = np.unique(np.stack([pairs.row, block_of[pairs.col]], axis=1), axis=0)
        n_blocks = np.bincount(reached[:, 0], minlength=len(section))
        for place in np.unique(block_of).tolist():
            block, under = blocks[place], np.flatnonzero(block_of == place)
            overlap = sparse.csr_matrix(by_patch[:, under])
            spots = np.flatnonzero(np.diff(overlap.indptr))
            rows, cols = section.rows[under] - block.rows[0], section.cols[under] - block.cols[0]
            yield _SpotsOverBlock(number, block, spots, n_blocks[spots], overlap[spots], rows, cols)

    def _read(self, over: _SpotsOverBlock) -> _BlockSums:
        reader = self._readers[over.section]
        loaded = reader.load(over.block, np.empty(reader.slot_shape, reader.dtype))
        if loaded is None:
            nothing = np.zeros((len(over.spots), reader.slot_shape[2]))
            return _BlockSums(over, nothing, np.zeros(len(over.spots)), 0, is_there=False)
        values, overlap = loaded.values[over.rows, over.cols], over.overlap
        unreadable = nan_rows(values)
        if unreadable.any():
            values, overlap = values[~unreadable], overlap[:, ~unreadable]
        # In float64, as the weights are: sums do not depend on where blocks cut a disc beyond the last bit.
        total = overlap @ values.astype(np.float64)
        weight = np.asarray(overlap.sum(axis=1), dtype=np.float64).ravel()
        return _BlockSums(over, total, weight, int(unreadable.sum()), is_there=True)


def _complete(sums: _BlockSums, unfinished: dict[int, list[Any]]) -> tuple[Indices, Floats, Floats]:
    """Return the spots that need no further block: which, their sums, and their weights.

    Parameters
    ----------
    unfinished
        Spot -> blocks still to come, sum and weight so far. It empties with the section's last block.
    """
    # By far the most spots lie over one block and never wait.
    whole = sums.over.n_blocks == 1
    spots, total, weight = [sums.over.spots[whole]], [sums.total[whole]], [sums.weight[whole]]
    for i in np.flatnonzero(~whole).tolist():
        spot = int(sums.over.spots[i])
        so_far = unfinished.setdefault(spot, [int(sums.over.n_blocks[i]), 0.0, 0.0])
        so_far[0] -= 1
        so_far[1] = so_far[1] + sums.total[i]
        so_far[2] = so_far[2] + sums.weight[i]
        if so_far[0] == 0:
            del unfinished[spot]
            spots.append(np.array([spot]))
            total.append(so_far[1][None])
            weight.append(np.array([so_far[2]]))
    return np.concatenate(spots), np.concatenate(total), np.concatenate(weight)


class _SpotBuffer:
    """A bounded number of complete spots, from which batches are drawn.

    Parameters
    ----------
    capacity, dim
        Spots, and features of one.
    rng
        Draws; None means in the order in which they came.
    """

    def __init__(self, capacity: int, dim: int, rng: np.random.Generator | None) -> None:
        self._section, self._spot = np.empty(capacity, np.int64), np.empty(capacity, np.int64)
        self._embedding = np.empty((capacity, dim), np.float32)
        self._rng, self.size = rng, 0

    @property
    def is_full(self) -> bool:
        return self.size == len(self._spot)

    def pieces(self, n: int) -> Iterator[tuple[int, int]]:
        """Cut `n` spots into ranges that fit; the caller adds each, and draws when the buffer is full."""
        start = 0
        while start < n:
            stop = min(n, start + len(self._spot) - self.size)
            yield start, stop
            start = stop

    def add(self, section: int, spots: Indices, embedding: NDArray[np.float32]) -> None:
        here = slice(self.size, self.size + len(spots))
        self._section[here], self._spot[here], self._embedding[here] = section, spots, embedding
        self.size += len(spots)

    def draw(self, n: int) -> tuple[Indices, Indices, NDArray[np.float32]]:
        """Take out `n` spots: sections, spots, embeddings."""
        # Without a generator the buffer holds just one batch, so the first `n` are all of it.
        drawn = np.arange(n) if self._rng is None else self._rng.choice(self.size, n, replace=False)
        taken = self._section[drawn], self._spot[drawn], self._embedding[drawn]
        left = self.size - n
        # Those at the end that were not drawn move to the places that came free before it.
        free = drawn[drawn < left]
        last = np.setdiff1d(np.arange(left, self.size), drawn, assume_unique=True)
        arrays: tuple[NDArray[Any], ...] = (self._section, self._spot, self._embedding)
        for array in arrays:
            array[free] = array[last]
        self.size = left
        return taken
