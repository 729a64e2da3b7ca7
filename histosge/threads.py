"""Several threads on one stream of work, each with matrix products of its own.

Small products that are split among cores leave the cores waiting for each other. Whole products on each core do not.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import lru_cache
from importlib import import_module
from typing import TypeVar

from threadpoolctl import ThreadpoolController

from featurestore.cores import count_cores
from featurestore.threads import one_torch_thread_here

Item = TypeVar("Item")
Result = TypeVar("Result")

_LARGE_PRODUCT = 2_000_000_000
"""Multiplications from which on a product may use all cores: 50 ms of one core; its threads may wait for some ms."""

FEW_THREADS = 4
"""That hold arrays of many spots each, at most: 0.1 to 0.2 GB a thread, however many cores there are."""


def usable_cores() -> int:
    """Return how many cores this process is meant to use: those that are its own, or fewer by ``OMP_NUM_THREADS``."""
    return count_cores().threads


@lru_cache(maxsize=1)
def _controller() -> ThreadpoolController:
    # Kept: looking for the loaded libraries reads the whole memory map of the process, 4 ms each time. Those of numpy
    # and scipy, which the decompositions use, must be loaded by then.
    import_module("scipy.linalg")
    return ThreadpoolController()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Run products and decompositions of matrices on the calling thread alone; also a decorator.

    A training makes thousands of small products. Split among cores they cost more than they save, and beside another
    process their threads wait for each other: training on three sections of 250 spots x 1,024 numbers took 18.8
    CPU-seconds on two busy cores, and 7.5 on one thread. A product that is large is allowed all cores by
    `blas_threads_for`.
    """
    with _controller().limit(limits=1, user_api="blas"):
        yield


@contextmanager
def blas_threads_for(multiplications: int) -> Iterator[None]:
    """Let one large product use all cores that are ours, within `one_blas_thread`; a small one changes nothing.

    Only for the thread that leads a training, never in several at once: the number holds for the whole process.
    """
    if multiplications < _LARGE_PRODUCT or usable_cores() == 1:
        yield
        return
    with _controller().limit(limits=usable_cores(), user_api="blas"):
        yield


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Yield what `prefetch` yields, with one thread of BLAS each meanwhile: also for the caller between two results.

    In the threads that work, torch computes on one thread, too: several that each split their products among all cores
    would be one level of threads too many.
    """
    with one_blas_thread():
        yield from prefetch(work, items, threads, one_torch_thread_here)


def prefetch(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int,
    begin: Callable[[], None] | None = None,
) -> Iterator[Result]:
    """Yield ``work(item)`` for every item, in order, with `threads` of them at work and one more in memory.

    Items are taken in the calling thread. An error of one item is raised in its turn; those behind it that have begun
    are finished first. Each thread calls `begin` first. Context variables are the caller's.
    """
    with ThreadPoolExecutor(threads, initializer=begin) as executor:
        running: deque[Future[Result]] = deque()
        try:
            for item in items:
                # A copy for each item: two threads cannot be in one context. Without it they would not know what was
                # chosen for the run, such as the device.
                running.append(executor.submit(copy_context().run, work, item))
                # One more than the threads: the next result is computed while the caller uses this one.
                if len(running) > threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            # Where the caller stops early, or an item fails: what has not begun is not begun any more.
            for future in running:
                future.cancel()
