"""Embedding on a cluster: dask.distributed carries keys and small results; workers do the rest.

Tasks are fed through a window, so a cohort of any size costs the scheduler the same. Slides take turns. A slide whose
block kills its worker is set aside until the others are done, then tried alone, so that no other slide is blamed.

Terms
    window   blocks that the scheduler holds at once
    suspect  a slide that was there when a worker died
"""

import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import dask
from distributed import Client, Future, KilledWorker, LocalCluster, as_completed
from distributed.client import FutureCancelledError
from distributed.comm import CommClosedError

from featurestore.blocks import Block
from featurestore.embedding.block_task import BlockResult
from featurestore.embedding.plan import EmbedSettings, OnResult, SlideResult, fail_slide, ignore_result
from featurestore.embedding.round_robin import RoundRobin
from featurestore.embedding.worker import (
    Job,
    PermanentFailure,
    PlannedSlide,
    check_encoders,
    embed_block,
    plan_job,
)
from featurestore.errors import ClusterError, SlideError
from featurestore.events import OnProgress, Progress
from featurestore.slides.sample_sheet import Sample
from featurestore.storage.store import Store

THREADS = 2
"""Tasks at once in a local worker: one block is read while another is encoded."""
BLOCKS_A_THREAD = 3
"""Window: blocks that wait or run, per thread of the cluster."""
RETRIES = 2
"""Further tries of a task that raised: a network that failed once."""
DEATHS = 1
"""Further workers that a task may kill before it is given up (local clusters)."""

CONNECT_S = 10
"""A scheduler that does not answer for so long is not there."""
LOOK_AGAIN = 64
"""Tasks after which the cluster's threads are counted anew."""

GONE = "the scheduler went away; every block that is written stays: run the same command again to go on"

Work = tuple[Block, tuple[str, ...]]


@contextmanager
def local_client(workers: int, threads: int = THREADS) -> Iterator[Client]:
    """Start worker processes on this machine, the cores shared out among them.

    Parameters
    ----------
    workers
        Processes.
    threads
        Tasks at once in each.
    """
    _silence()
    share = str(max(1, len(os.sched_getaffinity(0)) // workers))
    settings = {
        "distributed.scheduler.allowed-failures": DEATHS,
        "distributed.nanny.pre-spawn-environ": {"OMP_NUM_THREADS": share, "MKL_NUM_THREADS": share},
        "distributed.admin.system-monitor.gil.enabled": False,
        "distributed.worker.memory.terminate": False,  # a map in memory is no reason to kill a block
    }
    with (
        dask.config.set(settings),
        LocalCluster(
            n_workers=workers, threads_per_worker=threads, dashboard_address=None, silence_logs=50
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


@contextmanager
def remote_client(address: str) -> Iterator[Client]:
    """Connect to a scheduler that runs already.

    Raises
    ------
    ClusterError
        If it does not answer.
    """
    _silence()
    try:
        client = Client(address, timeout=CONNECT_S)
    except (OSError, TimeoutError, ValueError) as error:
        raise ClusterError(f"no scheduler answers at {address} ({type(error).__name__}: {error})") from error
    with client:
        yield client


def _silence() -> None:
    """Keep the library's logs off the terminal: what goes wrong is said by us, in one line."""
    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] in ("distributed", "tornado", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


@dataclass
class _SlideState:
    """One slide under way."""

    job: Job
    todo: int = 0
    done: int = 0
    planned: int = 0
    patches: int = 0
    patches_done: int = 0
    computed: int = 0
    unreadable: int = 0
    waiting: list[Work] = field(default_factory=list)


@dataclass(frozen=True)
class _Task:
    slide_id: str
    work: Work | None


def embed_on_cluster(
    client: Client,
    samples: Sequence[Sample],
    store: str,
    settings: EmbedSettings,
    on_progress: OnProgress,
    on_result: OnResult = ignore_result,
) -> list[SlideResult]:
    """Plan and embed slides on a cluster's workers.

    Parameters
    ----------
    client
        Connected; its workers see the same slides and the same store as this process.
    samples, store, settings, on_progress, on_result
        As for `featurestore.embedding.embed.embed`.

    Returns
    -------
    list of SlideResult
        In the order of `samples`.

    Raises
    ------
    ClusterError
        If the scheduler goes away; what is done stays done.
    FeatureStoreError
        If what is stored was made otherwise.
    """
    with said_when_gone(client):
        return _Run(client, samples, store, settings, on_progress, on_result).results()


@contextmanager
def said_when_gone(client: Client) -> Iterator[None]:
    """Turn whatever a client raises once its scheduler has gone into one line.

    A scheduler that dies while a result is being fetched shows as an `OSError`, as a full disk of a worker does: the
    client knows which it was.

    Raises
    ------
    ClusterError
        If the scheduler is gone.
    """
    try:
        yield
    except (CancelledError, FutureCancelledError, CommClosedError) as error:
        raise ClusterError(GONE) from error
    except OSError as error:
        if client.status == "running":
            raise
        raise ClusterError(GONE) from error


class _Run:
    """One run: feeds the cluster, and books what comes back."""

    def __init__(
        self,
        client: Client,
        samples: Sequence[Sample],
        store: str,
        settings: EmbedSettings,
        on_progress: OnProgress,
        on_result: OnResult,
    ) -> None:
        self._client, self._on_progress, self._on_result = client, on_progress, on_result
        run = uuid.uuid4().hex[:12]
        self._order = [sample.slide_id for sample in samples]
        self._unplanned = (_SlideState(Job(run, store, sample, settings)) for sample in samples)
        self._value(client.submit(check_encoders, Job(run, store, samples[0], settings), pure=False))
        self._store = Store.open_or_create(store)
        self._states: dict[str, _SlideState] = {}
        self._queue: RoundRobin[Work] = RoundRobin()
        self._running: dict[Future, _Task] = {}
        self._suspects: dict[str, _SlideState] = {}
        self._finished: dict[str, SlideResult] = {}
        self._landing = as_completed()
        self._threads, self._landed = 1, 0

    def results(self) -> list[SlideResult]:
        """Run to the end."""
        try:
            self._drain()
            for state in list(self._suspects.values()):
                self._try_alone(state)
        except BaseException:
            if self._client.status == "running":
                with suppress(OSError):
                    self._client.cancel(list(self._running))
            raise
        return [self._finished[slide_id] for slide_id in self._order]

    def _drain(self) -> None:
        self._feed()
        while self._running:
            future = next(self._landing)
            self._land(future)
            self._feed()

    def _feed(self) -> None:
        if self._landed % LOOK_AGAIN == 0:  # workers come and go
            self._threads = max(1, sum(self._client.nthreads().values()))
        threads = self._threads
        plans = sum(task.work is None for task in self._running.values())
        # Slides are planned only as far ahead as keeps the queue from running dry.
        while plans < threads and len(self._queue) < 2 * BLOCKS_A_THREAD * threads:
            state = next(self._unplanned, None)
            if state is None:
                break
            self._states[state.job.sample.slide_id] = state
            self._submit(state, None)
            plans += 1
        while len(self._queue) and len(self._running) - plans < BLOCKS_A_THREAD * threads:
            slide_id, work = self._queue.pop()
            self._submit(self._states[slide_id], work)

    def _submit(self, state: _SlideState, work: Work | None) -> Future:
        slide_id = state.job.sample.slide_id
        options: dict[str, Any] = {"pure": False, "retries": RETRIES}
        if work is None:
            future = self._client.submit(plan_job, state.job, priority=10, **options)
        else:
            future = self._client.submit(embed_block, state.job, *work, **options)
        self._running[future] = _Task(slide_id, work)
        self._landing.add(future)
        return future

    def _land(self, future: Future) -> None:
        self._landed += 1
        task = self._running.pop(future)
        state = self._states[task.slide_id]
        try:
            result = self._value(future)
        except KilledWorker:
            self._suspect(state, task)
            return
        self._book(state, result)

    def _value(self, future: Future) -> Any:
        if future.cancelled():
            raise ClusterError(GONE)
        result = future.result()
        if isinstance(result, PermanentFailure):
            raise result.error
        return result

    def _book(self, state: _SlideState, result: PlannedSlide | BlockResult | SlideResult) -> None:
        slide_id = state.job.sample.slide_id
        if isinstance(result, SlideResult):  # it failed
            self._queue.drop(slide_id)
            if slide_id not in self._finished:
                self._finish(result)
        elif isinstance(result, PlannedSlide):
            state.todo, state.planned, state.patches = len(result.blocks), result.planned, result.patches
            self._queue.add(slide_id, result.blocks.items())
        else:
            state.done += 1
            state.computed += result.written
            state.unreadable += result.unreadable
            state.patches_done += result.patches
            self._on_progress(Progress(state.done, state.todo, slide_id, state.patches_done))
        if state.done == state.todo and slide_id not in self._finished:
            self._finish(
                SlideResult(
                    slide_id,
                    "done",
                    planned=state.planned,
                    computed=state.computed,
                    patches=state.patches,
                    unreadable=state.unreadable,
                )
            )
            del self._states[slide_id]

    def _finish(self, result: SlideResult) -> None:
        self._finished[result.slide_id] = result
        self._on_result(result)

    def _suspect(self, state: _SlideState, task: _Task) -> None:
        """Set a slide aside: its block was there when a worker died, but others were there too."""
        slide_id = task.slide_id
        state.waiting += self._queue.drop(slide_id)
        if task.work is not None:
            state.waiting.insert(0, task.work)
        self._suspects[slide_id] = state

    def _try_alone(self, state: _SlideState) -> None:
        slide_id = state.job.sample.slide_id
        try:
            if not state.todo:
                self._alone(state, None)
                state.waiting += self._queue.drop(slide_id)
            for work in sorted(state.waiting, key=lambda w: w[0].index):
                if slide_id not in self._finished:
                    self._alone(state, work)
        except KilledWorker:
            reason = f"{state.job.sample.slide} kills the process that reads it ({DEATHS + 1} tries, nothing else running)"
            self._finish(fail_slide(self._store, slide_id, SlideError(reason)))

    def _alone(self, state: _SlideState, work: Work | None) -> None:
        future = self._submit(state, work)
        next(self._landing)
        self._running.pop(future)
        self._book(state, self._value(future))
