"""Iterators that run in threads of their own, a few items ahead of who uses them.

Items come in order, an error comes in its turn, and a consumer that stops early stops the threads.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import chain
from typing import Any, Generic, TypeVar

READ_AHEAD = 4
"""Batches that are read while one is encoded: they even out slow tiles, and cost memory in every thread."""

T = TypeVar("T")


def read_in_turn(
    streams: Sequence[Callable[[], Iterator[T]]], threads: int, depth: int = READ_AHEAD
) -> Generator[T, None, None]:
    """Run several iterators, one after the other, or `threads` of them at once, each in a thread of its own.

    Items come in the order of the iterators, whatever the number of threads. With one thread a single `read_ahead` goes
    through all iterators.
    """
    if threads <= 1 or len(streams) <= 1:
        yield from read_ahead(lambda: chain.from_iterable(stream() for stream in streams), depth)
        return
    running: deque[_ReadAhead[T]] = deque()
    waiting = deque(streams)
    try:
        while waiting or running:
            while waiting and len(running) < threads:
                running.append(_ReadAhead(waiting.popleft(), depth))
            yield from running[0].items()
            running.popleft().close()
    finally:
        for reader in running:
            reader.close()


def read_ahead(items: Callable[[], Iterator[T]], depth: int = READ_AHEAD) -> Generator[T, None, None]:
    """Run an iterator in a thread, at most `depth` items ahead of its consumer.

    An exception in the thread is raised at the consumer; a consumer that stops early stops the thread.
    """
    reader = _ReadAhead(items, depth)
    try:
        yield from reader.items()
    finally:
        reader.close()


class _ReadAhead(Generic[T]):
    """An iterator that runs in a thread of its own from now on.

    Parameters
    ----------
    items
        Makes the iterator, in the thread.
    depth
        Items that wait at most.
    """

    def __init__(self, items: Callable[[], Iterator[T]], depth: int) -> None:
        self._make = items
        self._channel: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
        self._thread.start()

    def _put(self, kind: str, value: Any) -> bool:
        while not self._stop.is_set():
            try:
                # With a timeout: a consumer that stopped takes nothing more, and the thread has to notice.
                self._channel.put((kind, value), timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def _run(self) -> None:
        try:
            for item in self._make():
                if not self._put("item", item):
                    return
        except BaseException as error:  # noqa: BLE001  # it crosses to the consumer, which raises it
            self._put("error", error)
        else:
            self._put("end", None)

    def items(self) -> Iterator[T]:
        """Yield the items as they come; an exception in the thread is raised here."""
        while True:
            kind, value = self._channel.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value

    def close(self) -> None:
        """Stop the thread and wait for it: a slide must not be closed while it is read."""
        self._stop.set()
        self._thread.join()
