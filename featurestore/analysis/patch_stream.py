"""The tissue patches of a cohort, block by block: every stored block is read once a pass.

A few blocks are read ahead by threads, while the caller computes. What is held is those blocks and one slide's
tissue map, however many slides there are. Patches without an embedding are left out, and counted.

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
BUDGET_BYTES = 256 * 2**20
"""What blocks read ahead may take; fewer are read ahead where blocks are large."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class PatchBlock(NamedTuple):
    """The tissue patches of one block that have an embedding; there may be none.

    Parameters
    ----------
    slide_id
        Whose.
    rows, cols
        Places on the slide's grid, ``(n,)``.
    values
        Embeddings, ``(n, dim)`` float32, all finite.
    """

    slide_id: str
    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    values: NDArray[np.float32]


@dataclass
class Reads:
    """What one pass has read so far: blocks, patches, and the absent patches of each slide."""

    blocks: int = 0
    patches: int = 0
    absent: Counter[str] = field(default_factory=Counter)


class PatchStream:
    """One embedding of some slides, to be read as often as an analysis needs. Make one with `open_stream`.

    Parameters
    ----------
    slides
        In the order of reading.
    without
        Slides that were left out since they lack the embedding.
    on_progress
        Called while slides go by, labelled with the number of the pass.
    """

    def __init__(
        self,
        slides: Sequence[SlideEmbedding],
        without: Sequence[str] = (),
        on_progress: OnProgress = ignore_progress,
    ) -> None:
        self.slides = tuple(slides)
        self.without = tuple(without)
        self.passes = 0
        self.reads = Reads()
        self._on_progress = on_progress

    @property
    def dim(self) -> int:
        """Features of one patch."""
        return self.slides[0].dim

    @property
    def encoder(self) -> str:
        """Fingerprint of the encoder that made every embedding here."""
        return str(self.slides[0].encoder["fingerprint"])

    @property
    def ahead(self) -> int:
        """Blocks read ahead: fewer where they are large, at least one."""
        patches = max(np.prod(slide.array.block_shape) for slide in self.slides)
        block_bytes = int(patches) * self.dim * (2 + 4)  # float16 as stored, and the float32 made of it
        return max(1, min(READ_AHEAD, BUDGET_BYTES // block_bytes))

    def slide(self, slide_id: str) -> SlideEmbedding:
        """Return a slide of the stream."""
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
            Every planned block once; of one that is not stored yet, no patches.
        """
        self.passes += 1
        self.reads = Reads()
        order = {slide.slide_id: number for number, slide in enumerate(self.slides)}
        with ThreadPoolExecutor(self.ahead) as pool:
            plans = _run_ahead(pool, _with_tissue, self.slides, 2)
            tasks = (
                (slide, block, is_tissue[block.slices])
                for slide, is_tissue in plans
                for block in slide.planned(is_tissue)
            )
            for patches, absent in _run_ahead(pool, _read, tasks, self.ahead):
                self.reads.blocks += 1
                self.reads.patches += len(patches.rows)
                self.reads.absent[patches.slide_id] += absent
                self._report(order[patches.slide_id])
                yield patches
        self._report(len(self.slides))

    def _report(self, done: int) -> None:
        self._on_progress(Progress(done, len(self.slides), f"pass {self.passes}"))

    def by_slide(self) -> Iterator[tuple[SlideEmbedding, Iterator[PatchBlock]]]:
        """Make one pass, slide by slide; a slide without tissue comes with no blocks.

        A slide's blocks must be taken before the next slide is asked for, as with `itertools.groupby`.
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
        Only these; all that have the embedding if left out.
    grid, encoder
        Which embedding; needed when the slides hold several.
    on_progress
        Told after each slide of a pass.

    Raises
    ------
    AmbiguousSelectionError
        If several embeddings fit; the message lists them.
    StoreError
        If there is no store, or none fits.
    """
    return PatchStream(*open_slides(Store.open(url), slides, grid, encoder), on_progress)


def _with_tissue(slide: SlideEmbedding) -> tuple[SlideEmbedding, NDArray[np.bool_]]:
    return slide, slide.read_tissue()


def _read(task: tuple[SlideEmbedding, Block, NDArray[np.bool_]]) -> tuple[PatchBlock, int]:
    slide, block, is_tissue = task
    rows, cols = np.nonzero(is_tissue)
    values = slide.array.read_block(block)[rows, cols].astype(np.float32)
    # float16 cannot add up to a float32 infinity: the sum is finite exactly where every feature is.
    there = np.isfinite(values.sum(axis=1))
    absent = int((~there).sum())
    if absent:
        rows, cols, values = rows[there], cols[there], values[there]
    return PatchBlock(slide.slide_id, rows + block.rows[0], cols + block.cols[0], values), absent


def _run_ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """Map in order, with at most `ahead` results waiting or in the making."""
    source = iter(items)
    waiting: deque[Future[Result]] = deque()
    try:
        waiting.extend(pool.submit(function, item) for item in islice(source, ahead))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(source, 1))
            yield result
            del result  # else it would be held while the next one is waited for
    finally:
        for future in waiting:
            future.cancel()
