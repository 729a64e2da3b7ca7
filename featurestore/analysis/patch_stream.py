"""The tissue patches of a cohort, block by block: every stored block is read once a pass.

Slides are opened as they are read, so a pass over ten thousand begins with the first. Threads read a few blocks ahead while
the caller computes. Memory holds those blocks, one slide's tissue map and the metadata of a limited number of slides.
Patches without a value are left out, and counted.

Terms
    pass    one reading of every planned block, slides by id, blocks in row-major order
    absent  tissue patches that hold NaN: unreadable, or not embedded yet
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby, islice
from threading import Lock
from typing import NamedTuple, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from featurestore.analysis.slide_source import EmbeddingSource, SlideArray, SlideSource
from featurestore.blocks import Block
from featurestore.errors import StoreError
from featurestore.events import OnProgress, Progress, ignore_progress
from featurestore.location import PathOrUrl

READ_AHEAD = 8
"""Blocks, and threads that read them: of a remote store nearly all of the time is waiting."""
READ_AHEAD_BYTES = 256 * 2**20
"""Limit for the blocks that are read ahead; where blocks are large, fewer than `READ_AHEAD` are."""
SLIDES_AHEAD = 4
"""Slides that are opened ahead of the one that is read: two requests each, while its blocks are ten or more."""
OPEN_SLIDES = 256
"""Slides whose metadata is kept for the next pass; with a document of 30 kB each they take a few MB."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class PatchBlock(NamedTuple):
    """The tissue patches of one block that have a value; there may be none.

    Parameters
    ----------
    slide_id
        The slide.
    rows, cols
        Positions in the slide's grid, ``(n,)``.
    values
        Embeddings, or expression of the genes, ``(n, dim)`` float32, all finite.
    """

    slide_id: str
    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    values: NDArray[np.float32]


class PassSum(Protocol):
    """What one pass adds up. Parts of a pass are added up apart, and merged in the order of reading."""

    def add(self, patches: PatchBlock) -> None:
        """Add the patches of one block."""
        ...

    def merge(self, other: Self) -> None:
        """Add what another sum has added up, from blocks that follow those of this one."""
        ...


Sum = TypeVar("Sum", bound=PassSum)


@dataclass
class PassCounts:
    """Counts of the current pass so far: blocks, patches, and the absent patches of each slide."""

    blocks: int = 0
    patches: int = 0
    absent: Counter[str] = field(default_factory=Counter)

    def merge(self, other: "PassCounts") -> None:
        """Add the counts of other blocks."""
        self.blocks += other.blocks
        self.patches += other.patches
        self.absent.update(other.absent)


class PatchStream:
    """One embedding, or the expression maps, of some slides, read as many times as an analysis needs.

    Make one with `open_stream`. It is opened with the first slide that has what is analysed; the others are opened as they
    are read.

    Parameters
    ----------
    source
        Of the slides.
    on_progress
        Called after each block with the number of slides read, labelled with the number of the pass.

    Raises
    ------
    StoreError
        If no slide has what is analysed.
    """

    def __init__(self, source: SlideSource, on_progress: OnProgress = ignore_progress) -> None:
        self.names = tuple(source.names())
        self.passes = 0
        self.counts = PassCounts()
        self._source, self._on_progress = source, on_progress
        self._lock = Lock()
        self._opened: OrderedDict[str, SlideArray] = OrderedDict()
        self._skipped: set[str] = set()
        self.first = self._open_first()

    def _open_first(self) -> SlideArray:
        for name in self.names:
            slide = self._source.open(name, None)
            if slide is not None:
                self._opened[name] = slide
                return slide
            self._skipped.add(name)
        self._source.refuse()
        raise StoreError("no slide has what is to be analysed")

    @property
    def dim(self) -> int:
        """Features of one patch."""
        return self.first.dim

    @property
    def columns(self) -> tuple[str, ...] | None:
        """Names of the features, where they have names: the genes of expression maps."""
        return self.first.columns

    @property
    def encoder(self) -> str:
        """Fingerprint of the encoder that made all these embeddings, or of the model that made the maps."""
        return self.first.fingerprint

    @property
    def skipped(self) -> tuple[str, ...]:
        """Ids of slides that were found to lack what is analysed; complete after a pass."""
        return tuple(sorted(self._skipped))

    @property
    def slides(self) -> tuple[SlideArray, ...]:
        """All slides, opened: a request each."""
        return tuple(slide for slide in map(self._open, self.names) if slide is not None)

    @property
    def read_ahead(self) -> int:
        """Blocks that are read ahead: at least one, and fewer where they are large."""
        return _read_ahead(self.first)

    def slide(self, slide_id: str) -> SlideArray:
        """Return a slide of the stream.

        Raises
        ------
        StoreError
            If it is not one of them.
        """
        slide = self._open(slide_id) if slide_id in self.names else None
        if slide is None:
            raise StoreError(
                f"there is no slide {slide_id!r} among those analysed: {', '.join(islice(self._analysed(), 20))}"
            )
        return slide

    def _analysed(self) -> Iterator[str]:
        return (name for name in self.names if name not in self._skipped)

    def _opened_slide(self, slide_id: str) -> SlideArray:
        slide = self._open(slide_id)
        assert slide is not None
        return slide

    def _open(self, slide_id: str) -> SlideArray | None:
        with self._lock:
            slide = self._opened.get(slide_id)
            if slide is not None:
                self._opened.move_to_end(slide_id)
                return slide
            if slide_id in self._skipped:
                return None
        slide = self._source.open(slide_id, self.first)
        with self._lock:
            if slide is None:
                self._skipped.add(slide_id)
                return None
            self._opened[slide_id] = slide
            if len(self._opened) > OPEN_SLIDES:
                self._opened.popitem(last=False)
        return slide

    def _open_with_tissue(self, slide_id: str) -> tuple[SlideArray, NDArray[np.bool_]] | None:
        slide = self._open(slide_id)
        return None if slide is None else (slide, slide.read_tissue())

    def blocks(self) -> Iterator[PatchBlock]:
        """Make one pass in this process.

        Yields
        ------
        PatchBlock
            Every planned block once; one that is not stored yet has no patches.

        Raises
        ------
        AmbiguousSelectionError, IdentityMismatchError
            If a slide has another embedding than the first.
        StoreError
            If a block is damaged.
        """
        self._begin_pass()
        order = {name: number for number, name in enumerate(self.names)}
        tasks = (
            (slide, block, is_tissue[block.slices])
            for slide, is_tissue in self._planned()
            for block in slide.planned(is_tissue)
        )
        for patches, absent in read_ahead(tasks):
            self.counts.blocks += 1
            self.counts.patches += len(patches.rows)
            self.counts.absent[patches.slide_id] += absent
            self._report(order[patches.slide_id])
            yield patches
        self._report(len(self.names))

    def _planned(self) -> Iterator[tuple[SlideArray, NDArray[np.bool_]]]:
        """Open the slides in order, a few ahead, and read which of their patches are tissue."""
        with ThreadPoolExecutor(SLIDES_AHEAD) as pool:
            yield from filter(None, run_ahead(pool, self._open_with_tissue, self.names, SLIDES_AHEAD))

    def _begin_pass(self) -> None:
        self.passes += 1
        self.counts = PassCounts()

    def _report(self, done: int) -> None:
        self._on_progress(Progress(done, len(self.names), f"pass {self.passes}"))

    def by_slide(self) -> Iterator[tuple[SlideArray, Iterator[PatchBlock]]]:
        """Make one pass in this process, slide by slide; a slide without tissue comes with no blocks.

        As with `itertools.groupby`, a slide's blocks must be used before the next slide is requested.
        """
        groups = groupby(self.blocks(), key=lambda patches: patches.slide_id)
        waiting = next(groups, None)
        for name in self.names:
            if waiting is not None and waiting[0] == name:
                yield self._opened_slide(name), waiting[1]
                waiting = next(groups, None)
            elif (slide := self._open(name)) is not None:
                yield slide, iter(())

    def fold(self, make: Callable[[], Sum]) -> Sum:
        """Make one pass, and return what it adds up.

        Parameters
        ----------
        make
            Makes an empty sum; it must pickle.
        """
        total = make()
        for patches in self.blocks():
            total.add(patches)
        return total

    def fold_slides(self, make: Callable[[], Sum]) -> Iterator[tuple[SlideArray, Sum]]:
        """Make one pass, and yield what each slide adds up to, in the order of reading.

        Parameters
        ----------
        make
            Makes an empty sum; it must pickle.
        """
        for slide, blocks in self.by_slide():
            total = make()
            for patches in blocks:
                total.add(patches)
            yield slide, total


def open_stream(
    url: PathOrUrl,
    slides: Sequence[str] | None = None,
    *,
    grid: str | None = None,
    encoder: str | None = None,
    on_progress: OnProgress = ignore_progress,
) -> PatchStream:
    """Open one embedding of a cohort: one listing, and the metadata of its first slide.

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
        If several embeddings match; the message lists them. Of slides after the first it is raised as they are read.
    StoreError
        If there is no store, or none matches.
    """
    return PatchStream(EmbeddingSource(url, slides, grid, encoder), on_progress)


BlockTask = tuple[SlideArray, Block, NDArray[np.bool_]]
"""A slide, a block of it, and which of the block's patches are tissue."""


def read_ahead(tasks: Iterable[BlockTask]) -> Iterator[tuple[PatchBlock, int]]:
    """Read blocks in order, a few ahead of the one that is used; yield their patches, and how many are absent."""
    source = iter(tasks)
    first = next(source, None)
    if first is None:
        return
    ahead = _read_ahead(first[0])
    with ThreadPoolExecutor(ahead) as pool:
        yield from run_ahead(pool, _read, _chained(first, source), ahead)


def _chained(first: BlockTask, others: Iterator[BlockTask]) -> Iterator[BlockTask]:
    yield first
    yield from others


def _read_ahead(slide: SlideArray) -> int:
    patches = int(np.prod(slide.array.block_shape))
    block_bytes = patches * slide.dim * (2 + 4)  # float16 as stored, and the float32 made of it
    return max(1, min(READ_AHEAD, READ_AHEAD_BYTES // block_bytes))


def _read(task: BlockTask) -> tuple[PatchBlock, int]:
    slide, block, is_tissue = task
    rows, cols = np.nonzero(is_tissue)
    values = slide.array.read_block(block)[rows, cols].astype(np.float32)
    # One sum a row is faster than a test of every feature, and as good: float16 values cannot add up to a float32
    # infinity, so the sum is finite exactly where every feature is.
    has_value = np.isfinite(values.sum(axis=1))
    absent = int((~has_value).sum())
    if absent:
        rows, cols, values = rows[has_value], cols[has_value], values[has_value]
    return PatchBlock(slide.slide_id, rows + block.rows[0], cols + block.cols[0], values), absent


def run_ahead(
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
