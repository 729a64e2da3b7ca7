"""Embeddings in shuffled batches, straight from a store: what a training loop of your own iterates over.

Whole blocks are fetched by threads into one buffer of fixed size; patches are drawn from the half that is full,
in an order that the seed decides, while the other half is being filled. Memory does not grow with the slides.

    from histosge import stream_batches

    for batch in stream_batches("s3://bucket/store", epochs=3, seed=1):
        loss = network(torch.from_numpy(batch.embedding).float()) ...

Terms
    pool   the blocks that are in memory together: patches are shuffled within it, blocks across the cohort
    slot   the place of one block in the buffer
    rank   one of `world_size` processes; each sees its own part of the blocks
"""

import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from featurestore.blocks import Block
from featurestore.errors import StoreError
from featurestore.storage.block_cache import BlockCache
from featurestore.storage.float16 import rows_without_nan
from featurestore.storage.raw_read import RawBlocks
from featurestore.storage.selection import METADATA_THREADS, SlideEmbedding, open_slides
from featurestore.storage.store import Store
from histosge.data.shuffle_buffer import Batch, BatchCutter, Pool

THREADS_LOCAL, THREADS_REMOTE = 2, 8


@dataclass(frozen=True)
class LoadSettings:
    """How to stream.

    Parameters
    ----------
    batch
        Patches in one batch; the last of an epoch may hold fewer.
    seed
        Same seed, store and rank: the same batches, whatever the threads.
    shuffle
        False gives slides by id, blocks and patches in row-major order.
    drop_last
        Leave out an epoch's incomplete last batch.
    buffer_mb
        Of all blocks in memory, half of it being drawn from while the other is filled.
    threads
        That fetch blocks; None means 2 for a local store and 8 for a remote one.
    rank, world_size
        Which of how many processes this is; parts are disjoint and together the whole.
    """

    batch: int = 1024
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False
    buffer_mb: int = 256
    threads: int | None = None
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is none of 0..{self.world_size - 1}")
        if min(self.batch, self.buffer_mb, 1 if self.threads is None else self.threads) < 1:
            raise ValueError("batch, buffer_mb and threads must be positive")


@dataclass
class Reads:
    """What one epoch has read so far.

    Parameters
    ----------
    blocks, patches
        Blocks read, and patches in them that have an embedding.
    background
        Patches in those blocks that hold no tissue.
    unreadable
        Tissue patches that hold NaN, by slide id.
    missing
        Planned blocks that are not stored, by slide id.
    """

    blocks: int = 0
    patches: int = 0
    background: int = 0
    unreadable: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Planned:
    """One block: which slide's, and its tissue, a bit a patch of the slot."""

    slide: int
    block: Block
    tissue: bytes

    @property
    def n_tissue(self) -> int:
        return int.from_bytes(self.tissue).bit_count()


class _Read(NamedTuple):
    """What came of a block: how many of its patches are in the pool, and the places of those that are not."""

    n_kept: int
    gaps: NDArray[np.int64]
    is_there: bool


class _Filling(NamedTuple):
    """A pool, and the reads that fill it."""

    pool: Pool
    futures: list[Future[_Read]]


class Loader:
    """Shuffled batches of patches from the slides of a store, epoch after epoch.

    Iterating gives one epoch, each time another order. Opening reads metadata and tissue, of which about half
    a kilobyte a block stays in memory.

    Parameters
    ----------
    store
        Folder or URL of a feature store. Blocks of a remote one are kept on the local disk, see
        `featurestore.storage.block_cache`.
    slides
        Only these; all that have the embedding if empty.
    grid, encoder
        Needed where the store holds several.
    settings
        Batch, seed, buffer, rank.

    Raises
    ------
    StoreError
        If there is no store, no such slide or no embedding, or the buffer cannot hold two blocks.

    Examples
    --------
    >>> loader = Loader("s3://bucket/store", settings=LoadSettings(batch=512))  # doctest: +SKIP
    >>> for epoch in range(3):  # doctest: +SKIP
    ...     for slide, rows, cols, embedding in loader:
    ...         step(torch.from_numpy(embedding).float())
    >>> loader.reads.unreadable  # doctest: +SKIP
    Counter({'C4': 3})
    """

    def __init__(
        self,
        store: str,
        slides: Sequence[str] = (),
        *,
        grid: str | None = None,
        encoder: str | None = None,
        settings: LoadSettings | None = None,
    ) -> None:
        self.settings = settings or LoadSettings()
        self._store = Store.open(store)
        self._slides, self.without = open_slides(self._store, list(slides) or None, grid, encoder)
        cache = BlockCache.from_environment() if self.is_remote else None
        self._readers = [slide.array.reader(cache) for slide in self._slides]
        # A grid smaller than a block is stored as a smaller one: it fills a part of its slot.
        self._slot_patches = max(int(np.prod(reader.slot_shape[:2])) for reader in self._readers)
        self._plan = _plan(self._slides)
        self._slots = self._count_slots()
        self._spare: list[Pool] = []
        self._scratch = threading.local()
        # Checksums of blocks that were looked through: the same values need no second look.
        self._without_nan: dict[_Planned, int] = {}
        self._epoch = 0
        self.reads = Reads()

    @property
    def is_remote(self) -> bool:
        """Whether blocks come over a network."""
        return not self._store.location.is_local

    @property
    def slide_ids(self) -> tuple[str, ...]:
        """Slides that are streamed, in the order of `Batch.slide`."""
        return tuple(slide.slide_id for slide in self._slides)

    @property
    def dim(self) -> int:
        """Features of one patch."""
        return self._slides[0].dim

    def __iter__(self) -> Iterator[Batch]:
        """Go through the next epoch."""
        self._epoch += 1
        return self.epoch(self._epoch - 1)

    def epoch(self, number: int) -> Iterator[Batch]:
        """Go through one epoch, counted from 0: the same number gives the same batches.

        Yields
        ------
        Batch
            Nobody else writes to its arrays, so it may be kept; as the embeddings are a piece of half the
            buffer, copy what is to be kept for long.
        """
        self.reads = Reads()
        batches = BatchCutter(self.settings.batch)
        for pool, filled in self._fill_pools(number):
            yield from batches.cut(pool, filled)
        if not self.settings.drop_last:
            yield from batches.rest()

    def _fill_pools(self, epoch: int) -> Iterator[tuple[Pool, int]]:
        """Fill one pool while the other is used; yield it with the number of patches that it holds."""
        s = self.settings
        order = np.arange(len(self._plan))
        if s.shuffle:
            order = np.random.default_rng([s.seed, epoch]).permutation(order)
        parts = self._split([self._plan[i] for i in order[s.rank :: s.world_size]])
        filling: deque[_Filling] = deque()
        with ThreadPoolExecutor(
            s.threads or (THREADS_REMOTE if self.is_remote else THREADS_LOCAL)
        ) as executor:
            try:
                for number, part in enumerate(parts[:2]):
                    filling.append(self._begin(executor, part, (epoch, number)))
                for number, part in enumerate(parts):
                    pool, reads = filling[0].pool, [future.result() for future in filling[0].futures]
                    yield pool, self._book(part, reads, pool)
                    del filling[0]
                    self._return_pool(pool)
                    # What was drawn is gone: threads go on there before the other pool is complete.
                    if number + 2 < len(parts):
                        filling.append(self._begin(executor, parts[number + 2], (epoch, number + 2)))
            finally:
                futures = [future for begun in filling for future in begun.futures]
                for future in futures:
                    future.cancel()
                wait(futures)
                for begun in filling:
                    self._return_pool(begun.pool)

    def _split(self, planned: list[_Planned]) -> list[list[_Planned]]:
        """Cut a list of blocks into parts whose patches fit a pool."""
        parts: list[list[_Planned]] = []
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
        """Patches that a pool has room for."""
        return self._slots * self._slot_patches

    def _free_pool(self) -> Pool:
        """Take a pool that is not in use: memory that is there already, as new memory costs as much as a copy."""
        for number, pool in enumerate(self._spare):
            if not pool.is_lent:
                return self._spare.pop(number)
        return Pool.empty(self._capacity, self.dim, self._readers[0].dtype)

    def _return_pool(self, pool: Pool) -> None:
        # One that a user holds batches of may come free; no more than two are waited for.
        self._spare = [*self._spare[-1:], pool]

    def _begin(self, executor: ThreadPoolExecutor, part: list[_Planned], seed: tuple[int, int]) -> _Filling:
        """Start to fill a pool, every patch at a place that the seed decides."""
        s, pool = self.settings, self._free_pool()
        ends = np.cumsum([planned.n_tissue for planned in part])
        places = np.arange(ends[-1])
        if s.shuffle:
            epoch, number = seed
            np.random.default_rng([s.seed, epoch, s.rank, number]).shuffle(places)
        shares = np.split(places, ends[:-1])
        futures = [
            executor.submit(self._fill, planned, share, pool)
            for planned, share in zip(part, shares, strict=True)
        ]
        return _Filling(pool, futures)

    def _fill(self, planned: _Planned, places: NDArray[np.int64], pool: Pool) -> _Read:
        """Read a block, and put those of its tissue patches that have an embedding in the pool."""
        reader = self._readers[planned.slide]
        rows, cols, dim = reader.slot_shape
        loaded = reader.load(planned.block, self._slot(reader))
        if loaded is None:
            return _Read(0, places, is_there=False)
        tissue = np.unpackbits(np.frombuffer(planned.tissue, np.uint8), count=rows * cols).view(bool)
        values, kept = loaded.values.reshape(rows * cols, dim), np.flatnonzero(tissue)
        gaps = places[:0]
        if loaded.checksum is None or loaded.checksum != self._without_nan.get(planned):
            has = np.isin(kept, rows_without_nan(values, tissue))
            kept, places, gaps = kept[has], places[has], places[~has]
            if loaded.checksum is not None and not len(gaps):
                self._without_nan[planned] = loaded.checksum
        at = planned.block.rows[0] + kept // cols, planned.block.cols[0] + kept % cols
        pool.put(places, planned.slide, at, values if len(kept) == len(values) else values[kept])
        return _Read(len(kept), gaps, is_there=True)

    def _slot(self, reader: RawBlocks) -> NDArray[Any]:
        """Return this thread's place for one block."""
        slot: NDArray[Any] | None = getattr(self._scratch, "slot", None)
        if slot is None:
            slot = self._scratch.slot = np.empty((self._slot_patches, self.dim), reader.dtype)
        return slot[: int(np.prod(reader.slot_shape[:2]))].reshape(reader.slot_shape)

    def _book(self, part: list[_Planned], reads: list[_Read], pool: Pool) -> int:
        """Count what was read, and return how many patches the pool holds."""
        for planned, read in zip(part, reads, strict=True):
            slide_id = self._slides[planned.slide].slide_id
            self.reads.blocks += read.is_there
            self.reads.patches += read.n_kept
            if not read.is_there:
                self.reads.missing[slide_id] += 1
                continue
            self.reads.background += int(np.prod(planned.block.shape)) - planned.n_tissue
            if len(read.gaps):
                self.reads.unreadable[slide_id] += len(read.gaps)
        gaps = np.concatenate([read.gaps for read in reads])
        size = sum(planned.n_tissue for planned in part)
        return pool.close_gaps(size, gaps) if len(gaps) else size

    def _count_slots(self) -> int:
        slot_bytes = self._slot_patches * self.dim * self._readers[0].dtype.itemsize
        slots = self.settings.buffer_mb * 2**20 // (2 * slot_bytes)
        if slots < 1:
            raise StoreError(
                f"a buffer of {self.settings.buffer_mb} MB cannot hold two blocks of {slot_bytes / 2**20:.1f} MB; "
                f"give buffer_mb={-(-2 * slot_bytes // 2**20)} or more"
            )
        return int(min(slots, max(1, len(self._plan))))


def stream_batches(
    store: str,
    slides: Sequence[str] = (),
    *,
    epochs: int = 1,
    grid: str | None = None,
    encoder: str | None = None,
    settings: LoadSettings | None = None,
) -> Iterator[Batch]:
    """Stream shuffled batches of patches from a store, for several epochs: `Loader` in one call.

    Yields
    ------
    Batch
        ``(slide, rows, cols, embedding)``, see there.

    Examples
    --------
    >>> for batch in stream_batches("store.zarr", epochs=2):  # doctest: +SKIP
    ...     step(torch.from_numpy(batch.embedding).float())
    """
    loader = Loader(store, slides, grid=grid, encoder=encoder, settings=settings)
    for number in range(epochs):
        yield from loader.epoch(number)


def _plan(slides: Sequence[SlideEmbedding]) -> list[_Planned]:
    """Read every slide's tissue, and list the blocks that hold some, slide by slide."""
    with ThreadPoolExecutor(METADATA_THREADS) as pool:
        masks = pool.map(SlideEmbedding.read_tissue, slides)
        return [
            _Planned(number, block, _tissue_bits(mask, block, slide.array.block_shape))
            for number, (slide, mask) in enumerate(zip(slides, masks, strict=True))
            for block in slide.planned(mask)
        ]


def _tissue_bits(is_tissue: NDArray[np.bool_], block: Block, shape: tuple[int, int]) -> bytes:
    """Return a bit a patch of the slot; what lies beyond the grid is no tissue."""
    slot = np.zeros(shape, bool)
    slot[: block.shape[0], : block.shape[1]] = is_tissue[block.slices]
    return np.packbits(slot).tobytes()
