"""Embedding on a cluster: dask.distributed carries keys and small results; workers do the rest.

Tasks are submitted through a window, so a cohort of any size costs the scheduler the same. Slides take turns. When a
task is given up because its workers died, its slide is quarantined until the others are done, and then retried with
nothing else running: only then is it certain which slide kills workers.

Terms
    window      blocks that the scheduler holds at once
    quarantine  slides with a block that was running when workers died; one of them is the cause
"""

import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from distributed import Client, Future, KilledWorker, as_completed

from featurestore.blocks import Block
from featurestore.embedding.block_task import BlockResult, check_written
from featurestore.embedding.costs import Costs
from featurestore.embedding.dask_clients import (
    ALLOWED_WORKER_DEATHS,
    SCHEDULER_LOST,
    check_versions,
    scheduler_loss_as_error,
)
from featurestore.embedding.duplicates import DuplicateCheck
from featurestore.embedding.plan import EmbedSettings, show_remark
from featurestore.embedding.round_robin import RoundRobin
from featurestore.embedding.slide_result import (
    OnResult,
    SlideResult,
    fail_slide,
    ignore_result,
    settle_mismatches,
)
from featurestore.embedding.target_store import open_target
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
from featurestore.slides.sample_sheet import Sample

BLOCKS_PER_THREAD = 3
"""Size of the window: one block that runs, and two that wait, so that no worker idles while a result travels."""
TASK_RETRIES = 2
"""Further tries of a task that raised, as a network does that failed once. Deaths of workers do not count here."""
THREAD_COUNT_INTERVAL = 64
"""Completed tasks between two counts of the cluster's threads: a count is a request to the scheduler."""

BlockWork = tuple[Block, tuple[str, ...]]
"""A block, and the keys of the encoders that lack it."""


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
        If the scheduler goes away; what is done stays done. If a worker runs another version of this package: nothing is
        written then.
    FeatureStoreError
        If what is stored was made otherwise.
    """
    with scheduler_loss_as_error(client):
        check_versions(client)
        return _Run(client, samples, store, settings, on_progress, on_result).results()


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
        # Before the store is made: a mistyped encoder must leave nothing behind.
        self._result_of(client.submit(check_encoders, Job(run, store, samples[0], settings), pure=False))
        self._store, named = open_target(store, samples, settings)
        self._slide_ids = [sample.slide_id for sample in named]
        # Here, where the rows have an order: of two slides that workers plan at once, the earlier row wins.
        accepted = DuplicateCheck(self._store, allowed=settings.allow_duplicates).accepted(
            named, self._refuse
        )
        self._to_plan = (_SlideState(Job(run, store, sample, settings)) for sample in accepted)
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
                return fail_slide(self._store, state.job.sample, error)
        return SlideResult(
            slide_id,
            "done",
            planned=state.n_planned,
            computed=state.n_written,
            patches=state.n_patches,
            unreadable=state.n_unreadable,
            costs=state.costs,
        )

    def _refuse(self, sample: Sample, error: SlideError) -> None:
        self._finish(fail_slide(self._store, sample, error))

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
            self._finish(fail_slide(self._store, state.job.sample, SlideError(reason)))

    def _run_in_isolation(self, state: _SlideState, work: BlockWork | None) -> None:
        future = self._submit(state, work)
        next(self._completions)
        self._running.pop(future)
        self._record_result(state, self._result_of(future))
