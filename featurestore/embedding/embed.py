"""Slides -> embeddings in a store: in this process, or on a cluster of workers.

Every run can be repeated safely: a block is done if its object exists, and only missing blocks are computed.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Literal

from featurestore.blocks import Block
from featurestore.embedding.block_reading import BlockReading, read_blocks
from featurestore.embedding.block_task import check_written, embed_blocks
from featurestore.embedding.costs import Costs, plan_costs
from featurestore.embedding.duplicates import DuplicateCheck
from featurestore.embedding.plan import (
    SlidePlan,
    blocks_to_read,
    dry_run_slide,
    plan_slide,
    show_remark,
)
from featurestore.embedding.plan_ahead import GoOn, PlanAhead
from featurestore.embedding.quality import write_focus
from featurestore.embedding.settings import EmbedSettings as EmbedSettings
from featurestore.embedding.settings import load_encoders
from featurestore.embedding.slide_result import (
    ONE_SLIDE,
    OnResult,
    fail_slide,
    ignore_result,
    is_of_one_slide,
    settle_mismatches,
)
from featurestore.embedding.slide_result import SlideResult as SlideResult
from featurestore.embedding.slide_watch import SlideWatch
from featurestore.embedding.target_store import open_target, planned_names
from featurestore.embedding.throughput_probe import ThroughputProbe
from featurestore.embedding.tissue_choice import with_masks
from featurestore.encoders.protocol import Encoder
from featurestore.events import OnProgress, Progress, ignore_progress
from featurestore.location import PathOrUrl, as_url
from featurestore.object_stores.hub_place import check_writable
from featurestore.slides.open_slide import open_slide
from featurestore.slides.protocol import Slide
from featurestore.slides.sample_sheet import Sample, read_samples
from featurestore.storage.store import Store, StoredGrid

OnSurvey = Callable[[Slide, StoredGrid, SlideResult], None]
"""Called in a dry run with each slide that could be surveyed, while it is open."""


def ignore_survey(slide: Slide, stored: StoredGrid, result: SlideResult) -> None:
    """Ignore a survey."""


def embed(
    samples: PathOrUrl,
    store: PathOrUrl,
    settings: EmbedSettings | None = None,
    *,
    slide_mpp: float | None = None,
    dry_run: bool = False,
    workers: int | Literal["auto"] | None = None,
    scheduler: str | None = None,
    dashboard: int | None = None,
    on_progress: OnProgress = ignore_progress,
    on_result: OnResult = ignore_result,
    on_survey: OnSurvey = ignore_survey,
) -> list[SlideResult]:
    """Encode slides into a store; only what is missing is computed.

    Parameters
    ----------
    samples
        A slide file, a folder of slides, or a sample sheet (CSV).
    store
        Folder or URL of the store; made if there is none.
    settings
        Encoders, grid and options.
    slide_mpp
        Microns per pixel of slides whose file does not state it.
    dry_run
        Survey and plan only, in this process; nothing is written.
    workers
        Number of processes to start on this machine for the work; ``auto`` is one for each GPU that is visible, or one for
        every two cores. Each is shown one GPU; where they are more than the GPUs, they share them.
    scheduler
        Address of a running dask scheduler, whose workers see the same slides and store.
    dashboard
        Port of dask's dashboard on this machine, for `workers`; no other machine can reach it.
    on_progress
        Called after each block, labelled with its slide.
    on_result
        Called with each slide's result as soon as it is known.
    on_survey
        With `dry_run`, called with each slide and what would be stored of its grid.

    Returns
    -------
    list of SlideResult
        One per slide. Whatever is wrong with one slide, in its file or in the store, it is ``failed``; the others go on.

    Raises
    ------
    FeatureStoreError
        If the samples, the store or an encoder cannot be used.
    IdentityMismatchError
        If the store holds every slide of the run from another file, or with another scale, grid, tissue or encoder. If
        it is so with some of them only, they are ``failed``.
    """
    settings = settings or EmbedSettings()
    check_writable(store)
    rows, url = read_samples(as_url(samples), slide_mpp), as_url(store)
    rows = with_masks(rows, settings)
    if (workers or scheduler) and not dry_run and rows:
        # Here, since a run in this process needs no dask.
        from featurestore.embedding.dask_clients import gpu_client, remote_client
        from featurestore.embedding.dask_cluster import embed_on_cluster

        with (
            remote_client(scheduler)
            if scheduler
            else gpu_client(workers or 1, settings.options.device, dashboard)
        ) as client:
            return embed_on_cluster(client, rows, url, settings, on_progress, on_result)
    encoders = load_encoders(settings)
    if dry_run:
        probe = ThroughputProbe(encoders)
        named = planned_names(url, rows, settings)
        return [_dry_run(sample, encoders, settings, probe, on_survey) for sample in named]
    # After the encoders: a mistyped encoder or missing weights must leave no empty store behind.
    target, rows = open_target(url, rows, settings)
    duplicates = DuplicateCheck(target, allowed=settings.allow_duplicates)
    results = []

    slides = _SlidesInTurn(target, encoders, settings, duplicates)
    with PlanAhead(rows, slides.open, _OpenedSlide.close) as planned:
        for sample, take_plan in planned:
            results.append(
                _embed_slide(target, sample, take_plan, encoders, settings.retry_failed, on_progress)
            )
            on_result(results[-1])
    settle_mismatches(target, results)
    return results


def _dry_run(
    sample: Sample,
    encoders: dict[str, Encoder],
    settings: EmbedSettings,
    probe: ThroughputProbe,
    on_survey: OnSurvey,
) -> SlideResult:
    try:
        slide = open_slide(sample.slide, sample.mpp, fallback_mpp=sample.fallback_mpp)
        try:
            result, stored = dry_run_slide(slide, sample, encoders, settings, probe.seconds_per_patch)
            on_survey(slide, stored, result)
            return result
        finally:
            slide.close()
    except ONE_SLIDE as error:
        return fail_slide(None, sample, error)


@dataclass(frozen=True)
class _OpenedSlide:
    """A slide that is open and planned; its first blocks are being read, if any are to be."""

    slide: Slide
    plan: SlidePlan
    watch: SlideWatch
    costs: Costs
    blocks: dict[Block, tuple[str, ...]]
    reading: BlockReading | None

    def close(self) -> None:
        """Stop reading, and close the slide."""
        if self.reading is not None:
            self.reading.close()
        self.slide.close()


class _SlidesInTurn:
    """Opens and plans the slides of a run, one after the other, perhaps each in another thread."""

    def __init__(
        self,
        store: Store,
        encoders: dict[str, Encoder],
        settings: EmbedSettings,
        duplicates: DuplicateCheck,
    ) -> None:
        self._store, self._encoders = store, encoders
        self._settings, self._duplicates = settings, duplicates
        self._last: BlockReading | None = None

    def open(self, sample: Sample, go_on: GoOn) -> _OpenedSlide:
        """Open a slide, plan it, and begin to read it as soon as the slide before was read to its end."""
        begun = time.perf_counter()
        watch = SlideWatch(sample.slide)  # before the slide is opened
        slide = open_slide(sample.slide, sample.mpp, fallback_mpp=sample.fallback_mpp)
        with ExitStack() as unless_done:
            unless_done.callback(slide.close)
            go_on()  # a download may have taken minutes, and from here on the store is written to
            plan = plan_slide(
                self._store, slide, sample, self._encoders, self._settings, self._duplicates.check
            )
            watch.check_since_opened()
            costs = plan_costs(time.perf_counter() - begun, slide)
            blocks = blocks_to_read(plan)
            reading = self._begin_reading(slide, plan, blocks, go_on, unless_done) if blocks else None
            unless_done.pop_all()
        return _OpenedSlide(slide, plan, watch, costs, blocks, reading)

    def _begin_reading(
        self,
        slide: Slide,
        plan: SlidePlan,
        blocks: dict[Block, tuple[str, ...]],
        go_on: GoOn,
        unless_done: ExitStack,
    ) -> BlockReading:
        judging = plan.quality.judging_focus
        reading = read_blocks(self._store, slide, plan.stored, blocks, self._encoders, judging_focus=judging)
        unless_done.callback(reading.close)
        # Not earlier: batches of two slides would wait in memory, and the present slide needs the cores.
        while self._last is not None and not self._last.all_read.wait(timeout=0.1):
            go_on()
        self._last = reading
        reading.begin()
        return reading


def _embed_slide(
    store: Store,
    sample: Sample,
    take_plan: Callable[[], _OpenedSlide],
    encoders: dict[str, Encoder],
    retried: bool,
    on_progress: OnProgress,
) -> SlideResult:
    try:
        with closing(take_plan()) as opened:
            # In its turn, and in this thread: the slide may have been planned during the one before.
            show_remark(opened.plan.remark)
            done = _embed_planned(store, opened, encoders, retried, on_progress)
            return replace(done, costs=opened.costs + done.costs)
    except ONE_SLIDE as error:
        if not is_of_one_slide(error):
            raise
        return fail_slide(store, sample, error)


def _embed_planned(
    store: Store,
    opened: _OpenedSlide,
    encoders: dict[str, Encoder],
    retried: bool,
    on_progress: OnProgress,
) -> SlideResult:
    plan, blocks = opened.plan, opened.blocks
    slide_id, total = plan.sample.slide_id, len(blocks)
    computed = unreadable = patches = 0
    costs = Costs()
    judged: list[tuple[Block, bytes]] = []
    if blocks:
        # Closed, also where `on_progress` raises or Ctrl-C stops the run: its thread reads the slide ahead, and a slide
        # that is closed while a thread reads it ends the process. When the generator is collected is not ours to say.
        with closing(
            embed_blocks(
                store,
                opened.slide,
                plan.stored,
                blocks,
                encoders,
                check_slide=lambda: opened.watch.check(plan.fingerprint),
                retried=retried,
                reading=opened.reading,
            )
        ) as results:
            for number, result in enumerate(results, start=1):
                computed += result.written
                unreadable += result.unreadable
                patches += result.patches
                costs += result.costs
                judged.append((result.block, result.focus))
                on_progress(Progress(number, total, slide_id, patches))
        check_written(store, slide_id, plan.stored.grid.spec.key, blocks)
        write_focus(store, slide_id, plan.stored.grid.spec.key, plan.quality, judged)
    return SlideResult(
        slide_id,
        "done",
        planned=plan.n_planned,
        computed=computed,
        patches=int(plan.stored.is_tissue.sum()),
        unreadable=unreadable,
        skipped=plan.quality.skipped,
        costs=costs,
    )
