"""Each worker process is shown one GPU: looked at in the processes themselves, on a machine that need not have one."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from distributed import Client

from featurestore.embedding.dask_clients import gpu_client, local_client
from featurestore.embedding.gpu_sharing import (
    InstalledGpu,
    auto_workers,
    installed_gpus,
    visible_gpus,
    worker_environments,
)

LISTED = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-11aa-17)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-22bb-19)
GPU 2: NVIDIA H100 80GB HBM3 (UUID: GPU-33cc-23)
"""
DIVIDED = """\
GPU 0: NVIDIA A100 (UUID: GPU-44dd)
  MIG 3g.20gb     Device  0: (UUID: MIG-55ee)
  MIG 3g.20gb     Device  1: (UUID: MIG-66ff)
GPU 1: NVIDIA A100 (UUID: GPU-7700)
"""


def _driver(folder: Path, monkeypatch: pytest.MonkeyPatch, listed: str, code: int = 0) -> None:
    """Put a command in the place of the driver's own, which lists these GPUs."""
    command = folder / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n[ \"$1\" = -L ] && cat <<'END'\n{listed}END\nexit {code}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _driver(tmp_path, monkeypatch, LISTED)


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize(
    ("setting", "names"),
    [
        (None, ("0", "1", "2")),
        ("", ()),
        (" ", ()),
        ("-1", ()),
        ("NoDevFiles", ()),
        ("2", ("2",)),
        ("2,0", ("2", "0")),
        ("1, 2 ,1", ("1", "2")),
        # CUDA shows none behind the first that is not there.
        ("1,7,0", ("1",)),
        ("0,,1", ("0",)),
        ("GPU-33cc-23,GPU-11aa-17", ("GPU-33cc-23", "GPU-11aa-17")),
        ("GPU-22", ("GPU-22",)),
        ("GPU-", ()),
        ("GPU-99", ()),
    ],
)
def test_the_visible_gpus_are_those_that_cuda_would_show(
    setting: str | None, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if setting is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    assert visible_gpus() == names


def test_a_divided_card_gives_its_instances(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _driver(tmp_path, monkeypatch, DIVIDED)
    assert installed_gpus() == (InstalledGpu("GPU-44dd", ("MIG-55ee", "MIG-66ff")), InstalledGpu("GPU-7700"))
    assert visible_gpus({}) == ("MIG-55ee", "MIG-66ff", "1")
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "MIG-66ff"}) == ("MIG-66ff",)
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "MIG-GPU-44dd/1/0"}) == ("MIG-GPU-44dd/1/0",)


def test_a_driver_that_fails_and_none_at_all_are_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _driver(tmp_path, monkeypatch, LISTED, code=9)
    assert visible_gpus({}) == ()
    monkeypatch.setenv("PATH", "")
    assert visible_gpus({}) == ()
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0"}) == ()


def test_auto_is_a_worker_for_each_gpu_or_for_every_two_cores() -> None:
    assert auto_workers(("3", "1", "0"), cores=2) == 3
    assert [auto_workers((), cores) for cores in (1, 2, 3, 7, 64)] == [1, 1, 1, 3, 32]


def test_gpus_are_given_out_in_turn() -> None:
    shown = [one["CUDA_VISIBLE_DEVICES"] for one in worker_environments(("4", "GPU-a", "1"), 5)]
    assert shown == ["4", "GPU-a", "1", "4", "GPU-a"]
    # Without GPUs nothing is set: what the user hid stays hidden.
    assert worker_environments((), 2) == [{}, {}]


def _seen() -> tuple[str | None, bool]:
    return os.environ.get("CUDA_VISIBLE_DEVICES"), "torch" in sys.modules


def _pid() -> int:
    return os.getpid()


def _sorted(client: Client) -> list[tuple[str | None, bool]]:
    return sorted(client.run(_seen).values())


@pytest.mark.parametrize("setting", [pytest.param(None, marks=pytest.mark.slow), "GPU-22bb-19,0"])
@pytest.mark.usefixtures("three")
def test_workers_get_their_gpu_before_torch_is_loaded_and_again_after_a_death(
    setting: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if setting is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    gpus = visible_gpus()
    with local_client(3, threads=1, gpus=gpus) as client:
        expected = sorted((name, False) for name in (*gpus, *gpus)[:3])
        assert _sorted(client) == expected
        (victim, pid), *_ = client.run(_pid).items()
        before = client.run(_seen)[victim]
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 180
        while victim in client.scheduler_info(n_workers=-1)["workers"] or len(client.nthreads()) < 3:
            assert time.monotonic() < deadline, "the nanny starts no new process"
            time.sleep(0.05)
        assert pid not in client.run(_pid).values()
        assert _sorted(client) == expected
        assert before in expected
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == setting


@pytest.mark.usefixtures("three")
def test_auto_starts_a_worker_for_each_gpu_and_a_run_on_the_cpu_takes_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    with gpu_client("auto") as client:
        assert _sorted(client) == [("0", False), ("2", False)]
    with gpu_client(1, "cpu") as client:
        assert _sorted(client) == [("2,0", False)]


def test_without_a_gpu_workers_keep_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "31")
    with gpu_client(2) as client:
        assert _sorted(client) == [("", False), ("", False)]
    assert os.environ["OMP_NUM_THREADS"] == "31"
