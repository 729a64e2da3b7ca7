"""How a pass visits sections: one after another in this process, or several at once on the workers of a dask cluster.

A pass is a function of one section. It reads no file of the training and writes none: what it needs is handed to it, and
what it returns is saved here, section by section in a fixed order. Therefore a worker needs the store and the expression
files alone, a run that is interrupted goes on from the sections that are saved, and the result is the same bits whatever
the number of workers.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from histosge.threads import usable_cores

Shared = TypeVar("Shared")
Item = TypeVar("Item")
Result = TypeVar("Result")
OnStep = Callable[[str], None]
"""Called with the slide id of each section before it is worked on, or waited for."""


class SectionTasks(Protocol):
    """Runs a function on sections."""

    @property
    def threads(self) -> int:
        """Return how many threads of this process may compute while no section is worked on."""
        ...

    def run(
        self,
        work: Callable[[Shared, Item], Result],
        shared: Shared,
        items: Iterable[tuple[str, Item | None]],
        on_step: OnStep,
    ) -> Iterator[Result | None]:
        """Yield ``work(shared, item)`` of every section, in order.

        Parameters
        ----------
        work
            Of a module, so that it pickles. It may return an iterator: that is used up as it is made in this process,
            and comes as a list from a worker.
        shared
            What it needs for all sections; must pickle.
        items
            Slide id of each section with what `work` needs of it; None for one that was worked on in an earlier run,
            whose result is None. They are made as they are needed, a few ahead.
        on_step
            See `OnStep`.
        """
        ...


class InThisProcess:
    """Works on one section after another."""

    @property
    def threads(self) -> int:
        """Return as many as there are cores for this process."""
        return usable_cores()

    def run(
        self,
        work: Callable[[Shared, Item], Result],
        shared: Shared,
        items: Iterable[tuple[str, Item | None]],
        on_step: OnStep,
    ) -> Iterator[Result | None]:
        """Yield what `SectionTasks.run` does."""
        for slide_id, item in items:
            on_step(slide_id)
            yield None if item is None else work(shared, item)
