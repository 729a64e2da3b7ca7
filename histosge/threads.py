"""Several threads on one stream of work, each with matrix products of its own.

Small products that are split among cores leave the cores waiting for each other. Whole products on each core do not.
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
    setting = os.environ.get("OMP_NUM_THREADS", "")
    if setting.isdigit() and int(setting) > 0:
        return int(setting)
    # A batch system may confine a process to some cores; `os.cpu_count` counts all of the machine.
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
                # One more than the threads: the next result is computed while the caller uses this one.
                if len(running) > threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            # Where the caller stops early, or an item fails: what has not begun is not begun any more.
            for future in running:
                future.cancel()
