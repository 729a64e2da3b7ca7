"""Prediction on a cluster: dask.distributed carries names and reduced patches; workers read, predict and write.

`featurestore.embedding.slide_window` decides which task is submitted when. Loads dask when called, not when imported.
"""

import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from featurestore.events import OnProgress, Progress
from histosge.errors import ModelError
from histosge.prediction.pieces import Key, Piece, Pieces
from histosge.prediction.slide_prediction import PredictResult, set_aside

if TYPE_CHECKING:
    from distributed import Client, Future

    from histosge.prediction.worker import PredictJob

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
    """

    slide_id: str
    result: PredictResult | None = None
    pieces: Pieces | None = None
    n_left: int = 0
    n_blocks: int = 0
    users: Counter[Key] = field(default_factory=Counter)
    readings: dict[Key, "Future"] = field(default_factory=dict)


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
        from featurestore.embedding.slide_window import SlideWindow

        self._client, self._job = client, job
        self._on_progress, self._on_result = on_progress, on_result
        self._to_plan = iter(slide_ids)
        self._states: dict[str, _SlideState] = {}
        # The work of a slide is its pieces, or None for its whole map.
        self._window: SlideWindow[Piece | None] = SlideWindow(client)

    def complete(self) -> None:
        """Run all slides."""
        self._window.run(self)

    def next_slide(self) -> str | None:
        """Return the next slide to plan; None after the last."""
        slide_id = next(self._to_plan, None)
        if slide_id is not None:
            self._states[slide_id] = _SlideState(slide_id)
        return slide_id

    def submit_plan(self, slide_id: str) -> "Future":
        """Submit the planning of a slide."""
        from featurestore.embedding.slide_window import PLAN_PRIORITY
        from histosge.prediction.worker import plan_slide

        return self._submit(plan_slide, slide_id, priority=PLAN_PRIORITY)

    def submit_work(self, slide_id: str, work: Piece | None) -> "Future":
        """Submit a piece of a slide, or its whole map."""
        from histosge.prediction.worker import predict_piece, replace_map

        if work is None:
            return self._submit(replace_map, slide_id)
        state = self._states[slide_id]
        readings = [self._reading(state, key) for key in work.readings]
        future = self._submit(predict_piece, slide_id, work.blocks, readings)
        state.users.subtract(work.readings)
        # Dask keeps what a submitted piece needs; nobody else does, once the last piece that needs it is submitted.
        state.readings = {key: kept for key, kept in state.readings.items() if state.users[key] > 0}
        return future

    def _submit(self, function: Callable[..., Any], slide_id: str, *args: Any, **options: Any) -> "Future":
        from featurestore.embedding.slide_window import TASK_RETRIES

        # Not pure: a piece that is retried in isolation must be a new task, not the one that dask has given up.
        return self._client.submit(
            function, self._job, slide_id, *args, pure=False, retries=TASK_RETRIES, **options
        )

    def _reading(self, state: _SlideState, key: Key) -> "Future":
        from histosge.prediction.worker import read_blocks

        if key not in state.readings:
            assert state.pieces is not None
            blocks = state.pieces.readings[key]
            state.readings[key] = self._submit(read_blocks, state.slide_id, blocks)
        return state.readings[key]

    def unpack(self, result: Any) -> Any:
        """Return what a task returned; raise an error that is not of one slide."""
        from histosge.prediction.worker import FailedTask

        if isinstance(result, FailedTask) and not result.is_of_one_slide:
            raise result.error
        return result

    def record(self, slide_id: str, result: Any) -> None:
        """Record the result of a plan, a piece or a whole map."""
        from histosge.prediction.worker import FailedTask, SlidePlan

        state = self._states[slide_id]
        if isinstance(result, FailedTask):
            self._finish(state, set_aside(state.slide_id, result.error), result.error)
            return
        if isinstance(result, SlidePlan):
            state.result, state.pieces = result.result, result.pieces
            work: Sequence[Piece | None] = [None]
            if result.pieces is not None:
                work = result.pieces.pieces
                state.users = Counter(key for piece in result.pieces.pieces for key in piece.readings)
            state.n_left = len(work)
            self._window.add(slide_id, work)
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

    def on_quarantine(self, slide_id: str) -> None:
        """Drop what was read, which may be lost with its worker."""
        state = self._states[slide_id]
        state.readings.clear()
        # Then each reading is made for its piece alone: few pieces are left, and memory may be short.
        state.users.clear()

    def on_killer(self, slide_id: str) -> None:
        """Set a slide aside that kills workers."""
        error = ModelError(
            f"slide {slide_id!r} kills the process that predicts it, also with nothing else running, probably for "
            "lack of memory; blocks that are written stay: run the same command again with fewer --workers"
        )
        self._finish(self._states[slide_id], set_aside(slide_id, error), error)

    def _finish(self, state: _SlideState, result: PredictResult, error: Exception | None = None) -> None:
        self._window.close(state.slide_id)
        del self._states[state.slide_id]
        self._on_result(result, error)
