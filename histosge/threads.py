"""Several threads on one stream of work, each with matrix products of its own.

A product of small matrices shared out among cores keeps them waiting for each other; whole products side by side do not.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import threadpool_limits

Item = TypeVar("Item")
Result = TypeVar("Result")


def usable_cores() -> int:
    """Return how many cores this process is meant to use: ``OMP_NUM_THREADS`` where it is set."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Yield what `prefetch` yields, with one thread of BLAS each meanwhile: also for the caller between two results."""
    with threadpool_limits(1, user_api="blas"):
        yield from prefetch(work, items, threads)


def prefetch(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Yield ``work(item)`` for every item, in order, with `threads` of them at work and one more in memory.

    Items are taken in the calling thread. An error of one item is raised in its turn; those behind it that have begun
    are finished first.
    """
    with ThreadPoolExecutor(threads) as executor:
        running: deque[Future[Result]] = deque()
        try:
            for item in items:
                running.append(executor.submit(work, item))
                if len(running) > threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
