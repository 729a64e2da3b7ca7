"""Which block comes next when many slides are under way: one of each slide in turn.

So that a huge or slow slide does not stand alone at the end. Arithmetic on queues; it knows no dask.
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
        """Queue work under a name, behind what is already there."""
        queue = self._queues.setdefault(name, deque())
        queue.extend(work)
        if not queue:
            del self._queues[name]

    def names(self) -> int:
        """Return how many names have work waiting."""
        return len(self._queues)

    def pop(self) -> tuple[str, T]:
        """Take the next piece: from the name that has waited longest.

        Raises
        ------
        IndexError
            If there is none.
        """
        if not self._queues:
            raise IndexError("no work is left")
        name, queue = self._queues.popitem(last=False)
        work = queue.popleft()
        if queue:
            self._queues[name] = queue
        return name, work

    def drop(self, name: str) -> list[T]:
        """Take away all that waits under a name."""
        return list(self._queues.pop(name, ()))
