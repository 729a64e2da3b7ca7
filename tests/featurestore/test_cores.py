"""Cores are counted as the kernel gives them: the lowest of affinity, quotas and allotment, from made-up folders."""

import os
from pathlib import Path

import pytest

from featurestore.cores import CoreCount, CoreLimit, count_cores

V1_MOUNT = "31 23 0:29 {mounted} {at} rw,relatime - cgroup cgroup rw,cpu,cpuacct"
V2_MOUNT = "41 31 0:38 {mounted} {at} rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate"
OTHER_MOUNT = "42 31 0:39 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"


@pytest.fixture(autouse=True)
def large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(48)))


def machine(root: Path, groups: str, mounts: str, **files: str) -> Path:
    """Write files of the kernel below a folder."""
    written = {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts, **files}
    for name, text in written.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def v2(root: Path, group: str, files: dict[str, str], mounted: str = "/") -> Path:
    mounts = "\n".join([OTHER_MOUNT, V2_MOUNT.format(mounted=mounted, at="/sys/fs/cgroup")])
    return machine(root, f"0::{group}", mounts, **{f"sys/fs/cgroup/{name}": files[name] for name in files})


def v1(root: Path, group: str, quotas: dict[str, tuple[int, int]], mounted: str = "/") -> Path:
    at = "/sys/fs/cgroup/cpu,cpuacct"
    files = {}
    for name, (quota, period) in quotas.items():
        files[f"{at[1:]}/{name}cpu.cfs_quota_us"] = str(quota)
        files[f"{at[1:]}/{name}cpu.cfs_period_us"] = str(period)
    groups = f"9:memory:/else\n4:cpu,cpuacct:{group}\n0::/"
    return machine(root, groups, V1_MOUNT.format(mounted=mounted, at=at), **files)


def test_without_a_quota_the_affinity_counts(tmp_path: Path) -> None:
    assert count_cores(tmp_path, {}).cores == 48
    assert count_cores(v2(tmp_path / "v2", "/pod", {"pod/cpu.max": "max 100000"}), {}).cores == 48
    assert count_cores(v1(tmp_path / "v1", "/", {"": (-1, 100_000)}), {}).cores == 48


def test_a_quota_of_either_version_counts(tmp_path: Path) -> None:
    assert count_cores(v2(tmp_path / "v2", "/", {"cpu.max": "300000 100000"}), {}).cores == 3
    assert count_cores(v1(tmp_path / "v1", "/job", {"job/": (350_000, 50_000)}), {}).cores == 7


def test_of_nested_groups_the_lowest_counts(tmp_path: Path) -> None:
    outer = {
        "kubepods/cpu.max": "500000 100000",
        "kubepods/pod/cpu.max": "max 100000",
        "kubepods/pod/c/cpu.max": "1100000 100000",
    }
    counted = count_cores(v2(tmp_path / "outer", "/kubepods/pod/c", outer), {})
    assert counted.cores == 5
    assert counted.decisive.source == "the CPU quota of /sys/fs/cgroup/kubepods"
    inner = {
        "slurm/": (1_300_000, 100_000),
        "slurm/job/": (200_000, 100_000),
        "slurm/job/step/": (-1, 100_000),
    }
    assert count_cores(v1(tmp_path / "inner", "/slurm/job/step", inner), {}).cores == 2


def test_a_container_sees_its_own_group_at_the_mount(tmp_path: Path) -> None:
    """Its name there is the host's, which leads nowhere within the container."""
    quota = {"": (500_000, 100_000)}
    assert count_cores(v1(tmp_path / "bind", "/docker/3f", quota, mounted="/docker/3f"), {}).cores == 5
    assert count_cores(v1(tmp_path / "other", "/docker/3f", quota, mounted="/docker/77"), {}).cores == 5
    assert count_cores(v2(tmp_path / "left", "/../7a", {"cpu.max": "200000 100000"}), {}).cores == 2


@pytest.mark.parametrize(
    ("quota", "cores"), [("150000 100000", 1), ("20000 100000", 1), ("299000 100000", 2)]
)
def test_a_part_of_a_core_is_no_core_but_one_is_always_there(tmp_path: Path, quota: str, cores: int) -> None:
    assert count_cores(v2(tmp_path, "/", {"cpu.max": quota}), {}).cores == cores


def test_a_quota_above_the_cores_gives_no_more(tmp_path: Path) -> None:
    assert count_cores(v2(tmp_path, "/", {"cpu.max": "9900000 100000"}), {}).cores == 48


@pytest.mark.parametrize("text", ["", "max", "abc def", "100000 0", "-5 100000"])
def test_what_cannot_be_understood_is_no_limit(tmp_path: Path, text: str) -> None:
    assert count_cores(v2(tmp_path, "/", {"cpu.max": text}), {}).cores == 48


@pytest.mark.parametrize(
    ("environ", "cores"),
    [
        ({"SLURM_JOB_ID": "11", "SLURM_CPUS_PER_TASK": "7", "SLURM_CPUS_ON_NODE": "14"}, 7),
        ({"SLURM_JOB_ID": "11", "SLURM_CPUS_ON_NODE": "14"}, 14),
        ({"JOB_ID": "11", "NSLOTS": "5"}, 5),
        ({"PBS_JOBID": "11", "NCPUS": "3"}, 3),
        ({"LSB_JOBID": "11", "LSB_DJOB_NUMPROC": "2"}, 2),
        ({"NCPUS": "3", "SLURM_CPUS_PER_TASK": "3"}, 48),  # outside a job
        ({"JOB_ID": "11", "NSLOTS": "many"}, 48),
    ],
)
def test_a_batch_systems_allotment_counts(tmp_path: Path, environ: dict[str, str], cores: int) -> None:
    assert count_cores(tmp_path, environ).cores == cores


@pytest.mark.parametrize(("setting", "threads"), [("2", 2), ("999", 48), ("0", 48), ("five", 48), ("3,2", 3)])
def test_omp_num_threads_only_lowers_the_threads(tmp_path: Path, setting: str, threads: int) -> None:
    counted = count_cores(tmp_path, {"OMP_NUM_THREADS": setting})
    assert (counted.cores, counted.threads) == (48, threads)


def test_the_line_for_a_person_names_what_decides() -> None:
    limits = (CoreLimit(64, "the machine"), CoreLimit(48, "affinity"), CoreLimit(1.5, "the CPU quota of /c"))
    line = CoreCount(limits, 8).describe()
    assert line == "1 core by the CPU quota of /c (1.5); the machine 64, affinity 48; OMP_NUM_THREADS 8"
