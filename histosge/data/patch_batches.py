"""Shuffled batches of patches: threads read whole blocks into two buffers, which take turns.

Patches are drawn from the buffer that is full while the other one is being filled. They are shuffled within a buffer,
blocks over all slides.

Terms
    part   the blocks that fill one buffer
    slot   the memory of one stored block, padding and all
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from featurestore.blocks import Block
from featurestore.errors import StoreError
from featurestore.storage.float16 import rows_without_nan
from featurestore.storage.raw_read import RawBlocks
from featurestore.storage.selection import METADATA_THREADS, SlideEmbedding
from histosge.data.load_settings import EpochReads, LoadSettings
from histosge.data.shuffle_buffer import Batch, BatchCutter, BufferPool, PatchBuffer

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class _PlannedBlock:
    """One block: its place in the plan, its slide's, and its tissue as one bit for each patch of a slot."""

    number: int
    slide: int
    block: Block
    tissue: bytes

    @property
    def n_tissue(self) -> int:
        return int.from_bytes(self.tissue).bit_count()


class _BlockRead(NamedTuple):
    """What reading a block gave: how many of its patches are in the buffer, and the places that stayed empty."""

    n_readable: int
    empty: Indices
    is_stored: bool


class _FillingBuffer(NamedTuple):
    """A buffer, and the reads that fill it."""

    buffer: PatchBuffer
    reads: list[Future[_BlockRead]]


class PatchBatches:
    """Batches of patches from the slides of a store, epoch after epoch.

    Opening reads every slide's tissue, of which about half a kilobyte a block stays in memory.

    Parameters
    ----------
    slides, readers
        The embeddings, of one dimension and type, and what reads their blocks.
    settings
        Batch, seed, buffer, rank.
    n_threads
        That read blocks.

    Raises
    ------
    StoreError
        If the buffer cannot hold two blocks.
    """

    def __init__(
        self,
        slides: Sequence[SlideEmbedding],
        readers: Sequence[RawBlocks],
        settings: LoadSettings,
        n_threads: int,
    ) -> None:
        self._slides, self._readers = slides, readers
        self._settings, self._n_threads = settings, n_threads
        self._dim, self._dtype = slides[0].dim, readers[0].dtype
        # A grid smaller than a block is stored as a smaller one: it fills a part of its slot.
        self._slot_patches = max(int(np.prod(reader.slot_shape[:2])) for reader in readers)
        self._plan = _plan(slides)
        # Of each planned block, as far as it is known: what an epoch found unreadable is taken off.
        self._n_readable = np.array([planned.n_tissue for planned in self._plan], np.int64)
        self.slots_per_buffer = self._count_slots()
        self.buffers = BufferPool(self._capacity, self._dim, self._dtype)
        self._thread_memory = threading.local()
        # Checksums of blocks without NaN: the same checksum means the same values, which need no second look.
        self._without_nan: dict[_PlannedBlock, int] = {}
        self.reads = EpochReads()

    def n_items(self, epoch: int, rank: int, world_size: int) -> int:
        """Return the patches of one rank's part of an epoch, as far as they are known to be readable."""
        return int(self._n_readable[self._order(epoch, rank, world_size)].sum())

    def epoch(self, number: int) -> Iterator[Batch]:
        """Go through this rank's blocks once: the same number gives the same batches."""
        self.reads = EpochReads()
        batches = BatchCutter(self._settings.batch)
        for buffer, filled in self._fill_buffers(number):
            yield from batches.cut(buffer, filled)
        if not self._settings.drop_last:
            yield from batches.remainder()

    def _fill_buffers(self, epoch: int) -> Iterator[tuple[PatchBuffer, int]]:
        """Fill one buffer while the other is used; yield it with the number of patches that it holds."""
        order = self._order(epoch, self._settings.rank, self._settings.world_size)
        parts = self._split_by_capacity([self._plan[i] for i in order])
        filling: deque[_FillingBuffer] = deque()
        with ThreadPoolExecutor(self._n_threads) as executor:
            try:
                for number, part in enumerate(parts[:2]):
                    filling.append(self._start_filling(executor, part, (epoch, number)))
                for number, part in enumerate(parts):
                    buffer, reads = filling[0].buffer, [read.result() for read in filling[0].reads]
                    yield buffer, self._record_reads(part, reads, buffer)
                    del filling[0]
                    buffer.release()
                    # As soon as this buffer is drawn from, threads go on with it, before the other one is complete.
                    if number + 2 < len(parts):
                        filling.append(self._start_filling(executor, parts[number + 2], (epoch, number + 2)))
            finally:
                # Where the caller stops early: no thread may still write to a buffer that is released.
                futures = [read for begun in filling for read in begun.reads]
                for future in futures:
                    future.cancel()
                wait(futures)
                for begun in filling:
                    begun.buffer.release()

    def _order(self, epoch: int, rank: int, world_size: int) -> Indices:
        """Return which planned blocks one rank reads, in the order of an epoch."""
        order = np.arange(len(self._plan))
        if self._settings.shuffle:
            # Without the rank: all ranks shuffle alike, so that their shares are disjoint.
            order = np.random.default_rng([self._settings.seed, epoch]).permutation(order)
        return order[rank::world_size]

    def _split_by_capacity(self, planned: list[_PlannedBlock]) -> list[list[_PlannedBlock]]:
        """Cut a list of blocks into parts whose patches fit into a buffer."""
        parts: list[list[_PlannedBlock]] = []
        room = 0
        for one in planned:
            if one.n_tissue > room:
                parts.append([])
                room = self._capacity
            parts[-1].append(one)
            room -= one.n_tissue
        return parts

    @property
    def _capacity(self) -> int:
        """Patches that a buffer has room for."""
        return self.slots_per_buffer * self._slot_patches

    def _start_filling(
        self, executor: ThreadPoolExecutor, part: list[_PlannedBlock], seed: tuple[int, int]
    ) -> _FillingBuffer:
        """Submit the reads of a part; the seed decides the place of every patch before any is read."""
        s, buffer = self._settings, self.buffers.lend()
        ends = np.cumsum([planned.n_tissue for planned in part])
        places = np.arange(ends[-1])
        if s.shuffle:
            epoch, number = seed
            np.random.default_rng([s.seed, epoch, s.rank, number]).shuffle(places)
        shares = np.split(places, ends[:-1])
        reads = [
            executor.submit(self._read_into, buffer, planned, share)
            for planned, share in zip(part, shares, strict=True)
        ]
        return _FillingBuffer(buffer, reads)

    def _read_into(self, buffer: PatchBuffer, planned: _PlannedBlock, places: Indices) -> _BlockRead:
        """Read a block, and put those of its tissue patches that have an embedding in the buffer."""
        reader = self._readers[planned.slide]
        rows, cols, dim = reader.slot_shape
        loaded = reader.load(planned.block, self._slot(reader))
        if loaded is None:
            return _BlockRead(0, places, is_stored=False)
        tissue = np.unpackbits(np.frombuffer(planned.tissue, np.uint8), count=rows * cols).view(bool)
        values, kept = loaded.values.reshape(rows * cols, dim), np.flatnonzero(tissue)
        empty = places[:0]
        if loaded.checksum is None or loaded.checksum != self._without_nan.get(planned):
            has = np.isin(kept, rows_without_nan(values, tissue))
            kept, places, empty = kept[has], places[has], places[~has]
            if loaded.checksum is not None and not len(empty):
                self._without_nan[planned] = loaded.checksum
        at = planned.block.rows[0] + kept // cols, planned.block.cols[0] + kept % cols
        buffer.put(places, planned.slide, at, values if len(kept) == len(values) else values[kept])
        return _BlockRead(len(kept), empty, is_stored=True)

    def _slot(self, reader: RawBlocks) -> NDArray[Any]:
        """Return this thread's memory for one block."""
        slot: NDArray[Any] | None = getattr(self._thread_memory, "slot", None)
        if slot is None:
            slot = self._thread_memory.slot = np.empty((self._slot_patches, self._dim), reader.dtype)
        return slot[: int(np.prod(reader.slot_shape[:2]))].reshape(reader.slot_shape)

    def _record_reads(self, part: list[_PlannedBlock], reads: list[_BlockRead], buffer: PatchBuffer) -> int:
        """Count what was read, close up the buffer, and return how many patches it holds."""
        for planned, read in zip(part, reads, strict=True):
            slide_id = self._slides[planned.slide].slide_id
            self._n_readable[planned.number] = read.n_readable
            self.reads.blocks += read.is_stored
            self.reads.patches += read.n_readable
            if not read.is_stored:
                self.reads.missing[slide_id] += 1
                continue
            self.reads.background += int(np.prod(planned.block.shape)) - planned.n_tissue
            if len(read.empty):
                self.reads.unreadable[slide_id] += len(read.empty)
        empty = np.concatenate([read.empty for read in reads])
        size = sum(planned.n_tissue for planned in part)
        return buffer.compact(size, empty) if len(empty) else size

    def _count_slots(self) -> int:
        slot_bytes = self._slot_patches * self._dim * self._dtype.itemsize
        slots = self._settings.buffer_mb * 2**20 // (2 * slot_bytes)
        if slots < 1:
            raise StoreError(
                f"a buffer of {self._settings.buffer_mb} MB cannot hold two blocks of {slot_bytes / 2**20:.1f} MB; "
                f"give buffer_mb={-(-2 * slot_bytes // 2**20)} or more"
            )
        return int(min(slots, max(1, len(self._plan))))


def _plan(slides: Sequence[SlideEmbedding]) -> list[_PlannedBlock]:
    """Read every slide's tissue, and list the blocks that hold some, slide by slide."""
    with ThreadPoolExecutor(METADATA_THREADS) as pool:
        masks = pool.map(SlideEmbedding.read_tissue, slides)
        planned = (
            (slide_number, block, _tissue_bits(mask, block, slide.array.block_shape))
            for slide_number, (slide, mask) in enumerate(zip(slides, masks, strict=True))
            for block in slide.planned(mask)
        )
        return [_PlannedBlock(number, *block) for number, block in enumerate(planned)]


def _tissue_bits(is_tissue: NDArray[np.bool_], block: Block, shape: tuple[int, int]) -> bytes:
    """Return a bit for each patch of the slot; what lies beyond the grid is no tissue."""
    slot = np.zeros(shape, bool)
    slot[: block.shape[0], : block.shape[1]] = is_tissue[block.slices]
    return np.packbits(slot).tobytes()
