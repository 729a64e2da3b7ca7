"""The order of blocks when many slides are processed at once: one of each slide in turn.

In the order of the slides, a huge or slow one at the end would keep few workers busy and the others idle.
Queues only; it knows no dask.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class RoundRobin(Generic[T]):
    """Queues of work by name, served in turn."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def add(self, name: str, work: Iterable[T]) -> None:
        """Append work to the queue of a name."""
        queue = self._queues.setdefault(name, deque())
        queue.extend(work)
        if not queue:
            del self._queues[name]

    def names(self) -> int:
        """Return how many names have work queued."""
        return len(self._queues)

    def pop(self) -> tuple[str, T]:
        """Take the next item, from the name that was served longest ago.

        Raises
        ------
        IndexError
            If no work is queued.
        """
        if not self._queues:
            raise IndexError("no work is queued")
        name, queue = self._queues.popitem(last=False)
        work = queue.popleft()
        if queue:
            self._queues[name] = queue  # at the end of the order: after all other names
        return name, work

    def drop(self, name: str) -> list[T]:
        """Remove the queue of a name, and return its items."""
        return list(self._queues.pop(name, ()))
