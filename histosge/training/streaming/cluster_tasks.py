"""Sections of a pass as tasks of a dask cluster: a few in flight, results in the order of the sections.

A section whose task was given up because workers died is tried once more with nothing else running: tasks that wait on
a worker die with it, so only then is it certain which section kills. Loads dask.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import dask
from distributed import Client, Future, KilledWorker, wait

from featurestore.embedding.dask_clients import (
    ALLOWED_WORKER_DEATHS,
    PACKAGE,
    check_version,
    check_versions,
    scheduler_loss_as_error,
)
from featurestore.software import version
from histosge.errors import ModelError
from histosge.threads import one_blas_thread
from histosge.training.streaming.section_tasks import Item, OnStep, Result, Shared

SECTIONS_PER_THREAD = 2
"""Sections in flight for each thread of the cluster: one that is worked on, and one that waits, so that no worker idles. A
section's sums at 1,536 numbers and five scales take 80 MB, which its worker keeps until they are fetched."""
SCHEDULER_LOST = (
    "the scheduler went away; what sections gave so far stays: run the same command again to go on"
)


@dataclass
class _Task:
    """A section in flight; `future` is None for one that an earlier run worked on."""

    slide_id: str
    item: Any
    future: Future | None


class ClusterTasks:
    """Runs a function on sections, on the workers of a cluster; see `SectionTasks`.

    Parameters
    ----------
    client
        Connected.
    threads
        See `SectionTasks`.

    Raises
    ------
    ClusterError
        If a worker runs another version of this package.
    """

    def __init__(self, client: Client, threads: int = 1) -> None:
        check_versions(client)
        self._client, self._threads = client, threads

    @property
    def threads(self) -> int:
        """Return what the tasks were made with."""
        return self._threads

    def run(
        self,
        work: Callable[[Shared, Item], Result],
        shared: Shared,
        items: Iterable[tuple[str, Item | None]],
        on_step: OnStep,
    ) -> Iterator[Result | None]:
        """Yield what `SectionTasks.run` does.

        Raises
        ------
        ModelError
            If a section kills the workers that read it.
        ClusterError
            If the scheduler goes away, or a worker that joined later runs another version of this package.
        Exception
            Whatever `work` raised for a section.
        """
        waiting: deque[_Task] = deque()
        try:
            with scheduler_loss_as_error(self._client, SCHEDULER_LOST):
                # Sent once and not with every task. As a task: scattered data are lost with the worker that holds them.
                of_all = self._submit(_unchanged, shared)
                for slide_id, item in items:
                    future = (
                        None if item is None else self._submit(_work, version(PACKAGE), work, of_all, item)
                    )
                    waiting.append(_Task(slide_id, item, future))
                    if len(waiting) >= self._window():
                        yield self._next(waiting, work, of_all, on_step)
                while waiting:
                    yield self._next(waiting, work, of_all, on_step)
        finally:
            # Also on an error and on Ctrl-C: what is queued on a shared cluster would run on without us.
            if waiting and self._client.status == "running":
                with suppress(OSError):
                    self._client.cancel([task.future for task in waiting if task.future is not None])

    def _window(self) -> int:
        # Counted anew, since workers come and go.
        return SECTIONS_PER_THREAD * max(1, sum(map(int, self._client.nthreads().values())))

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        # A section's targets take up to 10 MB, from which on dask warns: few of them are in flight.
        with dask.config.set({"distributed.admin.large-graph-warning-threshold": "10 GB"}):
            # Not pure: a pass reads the store again, though the arguments may be those of an earlier one.
            return self._client.submit(function, *arguments, pure=False)

    def _next(
        self, waiting: deque[_Task], work: Callable[..., Result], of_all: Future, on_step: OnStep
    ) -> Result | None:
        task = waiting[0]
        on_step(task.slide_id)
        if task.future is None:
            waiting.popleft()
            return None
        try:
            result = task.future.result()
        except KilledWorker:
            wait([other.future for other in waiting if other.future is not None])
            task.future = self._submit(_work, version(PACKAGE), work, of_all, task.item)
            try:
                result = task.future.result()
            except KilledWorker as error:
                raise ModelError(
                    f"section {task.slide_id!r} kills the process that reads it ({ALLOWED_WORKER_DEATHS + 1} tries, nothing "
                    "else running), probably for lack of memory; give fewer --workers, or leave the section out"
                ) from error
        waiting.popleft()
        return cast(Result, result)


# ---------------------------------------------------------------------- on workers


def _unchanged(value: Any) -> Any:
    return value


def _work(wanted: str, work: Callable[[Any, Any], Any], shared: Any, item: Any) -> Any:
    # Also here, since workers join while a run goes on.
    check_version(version(PACKAGE), wanted, f"process {os.getpid()}")
    # As in `histosge.training.train`: products of two threads may have other bits.
    with one_blas_thread():
        result = work(shared, item)
        return list(result) if isinstance(result, Iterator) else result
