"""Submit the tasks of many slides to a cluster through a window, and find the slide that kills workers.

A cohort of any size costs the scheduler the same, since it holds one window of tasks at a time. Slides take turns. When a
task is given up because its workers died, its slide is quarantined until the others are done, and then retried with
nothing else running: only then is it certain which slide kills workers.

What the tasks compute is known to `SlideTasks` alone: embedding and prediction have one each.

Terms
    window      tasks that the scheduler holds at once
    plan        the task that tells which tasks a slide needs
    quarantine  slides with a task that was running when workers died; one of them is the cause
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, cast

from distributed import Client, Future, KilledWorker, as_completed

from featurestore.embedding.dask_clients import SCHEDULER_LOST
from featurestore.embedding.round_robin import RoundRobin
from featurestore.errors import ClusterError

TASKS_PER_THREAD = 3
"""Size of the window: one task that runs, and two that wait, so that no worker idles while a result travels."""
TASK_RETRIES = 2
"""Further tries of a task that raised, as a network does that failed once. Deaths of workers do not count here."""
THREAD_COUNT_INTERVAL = 64
"""Completed tasks between two counts of the cluster's threads: a count is a request to the scheduler."""
PLAN_PRIORITY = 10
"""Ahead of other tasks, since a plan is what gives the other threads work."""

W = TypeVar("W")
W_contra = TypeVar("W_contra", contravariant=True)


class SlideTasks(Protocol[W_contra]):
    """What is computed: submits the tasks of slides, and records their results."""

    def next_slide(self) -> str | None:
        """Return the next slide to plan; None after the last."""

    def submit_plan(self, slide_id: str) -> Future:
        """Submit the planning of a slide."""

    def submit_work(self, slide_id: str, work: W_contra) -> Future:
        """Submit a task that the slide's plan named."""

    def unpack(self, result: Any) -> Any:
        """Return what a task returned; raise an error that is not of one slide, which ends the run."""

    def record(self, slide_id: str, result: Any) -> None:
        """Record a task's result: `SlideWindow.add` what a plan named, `SlideWindow.close` a slide that is finished."""

    def on_quarantine(self, slide_id: str) -> None:
        """Forget what workers may have held for a slide."""

    def on_killer(self, slide_id: str) -> None:
        """Close a slide that kills workers with nothing else running."""


@dataclass(frozen=True)
class _Task(Generic[W]):
    """A submitted task; `work` is None for a plan."""

    slide_id: str
    is_plan: bool
    work: W | None = None


@dataclass
class SlideWindow(Generic[W]):
    """The tasks of one run that wait, run, or are quarantined.

    Parameters
    ----------
    client
        Connected.
    """

    client: Client
    _open: set[str] = field(default_factory=set)
    _queue: RoundRobin[_Task[W]] = field(default_factory=RoundRobin)
    _running: dict[Future, _Task[W]] = field(default_factory=dict)
    _quarantined: dict[str, list[_Task[W]]] = field(default_factory=dict)
    _completions: Any = field(default_factory=as_completed)
    _n_threads: int = 1
    _n_completed: int = 0

    def add(self, slide_id: str, work: Iterable[W]) -> None:
        """Queue the tasks that a slide's plan named."""
        self._queue.add(slide_id, (_Task(slide_id, False, one) for one in work))

    def close(self, slide_id: str) -> None:
        """Drop what is queued of a slide, and ignore what still runs of it."""
        self._queue.drop(slide_id)
        self._quarantined.pop(slide_id, None)
        self._open.discard(slide_id)

    def run(self, tasks: SlideTasks[W]) -> None:
        """Run all slides; those that may kill workers last, one after another.

        Raises
        ------
        ClusterError
            If the scheduler went away.
        """
        try:
            self._fill(tasks)
            while self._running:
                self._handle_completed(tasks, next(self._completions))
                self._fill(tasks)
            for slide_id in list(self._quarantined):
                self._retry_in_isolation(tasks, slide_id)
        except BaseException:
            # Also on Ctrl-C: what is queued on a shared cluster would run on without us.
            if self.client.status == "running":
                with suppress(OSError):
                    self.client.cancel(list(self._running))
            raise

    def _fill(self, tasks: SlideTasks[W]) -> None:
        if self._n_completed % THREAD_COUNT_INTERVAL == 0:  # workers come and go
            self._n_threads = max(1, sum(self.client.nthreads().values()))
        window = TASKS_PER_THREAD * self._n_threads
        n_plans = sum(task.is_plan for task in self._running.values())
        # Planned only as far ahead as keeps two windows queued: the queue must not grow with the cohort.
        while n_plans < self._n_threads and len(self._queue) < 2 * window:
            slide_id = tasks.next_slide()
            if slide_id is None:
                break
            self._open.add(slide_id)
            self._submit(tasks, _Task(slide_id, True))
            n_plans += 1
        while len(self._queue) and len(self._running) - n_plans < window:
            self._submit(tasks, self._queue.pop()[1])

    def _submit(self, tasks: SlideTasks[W], task: _Task[W]) -> None:
        # W may itself allow None: `is_plan` alone tells a plan.
        work = cast("W", task.work)
        future = tasks.submit_plan(task.slide_id) if task.is_plan else tasks.submit_work(task.slide_id, work)
        self._running[future] = task
        self._completions.add(future)

    def _handle_completed(self, tasks: SlideTasks[W], future: Future) -> None:
        self._n_completed += 1
        task = self._running.pop(future)
        try:
            # Also of a slide that is closed: what ends the run must not be lost.
            result = tasks.unpack(result_of(future))
        except KilledWorker:
            if task.slide_id in self._open:
                self._quarantine(tasks, task)
            return
        if task.slide_id in self._open:
            tasks.record(task.slide_id, result)

    def _quarantine(self, tasks: SlideTasks[W], task: _Task[W]) -> None:
        """Set a slide aside: its task was running when workers died, but tasks of other slides were, too."""
        deferred = self._quarantined.setdefault(task.slide_id, [])
        deferred += [task, *self._queue.drop(task.slide_id)]
        tasks.on_quarantine(task.slide_id)

    def _retry_in_isolation(self, tasks: SlideTasks[W], slide_id: str) -> None:
        """Finish a quarantined slide, one task at a time: a worker that dies now was killed by this slide."""
        work = self._quarantined.pop(slide_id)
        try:
            while work and slide_id in self._open:
                self._submit(tasks, work.pop(0))
                future = next(self._completions)
                self._running.pop(future)
                tasks.record(slide_id, tasks.unpack(result_of(future)))
                work += self._queue.drop(slide_id)  # of a slide that was being planned
        except KilledWorker:
            tasks.on_killer(slide_id)


def result_of(future: Future) -> Any:
    """Return what a task returned.

    Raises
    ------
    ClusterError
        If the task was cancelled: the scheduler went away.
    distributed.KilledWorker
        If the task was given up because its workers died.
    """
    if future.cancelled():
        raise ClusterError(SCHEDULER_LOST)
    return future.result()
