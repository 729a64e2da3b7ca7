"""Libraries keep to the cores that are ours; each test in a process of its own, as the settings last as long as one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# The kernel's files, made up: a quota of two cores on a machine that shows five.
BEGIN = """
import os, sys, threading
from functools import partial
from pathlib import Path
import numpy
from threadpoolctl import threadpool_info, threadpool_limits
import featurestore.cores, featurestore.threads
os.cpu_count, os.sched_getaffinity = (lambda: 5), (lambda _: set(range(5)))
counting = partial(featurestore.cores.count_cores, Path(sys.argv[1]))
featurestore.threads.count_cores = lambda: counting(environ=dict(os.environ))

def blas():
    return {info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas"}

def in_a_thread(work):
    results = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start(); thread.join()
    return results[0]
"""


def run(folder: Path, code: str, quota: str, **environ: str) -> list[str]:
    files = {
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": "41 31 0:38 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        "sys/fs/cgroup/cpu.max": f"{quota} 100000\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    ours = ("_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # what the code under test reads or sets
    kept = {name: value for name, value in os.environ.items() if not name.endswith(ours)}
    command = [sys.executable, "-c", BEGIN + code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env={**kept, **environ}, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


LIMITED = """
threadpool_limits(4, user_api="blas")  # more than the cores that a machine for tests may have
numpy_before = blas()
featurestore.threads.keep_to_own_cores()
import scipy.linalg  # brings a BLAS of its own, loaded only now
print(numpy_before == {4}, blas() == {2}, os.environ["OMP_NUM_THREADS"], os.environ["OPENBLAS_NUM_THREADS"])
"""


def test_a_quota_limits_libraries_that_are_loaded_and_those_that_come_later(tmp_path: Path) -> None:
    found = run(tmp_path, LIMITED, "250000")
    assert found == ["True", "True", "2", "2"]


UNTOUCHED = """
before = dict(os.environ), blas()
featurestore.threads.keep_to_own_cores()
print(before == (dict(os.environ), blas()))
"""


@pytest.mark.parametrize(
    ("quota", "environ"), [("max", {}), ("max", {"OMP_NUM_THREADS": "3"}), ("900000", {})]
)
def test_without_a_lower_limit_nothing_changes(tmp_path: Path, quota: str, environ: dict[str, str]) -> None:
    assert run(tmp_path, UNTOUCHED, quota, **environ) == ["True"]


LOWERED = """
featurestore.threads.keep_to_own_cores()
print(os.environ["OMP_NUM_THREADS"])
"""


@pytest.mark.parametrize(
    ("setting", "quota", "threads"), [("64", "max", "5"), ("64", "300000", "3"), ("1", "300000", "1")]
)
def test_a_setting_is_lowered_to_the_cores_and_never_raised(
    tmp_path: Path, setting: str, quota: str, threads: str
) -> None:
    assert run(tmp_path, LOWERED, quota, OMP_NUM_THREADS=setting) == [threads]


SPINS = """
featurestore.threads.spin_briefly()
print(os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("environ", "spins"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_waiting_threads_sleep_soon_unless_the_user_has_chosen(
    tmp_path: Path, environ: dict[str, str], spins: str
) -> None:
    assert run(tmp_path, SPINS, "max", **environ) == [spins]


TORCH = """
import torch
torch.set_num_threads(4)
featurestore.threads.keep_to_own_cores()
print(torch.get_num_threads(), in_a_thread(torch.get_num_threads))
def pooled():
    featurestore.threads.one_torch_thread_here()
    return torch.get_num_threads()
print(in_a_thread(pooled), torch.get_num_threads(), in_a_thread(torch.get_num_threads))
"""


@pytest.mark.torch
def test_torch_has_one_thread_in_a_pool_and_its_own_number_in_threads_that_come_later(tmp_path: Path) -> None:
    assert run(tmp_path, TORCH, "300000") == ["3", "3", "1", "3", "3"]


TASKS = """
def task(begun, may_end, ended):
    with featurestore.threads.one_blas_thread_in_tasks():
        begun.set()
        may_end.wait()
    ended.set()
    leave.wait()  # a worker's threads outlive its tasks

import scipy.linalg
# By a thread that ends: threadpoolctl ignores other threads while the one that set a number lives.
in_a_thread(lambda: threadpool_limits(3, user_api="blas"))
found = [blas() == {3}]
leave = threading.Event()
tasks = [[threading.Event() for _ in range(3)] for _ in range(2)]
threads = [threading.Thread(target=task, args=events) for events in tasks]
for thread, (begun, _, _) in zip(threads, tasks):
    thread.start()
    begun.wait()
found.append(blas() == {1})
for (_, may_end, ended), number in zip(tasks, (1, 3)):
    may_end.set()
    ended.wait()
    found.append(blas() == {number})
leave.set()
print(*found)
"""


def test_the_limit_of_a_workers_tasks_lasts_until_the_last_of_them_ends(tmp_path: Path) -> None:
    assert run(tmp_path, TASKS, "max") == ["True"] * 4
