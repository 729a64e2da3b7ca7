"""How many threads the libraries use: none more than there are cores, and one level of threads at a time.

OpenBLAS and OpenMP start a thread for each core that the machine shows. Where fewer are ours, or where several of our own
threads call them at once, their threads wait for each other, and some of them spin while they wait.
"""

import os
import sys

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
