"""Embedding on a cluster: dask.distributed carries keys and small results; workers do the rest.

Tasks are submitted through a window, so a cohort of any size costs the scheduler the same. Slides take turns. When a
task is given up because its workers died, its slide is quarantined until the others are done, and then retried with
nothing else running: only then is it certain which slide kills workers.

Terms
    window      blocks that the scheduler holds at once
    quarantine  slides with a block that was running when workers died; one of them is the cause
"""

import logging
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import dask
from distributed import Client, Future, KilledWorker, Nanny, Scheduler, SpecCluster, as_completed
from distributed.client import FutureCancelledError
from distributed.comm import CommClosedError
from distributed.diagnostics.plugin import WorkerPlugin

from featurestore.blocks import Block
from featurestore.cores import count_cores
from featurestore.embedding.block_task import BlockResult, check_written
from featurestore.embedding.costs import Costs
from featurestore.embedding.gpu_sharing import (
    MAX_GPU_THREADS,
    auto_workers,
    visible_gpus,
    worker_environments,
)
from featurestore.embedding.limits import check_address, check_dashboard, check_workers
from featurestore.embedding.memory_model import memory_bytes
from featurestore.embedding.plan import EmbedSettings, show_remark
from featurestore.embedding.round_robin import RoundRobin
from featurestore.embedding.slide_result import (
    OnResult,
    SlideResult,
    fail_slide,
    ignore_result,
    settle_mismatches,
)
from featurestore.embedding.worker import (
    Job,
    PermanentFailure,
    PlannedSlide,
    check_encoders,
    embed_block,
    plan_job,
)
from featurestore.errors import ClusterError, SlideError, StoreError
from featurestore.events import OnProgress, Progress
from featurestore.file_systems import anonymous_settings
from featurestore.slides.sample_sheet import Sample
from featurestore.storage.store import Store

THREADS_PER_WORKER = 2
"""Tasks at once in a local worker: one block is read while another is encoded."""
BLOCKS_PER_THREAD = 3
"""Size of the window: one block that runs, and two that wait, so that no worker idles while a result travels."""
TASK_RETRIES = 2
"""Further tries of a task that raised, as a network does that failed once. Deaths of workers do not count here."""
ALLOWED_WORKER_DEATHS = 1
"""Further workers that a task may lose before dask gives it up. Of a remote scheduler its own setting counts."""

CONNECT_TIMEOUT_S = 10
"""A scheduler that does not answer for so long is taken for not running."""
THREAD_COUNT_INTERVAL = 64
"""Completed tasks between two counts of the cluster's threads: a count is a request to the scheduler."""

SCHEDULER_LOST = (
    "the scheduler went away; every block that is written stays: run the same command again to go on"
)

BlockWork = tuple[Block, tuple[str, ...]]
"""A block, and the keys of the encoders that lack it."""


LOOPBACK = "127.0.0.1"


@contextmanager
def local_client(
    workers: int, threads: int | None = None, *, gpus: Sequence[str] = (), dashboard: int | None = None
) -> Iterator[Client]:
    """Start worker processes on this machine; each gets an equal share of the cores.

    Parameters
    ----------
    workers
        Processes.
    threads
        Tasks at once in each; by default `THREADS_PER_WORKER`, and with a GPU as many as the cores allow that read for it.
    gpus
        Names of the GPUs that the workers share, as `visible_gpus` returns them. Each worker sees one of them alone, also
        after it died and was started again.
    dashboard
        Port of dask's dashboard, which only this machine can reach; None for no dashboard.

    Yields
    ------
    distributed.Client
        Connected; the processes end with the context.
    """
    check_workers(workers)
    _mute_library_logs()
    counted = count_cores()
    cores = max(1, min(counted.cores // workers, counted.threads))
    if threads is None:
        threads = max(THREADS_PER_WORKER, min(cores, MAX_GPU_THREADS)) if gpus else THREADS_PER_WORKER
    # Otherwise every process computes with as many threads as there are cores, and they get in each other's way.
    thread_limits = {"OMP_NUM_THREADS": str(cores), "MKL_NUM_THREADS": str(cores)}
    settings = {
        "distributed.scheduler.allowed-failures": ALLOWED_WORKER_DEATHS,
        "distributed.nanny.pre-spawn-environ": thread_limits,
        "distributed.admin.system-monitor.gil.enabled": False,
        # Files that are mapped into memory count as the process's own, and are no reason to kill it.
        "distributed.worker.memory.terminate": False,
    }
    common = {
        "host": LOOPBACK,
        "protocol": "tcp://",
        "nthreads": threads,
        "memory_limit": memory_bytes() // workers,
        "dashboard": False,
        "silence_logs": 50,
    }
    # Not LocalCluster, whose workers all get the same options: a nanny passes its own environment to each process that
    # it starts, the first and those after a death, before the process imports anything of ours.
    specs = {
        number: {"cls": Nanny, "options": {**common, "env": environment}}
        for number, environment in enumerate(worker_environments(gpus, workers))
    }
    scheduler = {
        "cls": Scheduler,
        "options": {
            "host": LOOPBACK,
            "protocol": "tcp://",
            "port": 0,
            "dashboard": dashboard is not None,
            # Without a dashboard there is an HTTP server all the same: on any free port, and for this machine alone.
            "dashboard_address": f"{LOOPBACK}:{dashboard or 0}",
        },
    }
    with (
        # A nanny sets them in this process, too, where they would stay.
        _restored_environment(thread_limits),
        dask.config.set(settings),
        SpecCluster(workers=specs, scheduler=scheduler, silence_logs=50) as cluster,
        Client(cluster) as client,
    ):
        yield client


def gpu_client(
    workers: int | Literal["auto"], device: str = "auto", dashboard: int | None = None
) -> AbstractContextManager[Client]:
    """Start worker processes on this machine, each with a GPU of its own where there are GPUs; see `local_client`.

    Parameters
    ----------
    workers
        Processes; ``auto`` is one for each GPU that is visible, or one for every two cores. More than there are GPUs share
        them.
    device
        ``cpu`` if no GPU is to be used.
    dashboard
        Port of dask's dashboard.

    Raises
    ------
    ClusterError
        If there would be too many processes, or the dashboard cannot be shown.
    """
    if dashboard is not None:
        check_dashboard(dashboard)
    gpus = () if device == "cpu" else visible_gpus()
    if workers == "auto":
        workers = auto_workers(gpus, count_cores().cores)
    return local_client(workers, gpus=gpus, dashboard=dashboard)


@contextmanager
def _restored_environment(names: Iterable[str]) -> Iterator[None]:
    """Give variables of this process their values back at the end."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


class _AnonymousAccess(WorkerPlugin):  # type: ignore[misc]  # distributed has no types
    """Gives the workers of a running cluster this process's `anonymous_access`, while its client is connected.

    Local workers inherit the environment; those of a scheduler have one of their own.
    """

    name = "histosge-anonymous-access"

    def __init__(self, settings: dict[str, str]) -> None:
        self._settings = settings
        self._before: dict[str, str | None] = {}

    def setup(self, worker: Any) -> None:
        """Set the variables."""
        self._before = {name: os.environ.get(name) for name in self._settings}
        os.environ.update(self._settings)

    def teardown(self, worker: Any) -> None:
        """Set them back."""
        _set_environment(self._before)


@contextmanager
def remote_client(address: str) -> Iterator[Client]:
    """Connect to a scheduler that runs already.

    Yields
    ------
    distributed.Client
        Connected.

    Raises
    ------
    ClusterError
        If it does not answer.
    """
    check_address(address)
    _mute_library_logs()
    try:
        client = Client(address, timeout=CONNECT_TIMEOUT_S)
    # TypeError and RuntimeError: tls without certificates, ucx without its package.
    except (OSError, TimeoutError, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise ClusterError(f"no scheduler answers at {address} ({type(error).__name__}: {error})") from error
    with client:
        settings = anonymous_settings()
        if settings:
            client.register_plugin(_AnonymousAccess(settings))
        try:
            yield client
        finally:
            if settings and client.status == "running":
                client.unregister_worker_plugin(_AnonymousAccess.name)


def _mute_library_logs() -> None:
    """Keep the logs of dask off the terminal: an error of a run is one line of ours."""
    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] in ("distributed", "tornado", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


@dataclass
class _SlideState:
    """Progress of one slide.

    Parameters
    ----------
    n_blocks, n_done
        Blocks that this run has to compute, and those that it has computed.
    n_planned, n_written
        Objects that belong in the store, and those that this run wrote, over all encoders.
    n_patches, n_patches_done, n_unreadable
        Tissue patches of the slide; those in the computed blocks; those of them that have no vector.
    costs
        Of what is done.
    fingerprint
        Of the slide's file as it was planned.
    blocks
        All that this run has to compute.
    deferred
        Blocks to run once the slide is retried in isolation.
    """

    job: Job
    fingerprint: str = ""
    blocks: tuple[BlockWork, ...] = ()
    n_blocks: int = 0
    n_done: int = 0
    n_planned: int = 0
    n_written: int = 0
    n_patches: int = 0
    n_patches_done: int = 0
    n_unreadable: int = 0
    costs: Costs = field(default_factory=Costs)
    deferred: list[BlockWork] = field(default_factory=list)


@dataclass(frozen=True)
class _Task:
    """A submitted task: one block of a slide, or the planning of the slide where `work` is None."""

    slide_id: str
    work: BlockWork | None


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
    with scheduler_loss_as_error(client):
        return _Run(client, samples, store, settings, on_progress, on_result).results()


@contextmanager
def scheduler_loss_as_error(client: Client, message: str = SCHEDULER_LOST) -> Iterator[None]:
    """Raise a `ClusterError` for each of the errors that a client raises once its scheduler is lost.

    Parameters
    ----------
    message
        Of the error: what happened, and what to do.

    Raises
    ------
    ClusterError
        If the scheduler went away.
    """
    try:
        yield
    except (CancelledError, FutureCancelledError, CommClosedError) as error:
        raise ClusterError(message) from error
    except OSError as error:
        # A scheduler that dies while a result is fetched shows as an OSError, and so does a worker's full disk.
        if client.status == "running":
            raise
        raise ClusterError(message) from error


class _Run:
    """One run: submits tasks, and records their results."""

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
        self._slide_ids = [sample.slide_id for sample in samples]
        self._to_plan = (_SlideState(Job(run, store, sample, settings)) for sample in samples)
        # Before the store is made: a mistyped encoder must leave nothing behind.
        self._result_of(client.submit(check_encoders, Job(run, store, samples[0], settings), pure=False))
        self._store = Store.open_or_create(store)
        self._states: dict[str, _SlideState] = {}
        self._queue: RoundRobin[BlockWork] = RoundRobin()
        self._running: dict[Future, _Task] = {}
        self._quarantined: dict[str, _SlideState] = {}
        self._finished: dict[str, SlideResult] = {}
        self._completions = as_completed()
        self._n_threads, self._n_completed = 1, 0

    def results(self) -> list[SlideResult]:
        """Run all slides, and return their results in the order of the samples."""
        try:
            self._run_until_idle()
            for state in list(self._quarantined.values()):
                self._retry_in_isolation(state)
        except BaseException:
            # Also on Ctrl-C: what is queued on a shared cluster would run on without us.
            if self._client.status == "running":
                with suppress(OSError):
                    self._client.cancel(list(self._running))
            raise
        results = [self._finished[slide_id] for slide_id in self._slide_ids]
        settle_mismatches(self._store, results)
        return results

    def _run_until_idle(self) -> None:
        self._fill_window()
        while self._running:
            future = next(self._completions)
            self._handle_completed(future)
            self._fill_window()

    def _fill_window(self) -> None:
        if self._n_completed % THREAD_COUNT_INTERVAL == 0:  # workers come and go
            self._n_threads = max(1, sum(self._client.nthreads().values()))
        window = BLOCKS_PER_THREAD * self._n_threads
        n_plans = sum(task.work is None for task in self._running.values())
        # Planned only as far ahead as keeps two windows queued: the queue must not grow with the cohort.
        while n_plans < self._n_threads and len(self._queue) < 2 * window:
            state = next(self._to_plan, None)
            if state is None:
                break
            self._states[state.job.sample.slide_id] = state
            self._submit(state, None)
            n_plans += 1
        while len(self._queue) and len(self._running) - n_plans < window:
            slide_id, work = self._queue.pop()
            self._submit(self._states[slide_id], work)

    def _submit(self, state: _SlideState, work: BlockWork | None) -> Future:
        slide_id = state.job.sample.slide_id
        # Not pure: a block that is retried in isolation must be a new task, not the one that dask has given up.
        options: dict[str, Any] = {"pure": False, "retries": TASK_RETRIES}
        if work is None:
            # Ahead of blocks, since a plan is what gives the other threads work.
            future = self._client.submit(plan_job, state.job, priority=10, **options)
        else:
            future = self._client.submit(embed_block, state.job, state.fingerprint, *work, **options)
        self._running[future] = _Task(slide_id, work)
        self._completions.add(future)
        return future

    def _handle_completed(self, future: Future) -> None:
        self._n_completed += 1
        task = self._running.pop(future)
        state = self._states[task.slide_id]
        try:
            result = self._result_of(future)
        except KilledWorker:
            self._quarantine(state, task)
            return
        self._record_result(state, result)

    def _result_of(self, future: Future) -> Any:
        if future.cancelled():
            raise ClusterError(SCHEDULER_LOST)
        result = future.result()
        if isinstance(result, PermanentFailure):
            raise result.error
        return result

    def _record_result(self, state: _SlideState, result: PlannedSlide | BlockResult | SlideResult) -> None:
        slide_id = state.job.sample.slide_id
        if isinstance(result, SlideResult):  # the slide failed; several of its blocks may say so
            self._queue.drop(slide_id)
            if slide_id not in self._finished:
                self._finish(replace(result, costs=state.costs))
        elif isinstance(result, PlannedSlide):
            show_remark(result.remark)
            state.n_blocks, state.n_planned = len(result.blocks), result.planned
            state.n_patches, state.fingerprint = result.patches, result.fingerprint
            state.blocks = tuple(result.blocks.items())
            state.costs += result.costs
            self._queue.add(slide_id, state.blocks)
        else:
            state.n_done += 1
            state.n_written += result.written
            state.n_unreadable += result.unreadable
            state.n_patches_done += result.patches
            state.costs += result.costs
            self._on_progress(Progress(state.n_done, state.n_blocks, slide_id, state.n_patches_done))
        if state.n_done == state.n_blocks and slide_id not in self._finished:
            self._finish(self._check_done(state))
            del self._states[slide_id]

    def _check_done(self, state: _SlideState) -> SlideResult:
        """Return the result of a slide whose blocks were all computed: done, if they are still there."""
        slide_id = state.job.sample.slide_id
        if state.blocks:
            try:
                check_written(self._store, slide_id, state.job.settings.spec.key, dict(state.blocks))
            except StoreError as error:
                return fail_slide(self._store, slide_id, error)
        return SlideResult(
            slide_id,
            "done",
            planned=state.n_planned,
            computed=state.n_written,
            patches=state.n_patches,
            unreadable=state.n_unreadable,
            costs=state.costs,
        )

    def _finish(self, result: SlideResult) -> None:
        self._finished[result.slide_id] = result
        self._on_result(result)

    def _quarantine(self, state: _SlideState, task: _Task) -> None:
        """Set a slide aside: its block was running when workers died, but blocks of other slides were, too."""
        slide_id = task.slide_id
        state.deferred += self._queue.drop(slide_id)
        if task.work is not None:
            state.deferred.insert(0, task.work)
        self._quarantined[slide_id] = state

    def _retry_in_isolation(self, state: _SlideState) -> None:
        """Finish a quarantined slide, one task at a time: a worker that dies now was killed by this slide."""
        slide_id = state.job.sample.slide_id
        try:
            if not state.n_blocks:  # it was being planned
                self._run_in_isolation(state, None)
                state.deferred += self._queue.drop(slide_id)
            for work in sorted(state.deferred, key=lambda w: w[0].index):
                if slide_id not in self._finished:
                    self._run_in_isolation(state, work)
        except KilledWorker:
            tries = ALLOWED_WORKER_DEATHS + 1
            reason = f"{state.job.sample.slide} kills the process that reads it ({tries} tries, nothing else running)"
            self._finish(fail_slide(self._store, slide_id, SlideError(reason)))

    def _run_in_isolation(self, state: _SlideState, work: BlockWork | None) -> None:
        future = self._submit(state, work)
        next(self._completions)
        self._running.pop(future)
        self._record_result(state, self._result_of(future))
