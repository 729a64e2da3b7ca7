"""Blocks of a slide: read -> encode -> write, each block one object, written whole and once.

It knows neither dask nor planning: the caller names the blocks.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from featurestore.blocks import Block
from featurestore.embedding.costs import BlockClocks, Costs
from featurestore.embedding.memory_model import WRITERS
from featurestore.embedding.positions import PatchFailure, failed_positions, patches_to_read, positions_of
from featurestore.embedding.quality import set_focus
from featurestore.embedding.stain_fit import slide_normaliser
from featurestore.encoders.protocol import Encoder, PendingVectors, patches_at_once, start_encoding
from featurestore.errors import StoreError
from featurestore.grid import PatchGrid
from featurestore.names import slug
from featurestore.slides.fetch_meter import meter_of
from featurestore.slides.patch_reader import PatchBatch, read_batches
from featurestore.slides.protocol import Slide
from featurestore.slides.read_ahead import read_in_turn
from featurestore.storage.block_array import BlockArray
from featurestore.storage.layout import embedding_path, failure_path
from featurestore.storage.store import Store, StoredGrid
from featurestore.tissue.focus import is_blurred

PROBE_BATCHES = 3
"""Batches that are timed for a dry run's estimate, besides a first one that is not counted."""

BATCHES_AHEAD = 1
"""Batches that a device is given before the vectors of the last one are waited for: it computes one while it copies one."""

T = TypeVar("T")
_ReadBatch = tuple[PatchBatch, NDArray[np.bool_] | None]
"""A batch, and which of its patches are out of focus, where that is judged."""


class ThroughputProbe:
    """Measures seconds per patch of reading and encoding, once, on the first slide that has tissue.

    Parameters
    ----------
    encoders
        All that a patch goes through.
    """

    def __init__(self, encoders: dict[str, Encoder]) -> None:
        self._encoders = encoders
        self._seconds: float | None = None

    def seconds_per_patch(self, slide: Slide, stored: StoredGrid, blocks: Sequence[Block]) -> float:
        """Return the measured value, measuring it first if necessary; 0 as long as no slide had tissue."""
        if self._seconds is None and blocks:
            middle = blocks[len(blocks) // 2]  # the first one may hold little but the edge of the tissue
            grid = stored.grid
            wanted = patches_to_read(stored.is_tissue[middle.slices], grid)
            size = patches_at_once(self._encoders.values())
            batches = read_batches(slide, grid.encoded, middle.coarser(grid.tokens), wanted, size)
            self._encode(next(batches).pixels)  # not timed: buffers and kernels are set up here
            begun, patches = time.perf_counter(), 0
            for batch in islice(batches, PROBE_BATCHES):
                self._encode(batch.pixels)
                patches += len(batch.pixels)
            if patches:
                self._seconds = (time.perf_counter() - begun) / patches
        return self._seconds or 0.0

    def _encode(self, pixels: NDArray[np.uint8]) -> None:
        for encoder in self._encoders.values():
            encoder.encode(pixels)


@dataclass(frozen=True)
class BlockResult:
    """Counts of one block: objects written, patches encoded, patches that have no vector, and what all this cost.

    Costs of a stage that several blocks share come with the block that is finished first. `focus` holds the bits of the
    block's patches where their focus was judged, one byte each in row-major order.
    """

    block: Block
    written: int
    patches: int
    unreadable: int
    costs: Costs = field(default_factory=Costs)
    focus: bytes = b""


def embed_blocks(
    store: Store,
    slide: Slide,
    stored: StoredGrid,
    blocks: dict[Block, tuple[str, ...]],
    encoders: dict[str, Encoder],
    *,
    check_slide: Callable[[], None] = lambda: None,
    retried: bool = False,
    judging_focus: bool = False,
    reading: "BlockReading | None" = None,
) -> Generator[BlockResult, None, None]:
    """Read, encode and write blocks of one slide; reading runs ahead of encoding in a thread.

    Parameters
    ----------
    blocks
        Block -> keys of the encoders that lack it.
    check_slide
        Called after a block's pixels were read and before it is written: raises if the slide is no longer the same.
    retried
        Whether some blocks may have records of earlier failures, which are removed once a block has none.
    judging_focus
        Whether to judge the focus of the patches that are read, see `featurestore.tissue.focus`.
    reading
        Of these blocks, if it has begun already; it is closed at the end.

    Yields
    ------
    BlockResult
        After each block's objects were written.

    Raises
    ------
    StoreError, OSError
        If a block cannot be written. A patch that cannot be read or encoded raises nothing: it is NaN in its block,
        and recorded.
    """
    slide_id, grid = stored.slide_id, stored.grid
    tissue = stored.is_tissue
    arrays = {
        key: _open_array(store, slide_id, grid.spec.key, key)
        for key in {key for keys in blocks.values() for key in keys}
    }
    reading = reading or read_blocks(store, slide, stored, blocks, encoders, judging_focus=judging_focus)
    clocks, of_patches = reading.clocks, reading.of_patches

    def start(item: _ReadBatch) -> tuple[PatchBatch, NDArray[np.bool_] | None, dict[str, PendingVectors]]:
        batch, blurred = item
        keys = blocks[of_patches[batch.block]]
        with clocks.encoding.running():
            started = {key: start_encoding(encoders[key], batch.pixels) for key in keys}
        no_pixels = batch.pixels[:0].copy()  # they are not needed any more
        return replace(batch, pixels=no_pixels), blurred, started

    def write(computed: _ComputedBlock) -> BlockResult:
        n_bytes = n_objects = 0
        for key, values in computed.buffers.items():
            failed = [*computed.failures, *computed.not_finite.get(key, [])]
            n_objects += arrays[key].n_groups
            n_bytes += arrays[key].n_groups * math.prod(arrays[key].object_shape) * values.itemsize
            with clocks.writing.running():
                _commit(store, arrays[key], stored, computed.block, key, values, failed, slide.source)
            if retried and not failed:
                store.location.remove(failure_path(slide_id, grid.spec.key, key, computed.block.index))
        return replace(computed.result(), costs=clocks.take(computed.patches, n_bytes, n_objects))

    writing: deque[Future[BlockResult]] = deque()
    # Across blocks: the first batches of the next block are read and encoded while the last one of this block is
    # computed, and a block is written meanwhile.
    with ThreadPoolExecutor(WRITERS, thread_name_prefix="write") as writers, closing(reading):
        computed = None
        for batch, blurred, started in delayed(map(start, reading), BATCHES_AHEAD):
            block = of_patches[batch.block]
            computed = computed or _ComputedBlock(block, blocks[block])
            with clocks.encoding.running():
                computed.add(batch, started, tissue, grid, encoders)
            if blurred is not None:
                computed.add_focus(batch, blurred, tissue, grid)
            if batch.last:
                check_slide()
                writing.append(writers.submit(write, computed))
                computed = None
                while writing and (writing[0].done() or len(writing) > WRITERS):
                    yield writing.popleft().result()
        while writing:
            yield writing.popleft().result()


class BlockReading:
    """Batches of a slide's blocks, read by threads of their own; they begin with the first batch or by `begin`.

    Parameters
    ----------
    of_patches
        Block of whole patches -> block of the grid that it is for.
    clocks
        Of the slide.
    streams
        What reads the blocks, in their order.
    threads
        That read at once.
    """

    def __init__(
        self,
        of_patches: Mapping[Block, Block],
        clocks: BlockClocks,
        streams: Sequence[Callable[[], Iterator[_ReadBatch]]],
        threads: int,
    ) -> None:
        self.of_patches, self.clocks = of_patches, clocks
        self.all_read = threading.Event()
        """Set once the last batch was read, or nothing more will be; some batches may still wait to be taken."""
        self._left = len(streams)
        self._lock = threading.Lock()
        self._first: list[_ReadBatch] = []
        self._batches = read_in_turn([partial(self._counted, stream) for stream in streams], threads)

    def _counted(self, stream: Callable[[], Iterator[_ReadBatch]]) -> Iterator[_ReadBatch]:
        yield from stream()
        with self._lock:
            self._left -= 1
            if not self._left:
                self.all_read.set()

    def begin(self) -> None:
        """Begin to read, and wait for the first batch."""
        self._first += islice(self._batches, 1)

    def __iter__(self) -> Iterator[_ReadBatch]:
        """Yield the batches; to be called once."""
        while self._first:
            yield self._first.pop()
        yield from self._batches

    def close(self) -> None:
        """Stop the threads: a slide must not be closed while it is read."""
        self._batches.close()
        self.all_read.set()


def read_blocks(
    store: Store,
    slide: Slide,
    stored: StoredGrid,
    blocks: Mapping[Block, tuple[str, ...]],
    encoders: Mapping[str, Encoder],
    *,
    judging_focus: bool = False,
) -> BlockReading:
    """Return what reads the blocks of a slide for `embed_blocks`; the parameters are the same."""
    clocks = BlockClocks(meter_of(slide))
    # What is read are whole patches; on a token grid they hold several positions of the block.
    of_patches = {block.coarser(stored.grid.tokens): block for block in blocks}
    keys = {key for keys in blocks.values() for key in keys}
    stained = [key for key in keys if "stain" in encoders[key].identity.facts]
    normalise = slide_normaliser(store, stored, stained)
    size = patches_at_once(encoders.values())
    reader = _BlockReader(slide, stored, of_patches, size, normalise, judging_focus, clocks)
    threads = max((getattr(encoder, "reading_threads", 1) for encoder in encoders.values()), default=1)
    return BlockReading(of_patches, clocks, reader.streams(threads), threads)


@dataclass(frozen=True)
class _BlockReader:
    """Reads the wanted patches of blocks, and prepares them for the encoders.

    Parameters
    ----------
    of_patches
        Block of whole patches -> block of the grid that it is for.
    size
        Most patches in a batch.
    normalise
        Of the stain; None without.
    """

    slide: Slide
    stored: StoredGrid
    of_patches: Mapping[Block, Block]
    size: int
    normalise: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] | None
    judging_focus: bool
    clocks: BlockClocks

    def streams(self, threads: int) -> list[Callable[[], Iterator[_ReadBatch]]]:
        """Return what reads the blocks, in their order; the first one in parts where several threads read."""
        blocks = list(self.of_patches)
        if threads <= 1 or not blocks:
            return [partial(self._read, block) for block in blocks]
        # A GPU would wait for one thread to read the first block, while the others read what comes after it.
        first, *rest = blocks
        parts = split_positions(self._wanted(first), self.size)
        return [
            *(partial(self._read, first, part, ends=ends) for part, ends in parts),
            *(partial(self._read, block) for block in rest),
        ]

    def _wanted(self, block: Block) -> NDArray[np.bool_]:
        return patches_to_read(self.stored.is_tissue[self.of_patches[block].slices], self.stored.grid)

    def _read(
        self, block: Block, wanted: NDArray[np.bool_] | None = None, *, ends: bool = True
    ) -> Iterator[_ReadBatch]:
        """Read some patches of a block, by default all that are wanted; `ends` if the block's last are among them."""
        wanted = self._wanted(block) if wanted is None else wanted
        batches = read_batches(self.slide, self.stored.grid.encoded, block, wanted, self.size)
        return self.clocks.pixels.timed(self._prepared(batches, ends=ends))

    def _prepared(self, batches: Iterable[PatchBatch], *, ends: bool) -> Iterator[_ReadBatch]:
        # In the threads that read, of which there are several where a GPU encodes. Focus is measured on the slide's own
        # pixels: flags belong to the grid, which encoders with and without stain normalisation share.
        mpp = self.stored.grid.effective_mpp
        for batch in batches:
            blurred = is_blurred(batch.pixels, mpp) if self.judging_focus else None
            pixels = batch.pixels if self.normalise is None else self.normalise(batch.pixels)
            yield replace(batch, pixels=pixels, last=batch.last and ends), blurred


def split_positions(wanted: NDArray[np.bool_], size: int) -> list[tuple[NDArray[np.bool_], bool]]:
    """Split the wanted positions of a block into runs of at most `size`, in row-major order.

    Returns
    -------
    list of (mask, bool)
        Each run as a mask of the block's shape, and whether it is the last one. There is at least one, which may be empty.
    """
    places = np.flatnonzero(wanted)
    n = max(1, math.ceil(len(places) / size))
    parts = [(np.zeros(wanted.shape, bool), number == n - 1) for number in range(n)]
    for number, (part, _) in enumerate(parts):
        part.flat[places[number * size : (number + 1) * size]] = True
    return parts


def delayed(items: Iterable[T], n: int) -> Iterator[T]:
    """Yield items as they come, each after `n` more were taken."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > n:
            yield waiting.popleft()
    yield from waiting


@dataclass
class _ComputedBlock:
    """A block's vectors, as its batches come.

    Parameters
    ----------
    buffers
        Encoder key -> vectors, shape ``(*block.shape, dim)``; NaN where there is none.
    failures, not_finite
        Positions that could not be read; and by encoder key those without a finite vector.
    patches
        Positions with tissue that were read.
    focus
        Bits of the block's positions, where they are judged.
    """

    block: Block
    keys: tuple[str, ...]
    buffers: dict[str, NDArray[np.float16]] = field(default_factory=dict)
    failures: list[PatchFailure] = field(default_factory=list)
    not_finite: dict[str, list[PatchFailure]] = field(default_factory=dict)
    patches: int = 0
    focus: NDArray[np.uint8] | None = None

    def add_focus(
        self, batch: PatchBatch, blurred: NDArray[np.bool_], tissue: NDArray[np.bool_], grid: PatchGrid
    ) -> None:
        """Take which patches of a batch are out of focus."""
        if self.focus is None:
            self.focus = np.zeros(self.block.shape, np.uint8)
        set_focus(self.focus, (self.block.rows[0], self.block.cols[0]), batch, blurred, tissue, grid)

    def add(
        self,
        batch: PatchBatch,
        started: dict[str, PendingVectors],
        tissue: NDArray[np.bool_],
        grid: PatchGrid,
        encoders: Mapping[str, Encoder],
    ) -> None:
        """Take the vectors of a batch, waiting for the device."""
        rows, cols = positions_of(batch, grid)
        # A patch with tissue at one position may have background at others: there the store holds NaN.
        kept = tissue[rows, cols]
        rows, cols = rows[kept], cols[kept]
        for key in self.keys:
            dim = encoders[key].identity.dim
            if key not in self.buffers:
                self.buffers[key] = np.full((*self.block.shape, dim), np.nan, np.float16)
            found = started[key]().reshape(-1, dim)
            vectors, unusable = to_float16(found[kept])
            self.buffers[key][rows - self.block.rows[0], cols - self.block.cols[0]] = vectors
            self.not_finite.setdefault(key, []).extend(
                (int(rows[i]), int(cols[i]), "the encoder gave no finite vector") for i in unusable
            )
        self.patches += len(rows)
        self.failures += failed_positions(batch.failures, tissue, grid)

    def result(self) -> BlockResult:
        """Return the block's counts."""
        # As a set, since a patch without a vector from two encoders is one patch.
        nan = len({(row, col) for rows in self.not_finite.values() for row, col, _ in rows})
        focus = b"" if self.focus is None else self.focus.tobytes()
        return BlockResult(self.block, len(self.keys), self.patches, len(self.failures) + nan, focus=focus)


def check_written(
    store: Store, slide_id: str, grid_key: str, blocks: Mapping[Block, tuple[str, ...]]
) -> None:
    """Check that the blocks that a run has written are still there; one listing for each encoder.

    Parameters
    ----------
    blocks
        Block -> keys of the encoders that it was computed for.

    Raises
    ------
    StoreError
        If some are not: the slide, its grid or its embedding was removed while it was embedded.
    """
    wanted: dict[str, set[tuple[int, int]]] = {}
    for block, keys in blocks.items():
        for key in keys:
            wanted.setdefault(key, set()).add(block.index)
    for key, indices in wanted.items():
        path = embedding_path(slide_id, grid_key, key)
        # Writing makes the folders above an object, so blocks may be there without the array that they belong to.
        is_there = store.location.exists(f"{path}/zarr.json")
        done = BlockArray.open(store.location, path).done() if is_there else set()
        if lost := len(indices - done):
            raise StoreError(
                f"{slide_id}/{grid_key}/{slug(key)} was removed while it was embedded ({lost} blocks are lost); "
                "run the same command again"
            )


def _open_array(store: Store, slide_id: str, grid_key: str, key: str) -> BlockArray:
    try:
        return store.embedding(slide_id, grid_key, key, read_only=False)
    except StoreError as error:  # it was there when the slide was planned
        if isinstance(error, OSError):  # a server or disk refused: it may still be there
            raise
        raise StoreError(
            f"{slide_id}/{grid_key}/{slug(key)} was removed while it was embedded ({error}); run the same command again"
        ) from error


def _commit(
    store: Store,
    array: BlockArray,
    stored: StoredGrid,
    block: Block,
    key: str,
    values: NDArray[np.float16],
    failures: Sequence[PatchFailure],
    source: str,
) -> None:
    path = failure_path(stored.slide_id, stored.grid.spec.key, key, block.index)
    if failures:
        # Before the block: once it exists no run computes it again, so a crash in between would lose the reason.
        store.record_failure(
            path,
            {
                "block": list(block.index),
                "patches": [[row, col] for row, col, _ in failures],
                "reason": failures[0][2],
            },
            [source],
        )
    array.write(block, values)


def to_float16(vectors: NDArray[np.float32]) -> tuple[NDArray[np.float16], NDArray[np.intp]]:
    """Round vectors to the stored dtype.

    Returns
    -------
    (numpy.ndarray, numpy.ndarray)
        The vectors ``(n, dim)``, and the indices of those that hold a number that is not finite in float16: all their
        features are NaN.
    """
    with np.errstate(over="ignore"):  # beyond 65,504 a number becomes infinite, and its vector NaN below
        stored = vectors.astype(np.float16)
    unusable = ~np.isfinite(stored).all(axis=-1)
    stored[unusable] = np.nan
    return stored, np.flatnonzero(unusable)
