"""The tissue patches of a cohort, block by block: every stored block is read once a pass.

Threads read a few blocks ahead while the caller computes. Memory holds those blocks and one slide's tissue map,
however many slides there are. Patches without an embedding are left out, and counted.

Terms
    pass    one reading of every planned block, slides by id, blocks in row-major order
    absent  tissue patches that hold NaN: unreadable, or not embedded yet
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from featurestore.blocks import Block
from featurestore.errors import StoreError
from featurestore.events import OnProgress, Progress, ignore_progress
from featurestore.location import PathOrUrl
from featurestore.storage.selection import SlideEmbedding, open_slides
from featurestore.storage.store import Store

READ_AHEAD = 8
"""Blocks, and threads that read them: of a remote store nearly all of the time is waiting."""
READ_AHEAD_BYTES = 256 * 2**20
"""Limit for the blocks that are read ahead; where blocks are large, fewer than `READ_AHEAD` are."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class PatchBlock(NamedTuple):
    """The tissue patches of one block that have an embedding; there may be none.

    Parameters
    ----------
    slide_id
        The slide.
    rows, cols
        Positions in the slide's grid, ``(n,)``.
    values
        Embeddings, ``(n, dim)`` float32, all finite.
    """

    slide_id: str
    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    values: NDArray[np.float32]


@dataclass
class PassCounts:
    """Counts of the current pass so far: blocks, patches, and the absent patches of each slide."""

    blocks: int = 0
    patches: int = 0
    absent: Counter[str] = field(default_factory=Counter)


class PatchStream:
    """One embedding of some slides, read as many times as an analysis needs. Make one with `open_stream`.

    Parameters
    ----------
    slides
        In the order of reading.
    skipped
        Ids of slides that do not have the embedding.
    on_progress
        Called after each block with the number of slides read, labelled with the number of the pass.
    """

    def __init__(
        self,
        slides: Sequence[SlideEmbedding],
        skipped: Sequence[str] = (),
        on_progress: OnProgress = ignore_progress,
    ) -> None:
        self.slides = tuple(slides)
        self.skipped = tuple(skipped)
        self.passes = 0
        self.counts = PassCounts()
        self._on_progress = on_progress

    @property
    def dim(self) -> int:
        """Features of one patch."""
        return self.slides[0].dim

    @property
    def encoder(self) -> str:
        """Fingerprint of the encoder that made all these embeddings."""
        return str(self.slides[0].encoder["fingerprint"])

    @property
    def read_ahead(self) -> int:
        """Blocks that are read ahead: at least one, and fewer where they are large."""
        patches = max(np.prod(slide.array.block_shape) for slide in self.slides)
        block_bytes = int(patches) * self.dim * (2 + 4)  # float16 as stored, and the float32 made of it
        return max(1, min(READ_AHEAD, READ_AHEAD_BYTES // block_bytes))

    def slide(self, slide_id: str) -> SlideEmbedding:
        """Return a slide of the stream.

        Raises
        ------
        StoreError
            If it is not one of them.
        """
        for slide in self.slides:
            if slide.slide_id == slide_id:
                return slide
        raise StoreError(
            f"there is no slide {slide_id!r} among those analysed: "
            f"{', '.join(s.slide_id for s in islice(self.slides, 20))}"
        )

    def blocks(self) -> Iterator[PatchBlock]:
        """Make one pass.

        Yields
        ------
        PatchBlock
            Every planned block once; one that is not stored yet has no patches.

        Raises
        ------
        StoreError
            If a block is damaged.
        """
        self.passes += 1
        self.counts = PassCounts()
        order = {slide.slide_id: number for number, slide in enumerate(self.slides)}
        with ThreadPoolExecutor(self.read_ahead) as pool:
            # The next slide's tissue is read while the blocks of this one are.
            plans = _run_ahead(pool, _with_tissue, self.slides, 2)
            tasks = (
                (slide, block, is_tissue[block.slices])
                for slide, is_tissue in plans
                for block in slide.planned(is_tissue)
            )
            for patches, absent in _run_ahead(pool, _read, tasks, self.read_ahead):
                self.counts.blocks += 1
                self.counts.patches += len(patches.rows)
                self.counts.absent[patches.slide_id] += absent
                self._report(order[patches.slide_id])
                yield patches
        self._report(len(self.slides))

    def _report(self, done: int) -> None:
        self._on_progress(Progress(done, len(self.slides), f"pass {self.passes}"))

    def by_slide(self) -> Iterator[tuple[SlideEmbedding, Iterator[PatchBlock]]]:
        """Make one pass, slide by slide; a slide without tissue comes with no blocks.

        As with `itertools.groupby`, a slide's blocks must be used before the next slide is requested.
        """
        groups = groupby(self.blocks(), key=lambda patches: patches.slide_id)
        waiting = next(groups, None)
        for slide in self.slides:
            if waiting is None or waiting[0] != slide.slide_id:
                yield slide, iter(())
                continue
            yield slide, waiting[1]
            waiting = next(groups, None)


def open_stream(
    url: PathOrUrl,
    slides: Sequence[str] | None = None,
    *,
    grid: str | None = None,
    encoder: str | None = None,
    on_progress: OnProgress = ignore_progress,
) -> PatchStream:
    """Open one embedding of a cohort; only metadata is read, one request a slide.

    Parameters
    ----------
    url
        Folder or URL of the feature store.
    slides
        Only these; None for all that have the embedding.
    grid, encoder
        Which embedding; needed where the slides have several.
    on_progress
        Called after each block with the number of slides read, labelled with the number of the pass.

    Raises
    ------
    AmbiguousSelectionError
        If several embeddings match; the message lists them.
    StoreError
        If there is no store, or none matches.
    """
    return PatchStream(*open_slides(Store.open(url), slides, grid, encoder), on_progress)


def _with_tissue(slide: SlideEmbedding) -> tuple[SlideEmbedding, NDArray[np.bool_]]:
    return slide, slide.read_tissue()


def _read(task: tuple[SlideEmbedding, Block, NDArray[np.bool_]]) -> tuple[PatchBlock, int]:
    slide, block, is_tissue = task
    rows, cols = np.nonzero(is_tissue)
    values = slide.array.read_block(block)[rows, cols].astype(np.float32)
    # One sum a row is faster than a test of every feature, and as good: float16 values cannot add up to a float32
    # infinity, so the sum is finite exactly where every feature is.
    has_embedding = np.isfinite(values.sum(axis=1))
    absent = int((~has_embedding).sum())
    if absent:
        rows, cols, values = rows[has_embedding], cols[has_embedding], values[has_embedding]
    return PatchBlock(slide.slide_id, rows + block.rows[0], cols + block.cols[0], values), absent


def _run_ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """Map in order, with at most `ahead` results that wait or are being computed."""
    source = iter(items)
    waiting: deque[Future[Result]] = deque()
    try:
        waiting.extend(pool.submit(function, item) for item in islice(source, ahead))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(source, 1))
            yield result
            del result  # else this frame would keep the block alive while it waits for the next one
    finally:
        for future in waiting:
            future.cancel()
