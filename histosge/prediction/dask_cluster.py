"""Prediction on a cluster: dask.distributed carries names and reduced patches; workers read, predict and write.

Tasks are submitted through a window, so that a cohort of any size costs the scheduler the same, and slides take turns, as in
`featurestore.embedding.dask_cluster`. A slide whose task was given up because its workers died is set aside until the others
are done, and is then tried with nothing else running: only then is it certain which slide kills workers.
Loads dask when called, not when imported.

Terms
    window      pieces that the scheduler holds at once
    quarantine  slides with a piece that was running when workers died; one of them is the cause
"""

import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from featurestore.embedding.round_robin import RoundRobin
from featurestore.errors import ClusterError
from featurestore.events import OnProgress, Progress
from histosge.errors import ModelError
from histosge.prediction.pieces import Key, Piece, Pieces
from histosge.prediction.slide_prediction import PredictResult, set_aside

if TYPE_CHECKING:
    from distributed import Client, Future

    from histosge.prediction.worker import PredictJob

PIECES_PER_THREAD = 3
"""Size of the window: one piece that is predicted, and two that wait, so that no worker idles while a result travels."""
TASK_RETRIES = 2
"""Further tries of a task that raised, as a network does that failed once. Deaths of workers do not count here."""
THREAD_COUNT_INTERVAL = 64
"""Completed tasks between two counts of the cluster's threads: a count is a request to the scheduler."""


OnResult = Callable[[PredictResult, Exception | None], None]
"""Called with each slide's result as soon as it is known, and with the error for which it was set aside, if it was."""


def predict_on_cluster(
    client: "Client",
    job: "PredictJob",
    slide_ids: Sequence[str],
    on_progress: OnProgress,
    on_result: OnResult,
) -> None:
    """Predict slides on a cluster's workers; slides take turns.

    Parameters
    ----------
    client
        Connected; its workers see the same feature store, model and expression store as this process.

    Raises
    ------
    ClusterError
        If the scheduler goes away, or a worker runs another version of this package.
    FeatureStoreError
        If something else than one slide is at fault; blocks that are written stay.
    """
    from featurestore.embedding.dask_clients import check_versions, scheduler_loss_as_error

    with scheduler_loss_as_error(client):
        check_versions(client)
        _Run(client, job, slide_ids, on_progress, on_result).complete()


def new_run() -> str:
    """Return a random id of a run."""
    return uuid.uuid4().hex[:12]


@dataclass
class _SlideState:
    """Progress of one slide.

    Parameters
    ----------
    result
        Of the slide once all pieces are done; None while it is planned.
    pieces
        None while it is planned, and where one task makes the whole map.
    n_left, n_blocks
        Pieces that are not done, and blocks that are.
    users
        Of each reading: pieces that are not submitted yet and need it.
    readings
        Submitted tasks that some of these will need.
    deferred
        Pieces to run once the slide is retried in isolation; None for the planning, or the whole map.
    """

    slide_id: str
    result: PredictResult | None = None
    pieces: Pieces | None = None
    n_left: int = 0
    n_blocks: int = 0
    users: Counter[Key] = field(default_factory=Counter)
    readings: dict[Key, "Future"] = field(default_factory=dict)
    deferred: list[Piece | None] = field(default_factory=list)


@dataclass(frozen=True)
class _Task:
    """A submitted task: the planning of a slide, a piece of it, or its whole map where there is no piece."""

    slide_id: str
    piece: Piece | None
    is_plan: bool


class _Run:
    """One run: submits tasks, and records their results."""

    def __init__(
        self,
        client: "Client",
        job: "PredictJob",
        slide_ids: Sequence[str],
        on_progress: OnProgress,
        on_result: OnResult,
    ) -> None:
        from distributed import as_completed

        self._client, self._job = client, job
        self._on_progress, self._on_result = on_progress, on_result
        self._to_plan = iter(slide_ids)
        self._states: dict[str, _SlideState] = {}
        self._queue: RoundRobin[Piece | None] = RoundRobin()
        self._running: dict[Future, _Task] = {}
        self._quarantined: dict[str, _SlideState] = {}
        self._completions = as_completed()
        self._n_threads, self._n_completed = 1, 0

    def complete(self) -> None:
        """Run all slides."""
        try:
            self._fill_window()
            while self._running:
                self._handle_completed(next(self._completions))
                self._fill_window()
            for state in list(self._quarantined.values()):
                self._retry_in_isolation(state)
        except BaseException:
            # Also on Ctrl-C: what is queued on a shared cluster would run on without us.
            if self._client.status == "running":
                with suppress(OSError):
                    self._client.cancel(list(self._running))
            raise

    def _fill_window(self) -> None:
        if self._n_completed % THREAD_COUNT_INTERVAL == 0:  # workers come and go
            self._n_threads = max(1, sum(self._client.nthreads().values()))
        window = PIECES_PER_THREAD * self._n_threads
        n_plans = sum(task.is_plan for task in self._running.values())
        # Planned only as far ahead as keeps two windows queued: the first slide is predicted before the last is opened.
        while n_plans < self._n_threads and len(self._queue) < 2 * window:
            slide_id = next(self._to_plan, None)
            if slide_id is None:
                break
            state = self._states[slide_id] = _SlideState(slide_id)
            self._submit(state, None)
            n_plans += 1
        while len(self._queue) and len(self._running) - n_plans < window:
            slide_id, piece = self._queue.pop()
            self._submit(self._states[slide_id], piece)

    def _submit(self, state: _SlideState, piece: Piece | None) -> None:
        from histosge.prediction.worker import plan_slide, predict_piece, replace_map

        # Not pure: a piece that is retried in isolation must be a new task, not the one that dask has given up.
        options: dict[str, Any] = {"pure": False, "retries": TASK_RETRIES}
        if state.result is None:
            # Ahead of pieces, since a plan is what gives the other threads work.
            future = self._client.submit(plan_slide, self._job, state.slide_id, priority=10, **options)
        elif piece is None:
            future = self._client.submit(replace_map, self._job, state.slide_id, **options)
        else:
            readings = [self._reading(state, key) for key in piece.readings]
            future = self._client.submit(
                predict_piece, self._job, state.slide_id, piece.blocks, readings, **options
            )
            state.users.subtract(piece.readings)
            # Dask keeps what a submitted piece needs; nobody else does, once the last piece that needs it is submitted.
            state.readings = {key: kept for key, kept in state.readings.items() if state.users[key] > 0}
        self._running[future] = _Task(state.slide_id, piece, state.result is None)
        self._completions.add(future)

    def _reading(self, state: _SlideState, key: Key) -> "Future":
        from histosge.prediction.worker import read_blocks

        if key not in state.readings:
            assert state.pieces is not None
            blocks = state.pieces.readings[key]
            state.readings[key] = self._client.submit(
                read_blocks, self._job, state.slide_id, blocks, pure=False, retries=TASK_RETRIES
            )
        return state.readings[key]

    def _handle_completed(self, future: "Future") -> None:
        from distributed import KilledWorker

        self._n_completed += 1
        task = self._running.pop(future)
        state = self._states.get(task.slide_id)
        try:
            result = self._result_of(future)
        except KilledWorker:
            if state is not None:
                self._quarantine(state, task)
            return
        if state is not None:
            self._record_result(state, result)

    def _result_of(self, future: "Future") -> Any:
        from featurestore.embedding.dask_clients import SCHEDULER_LOST
        from histosge.prediction.worker import FailedTask

        if future.cancelled():
            raise ClusterError(SCHEDULER_LOST)
        result = future.result()
        if isinstance(result, FailedTask) and not result.is_of_one_slide:
            raise result.error
        return result

    def _record_result(self, state: _SlideState, result: Any) -> None:
        from histosge.prediction.worker import FailedTask, SlidePlan

        if isinstance(result, FailedTask):  # several of its tasks may say so: the first is recorded
            self._finish(state, set_aside(state.slide_id, result.error), result.error)
            return
        if isinstance(result, SlidePlan):
            state.result, state.pieces = result.result, result.pieces
            work: Sequence[Piece | None] = [None]
            if result.pieces is not None:
                work = result.pieces.pieces
                state.users = Counter(key for piece in result.pieces.pieces for key in piece.readings)
            state.n_left = len(work)
            self._queue.add(state.slide_id, work)
            if work:
                return
            result = state.result
        if isinstance(result, PredictResult):  # its whole map
            self._finish(state, result)
            return
        assert state.result is not None
        state.n_left -= 1
        state.n_blocks += result
        self._on_progress(Progress(state.n_blocks, state.result.computed, state.slide_id))
        if state.n_left == 0:
            self._finish(state, state.result)

    def _finish(self, state: _SlideState, result: PredictResult, error: Exception | None = None) -> None:
        self._queue.drop(state.slide_id)
        self._quarantined.pop(state.slide_id, None)
        # What still runs of a slide that was set aside is ignored.
        del self._states[state.slide_id]
        self._on_result(result, error)

    def _quarantine(self, state: _SlideState, task: _Task) -> None:
        """Set a slide aside: its piece was running when workers died, but pieces of other slides were, too."""
        state.deferred += [task.piece, *self._queue.drop(state.slide_id)]
        state.readings.clear()
        self._quarantined[state.slide_id] = state

    def _retry_in_isolation(self, state: _SlideState) -> None:
        """Finish a quarantined slide, one piece at a time: a worker that dies now was killed by this slide."""
        from distributed import KilledWorker

        work, state.deferred = state.deferred, []
        if (
            state.pieces is not None
        ):  # each reading is made for its piece alone: few pieces are left, and memory may be short
            state.users.clear()
        try:
            while work and state.slide_id in self._states:
                self._run_in_isolation(state, work.pop(0))
                if state.slide_id in self._states:  # it was being planned
                    work += self._queue.drop(state.slide_id)
        except KilledWorker:
            error = ModelError(
                f"slide {state.slide_id!r} kills the process that predicts it, also with nothing else running, probably for "
                "lack of memory; blocks that are written stay: run the same command again with fewer --workers"
            )
            self._finish(state, set_aside(state.slide_id, error), error)

    def _run_in_isolation(self, state: _SlideState, piece: Piece | None) -> None:
        self._submit(state, piece)
        future = next(self._completions)
        self._running.pop(future)
        self._record_result(state, self._result_of(future))
