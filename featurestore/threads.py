"""How many threads the libraries use: none more than there are cores, and one level of threads at a time.

OpenBLAS and OpenMP start a thread for each core that the machine shows. Where fewer are ours, or where several of our own
threads call them at once, their threads wait for each other, and some of them spin while they wait.
"""

import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from importlib import import_module

from threadpoolctl import ThreadpoolController

from featurestore.cores import THREAD_SETTINGS, CoreCount, count_cores

_SPINS = 10_000
"""Turns that a thread of OpenMP waits for its next work before it sleeps, about 30 microseconds. By default it is 300,000:
encoding with a ViT-S/16 on two cores beside other work took 6.4 CPU-seconds, and 4.4 with this."""


def spin_briefly() -> None:
    """Let OpenMP threads, of torch, sleep soon where they wait: those that spin take the core from what they wait for.

    To be called before torch is loaded; child processes inherit it. A setting of the user's stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(_SPINS))


def keep_to_own_cores() -> CoreCount:
    """Let the libraries use no more threads than this process has cores, here and in the processes that it starts.

    Where the libraries' own count is right, nothing changes: it may be lower for a reason, as on cores that run two
    threads each.

    Returns
    -------
    CoreCount
        What was counted.
    """
    counted = count_cores()
    # Without a quota the libraries count as we do: they know the affinity.
    if max(counted.shown, counted.threads_setting) <= counted.cores:
        return counted
    for name in THREAD_SETTINGS:  # for libraries that are not loaded yet, and for child processes
        os.environ[name] = str(counted.threads)
    for library in ThreadpoolController().lib_controllers:
        if library.num_threads is not None and library.num_threads > counted.threads:
            library.set_num_threads(counted.threads)
    torch = sys.modules.get("torch")
    # torch gives its own setting to each thread that calls it for the first time.
    if torch is not None and torch.get_num_threads() > counted.threads:
        torch.set_num_threads(counted.threads)
    return counted


def one_torch_thread_here() -> None:
    """Let torch compute on the calling thread alone, for as long as that thread lives: for threads of a pool.

    `torch.set_num_threads` would do the same, but what it sets is also taken over by every thread that calls torch for
    the first time later: an encoder that begins after a pool of ours would get one core (torch 2.13).
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return
    torch.get_num_threads()  # at a thread's first call torch sets OpenMP to its own number
    ThreadpoolController().limit(limits=1, user_api="openmp")


_tasks_lock = threading.Lock()
_n_tasks = 0
_tasks_limit = ExitStack()


@contextmanager
def one_blas_thread_in_tasks() -> Iterator[None]:
    """Compute a worker's task on one thread of BLAS; several tasks may run in one process.

    Products of matrices by several threads have other bits than by one, and workers differ in their numbers of cores.
    """
    global _n_tasks
    # The limit is the process's: the task that ends first must not lift it while another one computes.
    with _tasks_lock:
        if _n_tasks == 0:
            _tasks_limit.enter_context(_one_blas_thread())
        _n_tasks += 1
    try:
        yield
    finally:
        with _tasks_lock:
            _n_tasks -= 1
            if _n_tasks == 0:
                _tasks_limit.close()


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    # By a thread of its own, which lives as long: threadpoolctl (3.8) ignores all other threads than the one that holds
    # a limit, and the task that ends last is seldom the one that began first.
    with ThreadPoolExecutor(1) as holder:
        limit = holder.submit(_loaded_libraries().limit, limits=1, user_api="blas").result()
        holder.submit(limit.__enter__).result()
        try:
            yield
        finally:
            holder.submit(limit.__exit__, None, None, None).result()


@lru_cache(maxsize=1)
def _loaded_libraries() -> ThreadpoolController:
    # Kept: to look for them reads the whole memory map of the process, 4 ms each time. That of scipy's decompositions
    # must be loaded by then.
    import_module("scipy.linalg")
    return ThreadpoolController()
