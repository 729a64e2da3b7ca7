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

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from featurestore.analysis.selection import AT_ONCE, SlideEmbedding, open_slides
from featurestore.block_cache import BlockCache
from featurestore.blocks import Block
from featurestore.errors import StoreError
from featurestore.halves import nan_rows
from featurestore.raw_blocks import RawBlocks
from featurestore.store import Store

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


class Batch(NamedTuple):
    """Some patches, in the order in which they were drawn.

    Parameters
    ----------
    slide
        Index into `Loader.slide_ids`, ``(n,)``.
    rows, cols
        Places on that slide's grid, ``(n,)``.
    embedding
        ``(n, dim)`` as stored (float16), without NaN.
    """

    slide: NDArray[np.int64]
    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    embedding: NDArray[np.float16]


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


class _Read(NamedTuple):
    """What one slot holds: the patches in it that have an embedding, and how many did not."""

    kept: NDArray[np.int64]
    background: int
    unreadable: int
    there: bool


class Loader:
    """Shuffled batches of patches from the slides of a store, epoch after epoch.

    Iterating gives one epoch, each time another order. Opening reads metadata and tissue, of which about half
    a kilobyte a block stays in memory.

    Parameters
    ----------
    store
        Folder or URL of a feature store. Blocks of a remote one are kept on the local disk, see
        `featurestore.block_cache`.
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
        self._readers = [RawBlocks(slide.array, cache) for slide in self._slides]
        # A grid smaller than a block is stored as a smaller one: it fills a part of its slot.
        self._slot_patches = max(int(np.prod(reader.slot_shape[:2])) for reader in self._readers)
        self._plan = _plan(self._slides)
        self._slots = self._count_slots()
        # Kept from epoch to epoch: new memory costs as much as reading into it.
        self._buffers: list[NDArray[np.float16]] = []
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
            Arrays of its own: they may be kept.
        """
        self.reads = Reads()
        batches = _Cutter(self.settings.batch)
        for pool in self._pools(number):
            yield from batches.cut(*pool)
        if not self.settings.drop_last:
            yield from batches.rest()

    def _pools(self, epoch: int) -> Iterator[tuple["_Pool", NDArray[np.int64]]]:
        """Fill one half of the buffer while the other is used; yield it with the order of its patches."""
        s = self.settings
        order = np.arange(len(self._plan))
        if s.shuffle:
            order = np.random.default_rng([s.seed, epoch]).permutation(order)
        mine = [self._plan[i] for i in order[s.rank :: s.world_size]]
        pools = [mine[i : i + self._slots] for i in range(0, len(mine), self._slots)]
        halves = [self._buffers.pop() if self._buffers else self._buffer() for _ in pools[:2]]
        threads = s.threads or (THREADS_REMOTE if self.is_remote else THREADS_LOCAL)
        fetching: list[list[Future[_Read]]] = []
        with ThreadPoolExecutor(threads) as executor:
            try:
                for pool, half in zip(pools, halves, strict=False):
                    fetching.append(self._begin(executor, pool, half))
                for number, pool in enumerate(pools):
                    half = halves[number % 2]
                    places = self._book(pool, [future.result() for future in fetching[0]])
                    del fetching[0]
                    if s.shuffle:
                        np.random.default_rng([s.seed, epoch, s.rank, number]).shuffle(places)
                    yield _Pool(half, self._corners(pool)), places
                    # What was drawn is gone: threads go on there before the other half is complete.
                    if number + 2 < len(pools):
                        fetching.append(self._begin(executor, pools[number + 2], half))
            finally:
                for future in (futures := [f for some in fetching for f in some]):
                    future.cancel()
                wait(futures)
                self._buffers += halves

    def _buffer(self) -> NDArray[np.float16]:
        return np.empty((self._slots, self._slot_patches, self.dim), self._readers[0].dtype)

    def _begin(
        self, executor: ThreadPoolExecutor, pool: list[_Planned], half: NDArray[np.float16]
    ) -> list[Future[_Read]]:
        return [executor.submit(self._read, planned, half[i]) for i, planned in enumerate(pool)]

    def _read(self, planned: _Planned, slot: NDArray[np.float16]) -> _Read:
        """Fill a slot, and find the patches in it that have an embedding."""
        reader = self._readers[planned.slide]
        rows, cols, _ = reader.slot_shape
        values = slot[: rows * cols]
        tissue = np.unpackbits(np.frombuffer(planned.tissue, np.uint8), count=rows * cols).view(bool)
        n_tissue, area = int(tissue.sum()), int(np.prod(planned.block.shape))
        if not reader.read_into(planned.block, values.reshape(reader.slot_shape)):
            return _Read(np.empty(0, np.int64), 0, 0, there=False)
        kept = np.flatnonzero(tissue & ~nan_rows(values))
        return _Read(kept, area - n_tissue, n_tissue - len(kept), there=True)

    def _book(self, pool: list[_Planned], reads: list[_Read]) -> NDArray[np.int64]:
        """Count what was read, and return where in the pool its patches lie."""
        for planned, read in zip(pool, reads, strict=True):
            slide_id = self._slides[planned.slide].slide_id
            self.reads.blocks += read.there
            self.reads.patches += len(read.kept)
            self.reads.background += read.background
            if read.unreadable:
                self.reads.unreadable[slide_id] += read.unreadable
            if not read.there:
                self.reads.missing[slide_id] += 1
        return np.concatenate([read.kept + i * self._slot_patches for i, read in enumerate(reads)])

    def _corners(self, pool: list[_Planned]) -> NDArray[np.int64]:
        """Return (slide, first row, first col, patches a row) of each slot."""
        shapes = [self._readers[planned.slide].slot_shape for planned in pool]
        return np.array(
            [(p.slide, p.block.rows[0], p.block.cols[0], s[1]) for p, s in zip(pool, shapes, strict=True)]
        )

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
    with ThreadPoolExecutor(AT_ONCE) as pool:
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


class _Pool(NamedTuple):
    """Half of the buffer, ``(slots, patches, dim)``, and its `Loader._corners`."""

    half: NDArray[np.float16]
    corners: NDArray[np.int64]

    def take_into(self, batch: Batch, start: int, places: NDArray[np.int64]) -> None:
        """Copy some patches to a batch, from its patch `start` on."""
        stop = start + len(places)
        slots, within = np.divmod(places, self.half.shape[1])
        slide, row, col, width = self.corners[slots].T
        batch.slide[start:stop] = slide
        batch.rows[start:stop] = row + within // width
        batch.cols[start:stop] = col + within % width
        flat = self.half.reshape(-1, self.half.shape[2])
        # With "clip" numpy writes straight to `out`; "raise" would make a copy first.
        np.take(flat, places, axis=0, out=batch.embedding[start:stop], mode="clip")


NOBODY_ELSE = 2
"""References to an array that only one list holds: that list's, and the counting's own."""
MOST_LENT = 4
"""Batches whose memory is looked at again."""


class _Cutter:
    """Cuts a sequence of pools into batches of one size."""

    def __init__(self, size: int) -> None:
        self._size, self._filled = size, 0
        self._batch: Batch | None = None
        self._lent: list[NDArray[np.float16]] = []

    def cut(self, pool: _Pool, places: NDArray[np.int64]) -> Iterator[Batch]:
        """Yield the batches that a pool completes."""
        start = 0
        while start < len(places):
            if self._batch is None:
                self._batch, self._filled = self._empty(pool.half), 0
            some = places[start : start + self._size - self._filled]
            pool.take_into(self._batch, self._filled, some)
            start, self._filled = start + len(some), self._filled + len(some)
            if self._filled == self._size:
                full, self._batch = self._batch, None
                yield full

    def rest(self) -> Iterator[Batch]:
        """Yield what is left, if anything."""
        if self._batch is not None:
            slide, rows, cols, embedding = self._batch
            n = self._filled
            yield Batch(slide[:n], rows[:n], cols[:n], embedding[:n])

    def _empty(self, half: NDArray[np.float16]) -> Batch:
        slide, rows, cols = (np.empty(self._size, np.int64) for _ in range(3))
        return Batch(slide, rows, cols, self._memory((self._size, half.shape[2]), half.dtype))

    def _memory(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[np.float16]:
        """Return memory for a batch: that of one which nobody holds any more, as new memory costs as much as a copy."""
        for place in range(len(self._lent)):
            if sys.getrefcount(self._lent[place]) == NOBODY_ELSE and self._lent[place].shape == shape:
                return self._lent[place]
        memory = np.empty(shape, dtype)
        self._lent = [*self._lent[1 - MOST_LENT :], memory]
        return memory
