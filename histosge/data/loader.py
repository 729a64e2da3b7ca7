"""Embeddings in shuffled batches, straight from a store: what a training loop of your own iterates over.

Whole blocks are fetched by threads into one buffer of fixed size; patches are drawn from the half that is full,
in an order that the seed decides, while the other half is being filled. Memory does not grow with the slides.

    from histosge import stream_batches

    for batch in stream_batches("s3://bucket/store", epochs=3, seed=1):
        loss = network(torch.from_numpy(batch.embedding).float()) ...

With targets, batches are of spots: the mean embedding of the patches under each, and its counts.

    targets = SpotTargets.from_samples("cohort.csv", "store.zarr", genes=250)
    for embedding, counts, library, section, spot in Loader("store.zarr", targets=targets):
        ...

A loader has a length, an epoch that can be set, and `as_torch()` for what expects a dataset of torch.

Terms
    pool   the blocks that are in memory together: patches are shuffled within it, blocks across the cohort
    slot   the place of one block in the buffer
    rank   one of `world_size` processes; each sees its own part of the blocks
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, cast, overload

import numpy as np
from numpy.typing import NDArray

from featurestore.blocks import Block
from featurestore.errors import StoreError
from featurestore.storage.block_cache import BlockCache
from featurestore.storage.float16 import rows_without_nan
from featurestore.storage.raw_read import RawBlocks
from featurestore.storage.selection import METADATA_THREADS, SlideEmbedding, open_slides
from featurestore.storage.store import Store
from histosge.data.load_settings import EpochReads, LoadSettings
from histosge.data.shuffle_buffer import Batch, BatchCutter, Pool
from histosge.data.spot_stream import SpotStream
from histosge.data.spot_targets import SpotBatch, SpotTargets

if TYPE_CHECKING:
    from histosge.data.torch_batches import TorchBatches

B = TypeVar("B", Batch, SpotBatch)

THREADS_LOCAL, THREADS_REMOTE = 2, 8


@dataclass(frozen=True)
class _Planned:
    """One block: its place in the plan, which slide's, and its tissue, a bit a patch of the slot."""

    number: int
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


class Loader(Generic[B]):
    """Shuffled batches of patches, or of spots with targets, from the slides of a store, epoch after epoch.

    Iterating gives one epoch, each time another order. Opening reads metadata and tissue, of which about half
    a kilobyte a block stays in memory.

    Parameters
    ----------
    store
        Folder or URL of a feature store. Blocks of a remote one are kept on the local disk, see
        `featurestore.storage.block_cache`.
    slides
        Only these; all that have the embedding (with targets: all sections of theirs) if empty.
    grid, encoder
        Needed where the store holds several; targets know theirs.
    settings
        Batch, seed, buffer, rank.
    targets
        Spots to learn from: batches are then `SpotBatch`, and ranks share the sections in place of the blocks.

    Raises
    ------
    StoreError
        If there is no store, no such slide or no embedding, the buffer cannot hold two blocks, or there are more ranks
        than sections.

    Examples
    --------
    >>> loader = Loader("s3://bucket/store", settings=LoadSettings(batch=512))  # doctest: +SKIP
    >>> for epoch in range(3):  # doctest: +SKIP
    ...     for slide, rows, cols, embedding in loader:
    ...         step(torch.from_numpy(embedding).float())
    >>> loader.reads.unreadable  # doctest: +SKIP
    Counter({'C4': 3})
    """

    @overload
    def __init__(
        self: "Loader[Batch]",
        store: str | Path,
        slides: Sequence[str] = (),
        *,
        grid: str | None = None,
        encoder: str | None = None,
        settings: LoadSettings | None = None,
        targets: None = None,
    ) -> None: ...

    @overload
    def __init__(
        self: "Loader[SpotBatch]",
        store: str | Path,
        slides: Sequence[str] = (),
        *,
        grid: str | None = None,
        encoder: str | None = None,
        settings: LoadSettings | None = None,
        targets: SpotTargets,
    ) -> None: ...

    def __init__(
        self,
        store: str | Path,
        slides: Sequence[str] = (),
        *,
        grid: str | None = None,
        encoder: str | None = None,
        settings: LoadSettings | None = None,
        targets: SpotTargets | None = None,
    ) -> None:
        self.settings = settings or LoadSettings()
        if targets is not None:
            targets = targets.of_slides(slides) if slides else targets
            slides, grid, encoder = targets.slide_ids, targets.grid_key, encoder or targets.encoder_key
        self.targets = targets
        # What a worker needs to open the same anew.
        self._arguments = {"store": str(store), "slides": slides, "grid": grid, "encoder": encoder}
        self._store = Store.open(str(store))
        self._slides, self.without = open_slides(self._store, list(slides) or None, grid, encoder)
        cache = BlockCache.from_environment() if self.is_remote else None
        self._readers = [slide.array.reader(cache) for slide in self._slides]
        # A grid smaller than a block is stored as a smaller one: it fills a part of its slot.
        self._slot_patches = max(int(np.prod(reader.slot_shape[:2])) for reader in self._readers)
        self._spots = None if targets is None else self._spot_stream(targets)
        self._plan = _plan(self._slides) if targets is None else []
        self._slots = self._count_slots() if targets is None else 0
        self._spare: list[Pool] = []
        self._scratch = threading.local()
        # Checksums of blocks that were looked through: the same values need no second look.
        self._without_nan: dict[_Planned, int] = {}
        # Of each planned block, as far as it is known: what an epoch found unreadable is taken off.
        self._n_readable = np.array([planned.n_tissue for planned in self._plan], np.int64)
        self._epoch = 0
        self._reads = EpochReads()

    @property
    def reads(self) -> EpochReads:
        """What the latest epoch has read so far."""
        return self._reads if self._spots is None else self._spots.reads

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

    def __len__(self) -> int:
        """Return the batches of the next epoch: see `n_batches`."""
        return self.n_batches(self._epoch)

    def n_batches(self, epoch: int, n_workers: int = 1) -> int:
        """Return how many batches an epoch has.

        Exact where all patches are readable, or once the epochs so far have read every block: what they found
        unreadable or missing is not counted. Otherwise a few too many.

        Parameters
        ----------
        n_workers
            Processes that share this rank's part, each with an incomplete last batch of its own.
        """
        rank, world_size = self.settings.rank * n_workers, self.settings.world_size * n_workers
        ranks = range(rank, rank + n_workers)
        return sum(self.settings.n_batches(self._n_items(epoch, rank, world_size)) for rank in ranks)

    def _n_items(self, epoch: int, rank: int, world_size: int) -> int:
        """Return the patches, or spots, of one rank's part of an epoch."""
        if self._spots is not None:
            return self._spots.n_spots(epoch, rank, world_size)
        return int(self._n_readable[self._order(epoch, rank, world_size)].sum())

    def set_epoch(self, number: int) -> None:
        """Make the next epoch the one of this number, for a run that is resumed."""
        self._epoch = number

    def __iter__(self) -> Iterator[B]:
        """Go through the next epoch."""
        self._epoch += 1
        return self.epoch(self._epoch - 1)

    def epoch(self, number: int) -> Iterator[B]:
        """Go through one epoch, counted from 0: the same number gives the same batches.

        Yields
        ------
        Batch or SpotBatch
            Nobody else writes to its arrays, so it may be kept; as the embeddings of patches are a piece of half the
            buffer, copy what is to be kept for long.
        """
        batches = self._patch_epoch(number) if self._spots is None else self._spots.epoch(number)
        return cast(Iterator[B], batches)

    def as_torch(self, num_workers: int = 0) -> "TorchBatches[B]":
        """Return the batches as a `torch.utils.data.IterableDataset` of tensors.

        Parameters
        ----------
        num_workers
            Of the `DataLoader` that it is given to. None are needed: blocks are read by threads in any case.

        Examples
        --------
        >>> batches = DataLoader(loader.as_torch(), batch_size=None)  # doctest: +SKIP
        """
        from histosge.data.torch_batches import TorchBatches

        self._check_ranks(self.settings.world_size * max(1, num_workers))
        return TorchBatches(self, num_workers, self._epoch)

    def for_worker(self, worker: int, n_workers: int) -> "Loader[B]":
        """Open the same store anew, for one of several workers that share this rank's part."""
        s = self.settings
        part = replace(s, rank=s.rank * n_workers + worker, world_size=s.world_size * n_workers)
        return _open(self._arguments, part, self.targets)

    def __reduce__(self) -> tuple[Any, ...]:
        # A process that does not inherit memory opens the store for itself.
        return _open, (self._arguments, self.settings, self.targets, self._epoch)

    def _spot_stream(self, targets: SpotTargets) -> SpotStream:
        self._check_ranks(self.settings.world_size)
        # Opened slides come sorted by id.
        place = {slide.slide_id: number for number, slide in enumerate(self._slides)}
        places = [place[section.slide_id] for section in targets.sections]
        slides, readers = [self._slides[i] for i in places], [self._readers[i] for i in places]
        return SpotStream(slides, readers, targets.sections, self.settings, self._n_threads)

    def _check_ranks(self, world_size: int) -> None:
        if self.targets is not None and world_size > len(self.targets.sections):
            raise StoreError(
                f"{len(self.targets.sections)} sections cannot be shared by {world_size} processes, as each needs a "
                "section; start fewer processes or workers"
            )

    @property
    def _n_threads(self) -> int:
        return self.settings.threads or (THREADS_REMOTE if self.is_remote else THREADS_LOCAL)

    def _patch_epoch(self, number: int) -> Iterator[Batch]:
        self._reads = EpochReads()
        batches = BatchCutter(self.settings.batch)
        for pool, filled in self._fill_pools(number):
            yield from batches.cut(pool, filled)
        if not self.settings.drop_last:
            yield from batches.rest()

    def _fill_pools(self, epoch: int) -> Iterator[tuple[Pool, int]]:
        """Fill one pool while the other is used; yield it with the number of patches that it holds."""
        order = self._order(epoch, self.settings.rank, self.settings.world_size)
        parts = self._split([self._plan[i] for i in order])
        filling: deque[_Filling] = deque()
        with ThreadPoolExecutor(self._n_threads) as executor:
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

    def _order(self, epoch: int, rank: int, world_size: int) -> NDArray[np.int64]:
        """Return which planned blocks one rank reads, in the order of an epoch."""
        order = np.arange(len(self._plan))
        if self.settings.shuffle:
            order = np.random.default_rng([self.settings.seed, epoch]).permutation(order)
        return order[rank::world_size]

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
            self._n_readable[planned.number] = read.n_kept
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


def _open(
    arguments: dict[str, Any], settings: LoadSettings, targets: SpotTargets | None, epoch: int = 0
) -> "Loader[Any]":
    loader: Loader[Any] = Loader(**arguments, settings=settings, targets=targets)
    loader.set_epoch(epoch)
    return loader


def stream_batches(
    store: str | Path,
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
        planned = (
            (slide_number, block, _tissue_bits(mask, block, slide.array.block_shape))
            for slide_number, (slide, mask) in enumerate(zip(slides, masks, strict=True))
            for block in slide.planned(mask)
        )
        return [_Planned(number, *block) for number, block in enumerate(planned)]


def _tissue_bits(is_tissue: NDArray[np.bool_], block: Block, shape: tuple[int, int]) -> bytes:
    """Return a bit a patch of the slot; what lies beyond the grid is no tissue."""
    slot = np.zeros(shape, bool)
    slot[: block.shape[0], : block.shape[1]] = is_tissue[block.slices]
    return np.packbits(slot).tobytes()
