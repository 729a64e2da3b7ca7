"""How many cores this process may use, and which limit decides.

The machine shows all of its cores to a container or a batch job that may use only some of them. Libraries that start a
thread for each core shown then wait for each other: their threads are stopped in turn, for up to a tenth of a second.

Terms
    quota     CPU time per wall-clock time of a control group: the ``--cpus`` of a container, the CPU limit of a pod
    affinity  the cores that the scheduler of the kernel lets this process run on: ``taskset``, SLURM, ``--cpuset-cpus``
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

THREAD_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Read by the libraries of numpy and torch when they are loaded, and by those of child processes."""

_BATCH_SYSTEMS = (
    # Job, then CPUs of this task on this node. SLURM sets the first count only for a job that asked with -c.
    ("SLURM", "SLURM_JOB_ID", ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE")),
    ("PBS", "PBS_JOBID", ("NCPUS",)),
    ("Grid Engine", "JOB_ID", ("NSLOTS",)),
    ("LSF", "LSB_JOBID", ("LSB_DJOB_NUMPROC",)),
)
_ROOT = Path("/")


@dataclass(frozen=True)
class CoreLimit:
    """One limit.

    Parameters
    ----------
    cores
        CPUs that it leaves; a quota may be a fraction.
    source
        What sets it, for a person to find.
    """

    cores: float
    source: str


@dataclass(frozen=True)
class CoreCount:
    """All limits that hold for this process.

    Parameters
    ----------
    limits
        The cores of the machine first.
    threads_setting
        Value of ``OMP_NUM_THREADS``; 0 if it is not set.
    """

    limits: tuple[CoreLimit, ...]
    threads_setting: int = 0

    @property
    def cores(self) -> int:
        """Cores that are ours. A part of one is left out, as its thread would make the others wait; at least 1."""
        return max(1, int(self.decisive.cores))

    @property
    def threads(self) -> int:
        """Threads that compute at once: the cores, or fewer by ``OMP_NUM_THREADS``."""
        return min(self.cores, self.threads_setting or self.cores)

    @property
    def decisive(self) -> CoreLimit:
        """The lowest limit; of equal ones the first."""
        return min(self.limits, key=lambda limit: limit.cores)

    @property
    def shown(self) -> int:
        """Cores that libraries count: those of the machine, or of the affinity."""
        return int(min(limit.cores for limit in self.limits[:2]))

    def describe(self) -> str:
        """Return one line: the cores, what decides, and the other limits."""
        unit = "core" if self.cores == 1 else "cores"
        others = [f"{limit.source} {limit.cores:g}" for limit in self.limits if limit is not self.decisive]
        line = f"{self.cores} {unit} by {self.decisive.source} ({self.decisive.cores:g})"
        line += f"; {', '.join(others)}" if others else ""
        return line + (f"; OMP_NUM_THREADS {self.threads_setting}" if self.threads_setting else "")


def count_cores(root: Path = _ROOT, environ: Mapping[str, str] = os.environ) -> CoreCount:
    """Count the cores that this process may use: affinity, quotas of control groups, and a batch system's allotment.

    Parameters
    ----------
    root
        Folder with ``proc`` and ``sys``.
    environ
        Environment variables.
    """
    machine = os.cpu_count() or 1
    # Not on every system; `os.cpu_count` counts all cores of the machine.
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    limits = [CoreLimit(machine, "the machine"), CoreLimit(affinity, "affinity")]
    # Of nested groups each limits all within it, so the lowest counts.
    limits += sorted(_quotas(root), key=lambda limit: limit.cores)[:1]
    limits += _batch_system(environ)
    return CoreCount(tuple(limits), _positive(environ.get("OMP_NUM_THREADS", "")))


def _positive(text: str) -> int:
    # OpenMP also takes a list, one number per nested level: the first is meant here.
    first = text.split(",")[0].strip()
    return int(first) if first.isascii() and first.isdigit() else 0


def _batch_system(environ: Mapping[str, str]) -> Iterator[CoreLimit]:
    """Yield what a batch system gave to this task. Not all of them confine a job to it by affinity or a quota."""
    for system, job, names in _BATCH_SYSTEMS:
        if job in environ:
            for name in names:
                if count := _positive(environ.get(name, "")):
                    yield CoreLimit(count, f"{system} ({name})")
                    break


# ---------------------------------------------------------------- control groups


def _quotas(root: Path) -> Iterator[CoreLimit]:
    """Yield the quota of this process's control group and of each above it, version 1 and 2."""
    groups = _groups(_read(root / "proc/self/cgroup"))
    for mount in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = mount.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        is_v2 = kind[0] == "cgroup2"
        if is_v2:
            group = groups.get("")
        elif kind[0] == "cgroup" and "cpu" in kind[2].split(","):
            group = groups.get("cpu")
        else:
            continue
        for folder in _folders(group, _unescaped(fields[3]), PurePosixPath(_unescaped(fields[4]))):
            quota = _quota_v2 if is_v2 else _quota_v1
            here = root / folder.relative_to("/")
            if cores := quota(here):
                yield CoreLimit(cores, f"the CPU quota of {folder}")


def _groups(text: str) -> dict[str, str]:
    """Return controller -> group of a ``/proc/self/cgroup``; that of version 2 under the empty name."""
    rows = [line.split(":", 2) for line in text.splitlines()]
    return {name: row[2] for row in rows if len(row) == 3 for name in row[1].split(",")}


def _folders(group: str | None, mounted: str, mount: PurePosixPath) -> Iterator[PurePosixPath]:
    """Yield the folder of a group and those above it, as far as they are mounted here.

    Parameters
    ----------
    group
        As ``/proc/self/cgroup`` names it.
    mounted
        Group that `mount` shows: in a container often its own group and not the machine's topmost one.
    """
    if group is None:
        return
    try:
        within = PurePosixPath(group).relative_to(mounted)
    except ValueError:
        within = PurePosixPath()  # a name as the host sees it: what is mounted is this process's own group
    if ".." in within.parts:  # so does a process that was moved out of its container's group
        within = PurePosixPath()
    folder = mount / within
    yield folder
    while folder != mount:
        folder = folder.parent
        yield folder


def _quota_v2(folder: Path) -> float | None:
    fields = _read(folder / "cpu.max").split()
    return _ratio(fields[0], fields[1]) if len(fields) == 2 else None


def _quota_v1(folder: Path) -> float | None:
    return _ratio(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))


def _ratio(quota: str, period: str) -> float | None:
    """Return CPUs; None without a limit, which version 2 writes as ``max`` and version 1 as -1."""
    used, per = _positive(quota), _positive(period)
    return used / per if used and per else None


def _unescaped(path: str) -> str:
    # A mount table writes blanks and backslashes in octal.
    return path.replace("\\040", " ").replace("\\134", "\\")


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # other systems have no such file, and a group may be hidden
        return ""
