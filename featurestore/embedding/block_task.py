"""Blocks of a slide: read -> encode -> write, each block one object, written whole and once.

It knows neither dask nor planning: the caller names the blocks.
"""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from featurestore.blocks import Block
from featurestore.embedding.block_reading import BlockReading, ReadBatch, read_blocks
from featurestore.embedding.costs import Costs
from featurestore.embedding.memory_model import WRITERS
from featurestore.embedding.positions import PatchFailure, failed_positions, positions_of
from featurestore.embedding.quality import set_focus
from featurestore.encoders.protocol import Encoder, PendingVectors, start_encoding
from featurestore.errors import StoreError
from featurestore.grid import PatchGrid
from featurestore.names import slug
from featurestore.slides.patch_reader import PatchBatch
from featurestore.slides.protocol import Slide
from featurestore.storage.block_array import BlockArray
from featurestore.storage.float16 import to_float16
from featurestore.storage.layout import embedding_path, failure_path
from featurestore.storage.store import Store, StoredGrid

BATCHES_AHEAD = 1
"""Batches that a device is given before the vectors of the last one are waited for: it computes one while it copies one."""

T = TypeVar("T")


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
    reading: BlockReading | None = None,
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

    def start(item: ReadBatch) -> tuple[PatchBatch, NDArray[np.bool_] | None, dict[str, PendingVectors]]:
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
