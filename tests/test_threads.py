"""Tests run every library on one thread, here and in child processes: beside another process more cost tenfold."""

import os
import subprocess
import sys

from threadpoolctl import threadpool_info


def test_numpy_and_scipy_have_one_thread() -> None:
    import scipy.linalg  # noqa: F401 -- scipy brings a BLAS of its own

    blas = [info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas"]
    assert set(blas) == {1}


def test_torch_has_one_thread_here_and_in_a_child_process() -> None:
    import torch

    code = "import torch; print(torch.get_num_threads())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (torch.get_num_threads(), child.stdout.strip()) == (1, "1")


def test_child_processes_keep_bytecode() -> None:
    assert "PYTHONDONTWRITEBYTECODE" not in os.environ
