"""Embedding on a cluster: dask.distributed carries keys and small results; workers do the rest.

`featurestore.embedding.slide_window` decides which task is submitted when.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from distributed import Client, Future

from featurestore.blocks import Block
from featurestore.embedding.block_task import BlockResult, check_written
from featurestore.embedding.costs import Costs
from featurestore.embedding.dask_clients import (
    ALLOWED_WORKER_DEATHS,
    check_versions,
    scheduler_loss_as_error,
)
from featurestore.embedding.duplicates import DuplicateCheck
from featurestore.embedding.plan import show_remark
from featurestore.embedding.quality import QualityPlan, write_focus
from featurestore.embedding.settings import EmbedSettings
from featurestore.embedding.slide_result import (
    OnResult,
    SlideResult,
    fail_slide,
    ignore_result,
    settle_mismatches,
)
from featurestore.embedding.slide_window import PLAN_PRIORITY, TASK_RETRIES, SlideWindow, result_of
from featurestore.embedding.target_store import open_target
from featurestore.embedding.worker import (
    Job,
    PermanentFailure,
    PlannedSlide,
    check_encoders,
    embed_block,
    plan_job,
)
from featurestore.errors import SlideError, StoreError
from featurestore.events import OnProgress, Progress
from featurestore.slides.sample_sheet import Sample

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
    quality
        As in `featurestore.embedding.plan.SlidePlan`.
    judged
        Focus of the patches of the computed blocks: a byte a patch.
    fingerprint
        Of the slide's file as it was planned.
    blocks
        All that this run has to compute.
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
    quality: QualityPlan = field(default_factory=QualityPlan)
    judged: list[tuple[Block, bytes]] = field(default_factory=list)


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
        first = Job(run, store, samples[0], settings)
        self.unpack(result_of(client.submit(check_encoders, first, pure=False)))
        self._store, named = open_target(store, samples, settings)
        self._slide_ids = [sample.slide_id for sample in named]
        # Here, where the rows have an order: of two slides that workers plan at once, the earlier row wins.
        accepted = DuplicateCheck(self._store, allowed=settings.allow_duplicates).accepted(
            named, self._refuse
        )
        self._to_plan = (_SlideState(Job(run, store, sample, settings)) for sample in accepted)
        self._states: dict[str, _SlideState] = {}
        self._window: SlideWindow[BlockWork] = SlideWindow(client)
        self._finished: dict[str, SlideResult] = {}

    def results(self) -> list[SlideResult]:
        """Run all slides, and return their results in the order of the samples."""
        self._window.run(self)
        results = [self._finished[slide_id] for slide_id in self._slide_ids]
        settle_mismatches(self._store, results)
        return results

    def next_slide(self) -> str | None:
        """Return the next slide to plan; None after the last."""
        state = next(self._to_plan, None)
        if state is None:
            return None
        slide_id = state.job.sample.slide_id
        self._states[slide_id] = state
        return slide_id

    def submit_plan(self, slide_id: str) -> Future:
        """Submit the planning of a slide."""
        return self._client.submit(
            plan_job, self._states[slide_id].job, priority=PLAN_PRIORITY, pure=False, retries=TASK_RETRIES
        )

    def submit_work(self, slide_id: str, work: BlockWork) -> Future:
        """Submit a block."""
        state = self._states[slide_id]
        return self._client.submit(
            embed_block,
            state.job,
            state.fingerprint,
            *work,
            state.quality.judging_focus,
            # Not pure: a block that is retried in isolation must be a new task, not the one that dask has given up.
            pure=False,
            retries=TASK_RETRIES,
        )

    def on_quarantine(self, slide_id: str) -> None:
        """Do nothing: no block needs what another one left on a worker."""

    def on_killer(self, slide_id: str) -> None:
        """Fail a slide that kills workers."""
        sample = self._states[slide_id].job.sample
        tries = ALLOWED_WORKER_DEATHS + 1
        reason = f"{sample.slide} kills the process that reads it ({tries} tries, nothing else running)"
        self._finish(fail_slide(self._store, sample, SlideError(reason)))

    def unpack(self, result: Any) -> Any:
        """Return what a task returned; raise an error that is not of one slide."""
        # Workers return it as a value: dask would try a task again that raised.
        if isinstance(result, PermanentFailure):
            raise result.error
        return result

    def record(self, slide_id: str, result: PlannedSlide | BlockResult | SlideResult) -> None:
        """Record the result of a plan or a block."""
        state = self._states[slide_id]
        if isinstance(result, SlideResult):  # the slide failed
            self._finish(replace(result, costs=state.costs))
            return
        if isinstance(result, PlannedSlide):
            show_remark(result.remark)
            state.n_blocks, state.n_planned = len(result.blocks), result.planned
            state.n_patches, state.fingerprint = result.patches, result.fingerprint
            state.blocks = tuple(result.blocks.items())
            state.costs += result.costs
            state.quality = result.quality
            self._window.add(slide_id, state.blocks)
        else:
            state.n_done += 1
            state.n_written += result.written
            state.n_unreadable += result.unreadable
            state.n_patches_done += result.patches
            state.costs += result.costs
            state.judged.append((result.block, result.focus))
            self._on_progress(Progress(state.n_done, state.n_blocks, slide_id, state.n_patches_done))
        if state.n_done == state.n_blocks:
            self._finish(self._check_done(state))

    def _check_done(self, state: _SlideState) -> SlideResult:
        """Return the result of a slide whose blocks were all computed: done, if they are still there."""
        slide_id = state.job.sample.slide_id
        if state.blocks:
            grid_key = state.job.settings.spec.key
            try:
                check_written(self._store, slide_id, grid_key, dict(state.blocks))
                write_focus(self._store, slide_id, grid_key, state.quality, state.judged)
            except StoreError as error:
                return fail_slide(self._store, state.job.sample, error)
        return SlideResult(
            slide_id,
            "done",
            planned=state.n_planned,
            computed=state.n_written,
            patches=state.n_patches,
            unreadable=state.n_unreadable,
            skipped=state.quality.skipped,
            costs=state.costs,
        )

    def _refuse(self, sample: Sample, error: SlideError) -> None:
        self._finish(fail_slide(self._store, sample, error))

    def _finish(self, result: SlideResult) -> None:
        self._finished[result.slide_id] = result
        self._window.close(result.slide_id)
        self._states.pop(result.slide_id, None)
        self._on_result(result)
