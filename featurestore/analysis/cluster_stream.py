"""The passes of an analysis on a dask cluster: workers read blocks and add up, sums are merged in a tree.

A task reads some blocks of one slide. Which blocks these are, and in which order sums are merged, depends on the store
alone, so the result is the same bits whatever the number of workers, and after a worker died. It differs by rounding from
that of one process, which adds block by block. No patch passes through the scheduler; scores and labels do, a slide's at
a time.

Terms
    piece  the blocks of one task: consecutive blocks of one slide
    part   what a piece adds up to, with its counts
"""

import copy
import os
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import Any, Generic, Literal

import numpy as np
from distributed import Client, Future, KilledWorker
from numpy.typing import NDArray

from featurestore.analysis.patch_stream import (
    PassCounts,
    PatchStream,
    Sum,
    read_ahead,
)
from featurestore.analysis.slide_source import SlideArray, SlideSource
from featurestore.cores import count_cores
from featurestore.embedding.dask_clients import (
    PACKAGE,
    check_version,
    check_versions,
    local_client,
    remote_client,
    scheduler_loss_as_error,
)
from featurestore.errors import ClusterError
from featurestore.events import OnProgress, ignore_progress
from featurestore.software import version
from featurestore.threads import one_blas_thread_in_tasks

PIECE_BLOCKS = 16
"""Blocks of one task: about a slide of 10,000 patches. To merge two matrices of 1,536 x 1,536 doubles takes 0.05 s with the
way between workers, to add up 16 blocks of 1,024 patches about a second."""
PIECES_PER_THREAD = 3
"""Pieces that the scheduler holds at once: one that runs and two that wait, so that no worker idles."""
TREE_PIECES = 64
"""Pieces that workers merge before the sum comes to this process: as many are computed again at most if a worker dies, and
the scheduler never holds more tasks."""
TASK_RETRIES = 2
"""Further tries of a task that raised, as a network does that failed once."""
SCHEDULER_LOST = "the scheduler went away; start it again, and run the same command again"


class ClusterStream(PatchStream):
    """A stream whose passes are made by the workers of a cluster.

    `fold` and `fold_slides`, which all analyses but k-means by mini-batches use, run there; `blocks` reads in this process.

    Parameters
    ----------
    client
        Connected; its workers see the same store as this process.
    source, on_progress
        As for `PatchStream`.

    Raises
    ------
    ClusterError
        If a worker runs another version of this package.
    """

    def __init__(
        self, client: Client, source: SlideSource, on_progress: OnProgress = ignore_progress
    ) -> None:
        check_versions(client)
        super().__init__(source, on_progress)
        self._client = client
        self._job = _Job(uuid.uuid4().hex, version(PACKAGE), source.fixed_to(self.first))

    def fold(self, make: Callable[[], Sum]) -> Sum:
        """Make one pass, and return what it adds up.

        Parameters
        ----------
        make
            Makes an empty sum; it must pickle.

        Raises
        ------
        ClusterError
            If the scheduler goes away, or a slide kills the workers that read it.
        StoreError
            If a block is damaged.
        """
        self._begin_pass()
        total = make()
        with scheduler_loss_as_error(self._client, SCHEDULER_LOST):
            tree = _MergeTree(self._client)
            for _, future in self._completed(make):
                tree.add(future)
                if tree.n_pieces == TREE_PIECES:
                    self._take(total, tree.root())
                    tree = _MergeTree(self._client)
            if tree.n_pieces:
                self._take(total, tree.root())
        self._report(len(self.names))
        return total

    def fold_slides(self, make: Callable[[], Sum]) -> Iterator[tuple[SlideArray, Sum]]:
        """Make one pass, and yield what each slide adds up to, in the order of reading.

        Parameters
        ----------
        make
            Makes an empty sum; it must pickle.

        Raises
        ------
        ClusterError, StoreError
            As for `fold`.
        """
        self._begin_pass()
        with scheduler_loss_as_error(self._client, SCHEDULER_LOST):
            for slide_id, futures in groupby(self._completed(make), key=lambda pair: pair[0].slide_id):
                total = make()
                for _, future in futures:
                    self._take(total, future)
                yield self._opened_slide(slide_id), total
        self._report(len(self.names))

    def _take(self, total: Sum, future: Future) -> None:
        part: _Part[Sum] = future.result()
        total.merge(part.total)
        self.counts.merge(part.counts)

    def _completed(self, make: Callable[[], Sum]) -> Iterator[tuple["_Piece", Future]]:
        """Submit the pieces through a window, and yield them in order, once each is computed."""
        # Sent once, not with each task: centres may have a megabyte. A task and not data that is scattered, since those
        # are lost with the worker that holds them.
        shared = self._client.submit(_unchanged, make, pure=False)
        order = {name: number for number, name in enumerate(self.names)}
        waiting: deque[tuple[_Piece, Future]] = deque()

        def completed() -> tuple[_Piece, Future]:
            piece, future = waiting.popleft()
            try:
                error = future.exception()
                if error is not None:
                    raise error
            except KilledWorker as killed:
                raise ClusterError(
                    f"slide {piece.slide_id!r} kills the processes that read it, probably for lack of memory; give fewer "
                    "--workers, or leave the slide out"
                ) from killed
            self._report(order[piece.slide_id])
            return piece, future

        for number, piece in enumerate(self._pieces()):
            if number % TREE_PIECES == 0:  # workers come and go
                window = PIECES_PER_THREAD * max(1, sum(self._client.nthreads().values()))
            # Not pure: a pass reads the store again, though the arguments may be those of an earlier one.
            future = self._client.submit(_add_up, self._job, shared, piece, pure=False, retries=TASK_RETRIES)
            waiting.append((piece, future))
            if len(waiting) >= window:
                yield completed()
        while waiting:
            yield completed()

    def _pieces(self) -> Iterator["_Piece"]:
        for slide, is_tissue in self._planned():
            indices = [block.index for block in slide.planned(is_tissue)]
            # A slide without tissue is a piece, too: its sum is empty, and belongs to the result.
            for start in range(0, max(len(indices), 1), PIECE_BLOCKS):
                yield _Piece(slide.slide_id, tuple(indices[start : start + PIECE_BLOCKS]))


def connect(workers: int | Literal["auto"] | None, scheduler: str | None) -> AbstractContextManager[Client]:
    """Start worker processes, or connect to a cluster.

    Parameters
    ----------
    workers
        Processes on this machine, each with one thread; ``auto`` is one for each core.
    scheduler
        Instead, the address of a running dask scheduler.

    Raises
    ------
    ClusterError
        If there would be too many processes, or the scheduler does not answer.
    """
    if scheduler is not None:
        return remote_client(scheduler)
    # One thread each, since each adds up with one, see `_add_up`.
    processes = count_cores().cores if workers in ("auto", None) else int(workers)
    return local_client(processes, threads=1)


@dataclass(frozen=True)
class _Job:
    """What the tasks of one stream share: a worker keeps what it opened for a job."""

    key: str
    version: str = field(compare=False)
    source: SlideSource = field(compare=False, repr=False)


@dataclass(frozen=True)
class _Piece:
    """Blocks of one slide, by their indices."""

    slide_id: str
    blocks: tuple[tuple[int, int], ...] = field(repr=False)


@dataclass
class _Part(Generic[Sum]):
    """What some pieces add up to."""

    total: Sum
    counts: PassCounts


class _MergeTree:
    """Merges parts two by two, neighbours first, as a binary counter carries: the order depends on their number alone."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._levels: list[Future | None] = []
        self.n_pieces = 0

    def add(self, future: Future) -> None:
        """Add the next part."""
        self.n_pieces += 1
        for level, earlier in enumerate(self._levels):
            if earlier is None:
                self._levels[level] = future
                return
            future = self._merged(earlier, future)
            self._levels[level] = None
        self._levels.append(future)

    def root(self) -> Future:
        """Return the sum of all parts."""
        # From the last part on, each level holds earlier pieces than the one below it.
        pending = [future for future in self._levels if future is not None]
        merged = pending[0]
        for earlier in pending[1:]:
            merged = self._merged(earlier, merged)
        return merged

    def _merged(self, earlier: Future, later: Future) -> Future:
        return self._client.submit(_merge, earlier, later, pure=False, retries=TASK_RETRIES, priority=1)


# ---------------------------------------------------------------------- on workers


def _unchanged(value: Any) -> Any:
    return value


def _add_up(job: _Job, make: Callable[[], Sum], piece: _Piece) -> _Part[Sum]:
    # Also here, since workers join while a run goes on.
    check_version(version(PACKAGE), job.version, f"process {os.getpid()}")
    slide, is_tissue = _slide(job, piece.slide_id)
    wanted = set(piece.blocks)
    tasks = (
        (slide, block, is_tissue[block.slices]) for block in slide.planned(is_tissue) if block.index in wanted
    )
    part = _Part(make(), PassCounts())
    with one_blas_thread_in_tasks():
        for patches, absent in read_ahead(tasks):
            part.counts.blocks += 1
            part.counts.patches += len(patches.rows)
            part.counts.absent[piece.slide_id] += absent
            part.total.add(patches)
    return part


def _merge(earlier: _Part[Sum], later: _Part[Sum]) -> _Part[Sum]:
    # A copy: dask may still need the part as it is, for another try of this task.
    merged = copy.deepcopy(earlier)
    merged.total.merge(later.total)
    merged.counts.merge(later.counts)
    return merged


@lru_cache(maxsize=8)
def _source(job: _Job) -> SlideSource:
    return job.source


@lru_cache(
    maxsize=64
)  # pieces of one slide follow each other; a slide's tissue map is small beside its blocks
def _slide(job: _Job, slide_id: str) -> tuple[SlideArray, NDArray[np.bool_]]:
    slide = _source(job).open(slide_id, None)
    if slide is None:
        raise ClusterError(
            f"a worker does not find slide {slide_id!r}; it must see the same store as this process"
        )
    return slide, slide.read_tissue()
