"""Blocks of a slide are read ahead: threads read, decode and cut batches of patches while others are encoded."""

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from featurestore.blocks import Block
from featurestore.embedding.costs import BlockClocks
from featurestore.embedding.positions import patches_to_read
from featurestore.embedding.stain_fit import slide_normaliser
from featurestore.encoders.protocol import Encoder, patches_at_once
from featurestore.slides.fetch_meter import meter_of
from featurestore.slides.patch_reader import PatchBatch, read_batches
from featurestore.slides.protocol import Slide
from featurestore.slides.read_ahead import read_in_turn
from featurestore.storage.store import Store, StoredGrid
from featurestore.tissue.focus import is_blurred

ReadBatch = tuple[PatchBatch, NDArray[np.bool_] | None]
"""A batch, and which of its patches are out of focus, where that is judged."""


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
        streams: Sequence[Callable[[], Iterator[ReadBatch]]],
        threads: int,
    ) -> None:
        self.of_patches, self.clocks = of_patches, clocks
        self.all_read = threading.Event()
        """Set once the last batch was read, or nothing more will be; some batches may still wait to be taken."""
        self._left = len(streams)
        self._lock = threading.Lock()
        self._first: list[ReadBatch] = []
        self._batches = read_in_turn([partial(self._counted, stream) for stream in streams], threads)

    def _counted(self, stream: Callable[[], Iterator[ReadBatch]]) -> Iterator[ReadBatch]:
        yield from stream()
        with self._lock:
            self._left -= 1
            if not self._left:
                self.all_read.set()

    def begin(self) -> None:
        """Begin to read, and wait for the first batch."""
        self._first += islice(self._batches, 1)

    def __iter__(self) -> Iterator[ReadBatch]:
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

    def streams(self, threads: int) -> list[Callable[[], Iterator[ReadBatch]]]:
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
    ) -> Iterator[ReadBatch]:
        """Read some patches of a block, by default all that are wanted; `ends` if the block's last are among them."""
        wanted = self._wanted(block) if wanted is None else wanted
        batches = read_batches(self.slide, self.stored.grid.encoded, block, wanted, self.size)
        return self.clocks.pixels.timed(self._prepared(batches, ends=ends))

    def _prepared(self, batches: Iterable[PatchBatch], *, ends: bool) -> Iterator[ReadBatch]:
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
