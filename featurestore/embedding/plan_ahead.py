"""The next slide is planned while the present one is encoded: a GPU would wait for it at the start of every slide.

Slides are planned one after the other, in their order, and never more than one ahead: so much more is open, and no more.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Generic, Self, TypeVar

from featurestore.slides.sample_sheet import Sample

T = TypeVar("T")
GoOn = Callable[[], None]
"""Called by a plan between its steps; raises `RunStoppedError` once nobody waits for the plan any more."""


class RunStoppedError(Exception):
    """Raised in a plan whose run has ended."""


class PlanAhead(Generic[T]):
    """The slides of a run with their plans; a context, at whose end no thread is left.

    The first slide, and one after a slide that failed, is planned by the caller's own thread, since there is nothing to do
    meanwhile.

    Parameters
    ----------
    samples
        In the order of the run.
    plan
        Plans a slide.
    discard
        Called with a plan that nobody takes: where a run ends early, by an error or Ctrl-C, the slide that was planned
        ahead is still open.
    """

    def __init__(
        self, samples: Iterable[Sample], plan: Callable[[Sample, GoOn], T], discard: Callable[[T], None]
    ) -> None:
        self._samples = iter(samples)
        self._plan, self._discard = plan, discard
        self._ahead: _Planning[T] | None = None

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        """Stop the thread, and discard what it has planned."""
        if self._ahead is not None:
            self._ahead.stop(self._discard)

    def __iter__(self) -> Iterator[tuple[Sample, Callable[[], T]]]:
        """Yield each slide, and what returns its plan or raises what went wrong with it; to be called once."""
        sample = next(self._samples, None)
        while sample is not None:
            yield sample, partial(self._take, sample)
            sample = next(self._samples, None) if self._ahead is None else self._ahead.sample

    def _take(self, sample: Sample) -> T:
        # Interrupted by Ctrl-C while it waits, the thread is stopped at the end of the context.
        ahead = self._ahead
        try:
            plan = self._plan(sample, _go_on) if ahead is None else ahead.result()
        except Exception:
            # The next one is not begun: this error may end the run, and there is nothing to encode meanwhile.
            self._ahead = None
            raise
        # Only now: duplicates are found by comparing each slide with those before it.
        self._begin_next()
        return plan

    def _begin_next(self) -> None:
        following = next(self._samples, None)
        self._ahead = None if following is None else _Planning(following, self._plan)


def _go_on() -> None:
    pass


class _Planning(Generic[T]):
    """One slide that is planned in a thread from now on."""

    def __init__(self, sample: Sample, plan: Callable[[Sample, GoOn], T]) -> None:
        self.sample = sample
        self._stopping = threading.Event()
        self._future: Future[T] = Future()
        # A daemon: a second Ctrl-C ends the process although a server lets the thread wait.
        self._thread = threading.Thread(target=self._run, args=(plan,), name="plan", daemon=True)
        self._thread.start()

    def _run(self, plan: Callable[[Sample, GoOn], T]) -> None:
        try:
            self._future.set_result(plan(self.sample, self._check))
        except BaseException as error:  # noqa: BLE001 -- it crosses to the consumer, which raises it
            self._future.set_exception(error)

    def _check(self) -> None:
        if self._stopping.is_set():
            raise RunStoppedError

    def result(self) -> T:
        """Wait for the plan; raise what went wrong."""
        return self._future.result()

    def stop(self, discard: Callable[[T], None]) -> None:
        """Wait for the thread, which ends at its next step, and discard a plan that it has finished."""
        self._stopping.set()
        self._thread.join()
        if self._future.exception() is None:
            discard(self._future.result())
