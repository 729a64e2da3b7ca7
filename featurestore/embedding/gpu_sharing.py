"""Which GPUs this process may use, and which one each worker process is given.

It loads no torch and starts no CUDA context: a process that only starts workers must take no memory on a GPU, and each
worker must see its own GPU alone before it loads torch.

Terms
    name    of a GPU as ``CUDA_VISIBLE_DEVICES`` takes it: an index, or a UUID of a GPU or of a MIG instance
"""

import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

VISIBLE = "CUDA_VISIBLE_DEVICES"
LIST_COMMAND = ("nvidia-smi", "-L")
"""It comes with the driver, so where CUDA works it is there; it lists MIG instances, too."""
LIST_TIMEOUT_S = 60
"""Without persistence mode the driver starts each GPU for the list: seconds each, eight of them on a large machine."""
CORES_PER_WORKER = 2
"""Without a GPU: one core encodes while the other reads and writes."""
MAX_GPU_THREADS = 8
"""Blocks at once in a worker with a GPU: eight cores read what the fastest card encodes with a ViT-L/16."""

_UUID = re.compile(r"UUID: ([^)\s]+)\)")


@dataclass(frozen=True)
class InstalledGpu:
    """A GPU as the driver lists it.

    Parameters
    ----------
    uuid
        Of the card.
    instances
        UUIDs of its MIG instances; empty where it is not divided.
    """

    uuid: str
    instances: tuple[str, ...] = ()


def installed_gpus() -> tuple[InstalledGpu, ...]:
    """List the GPUs of this machine, or of this container; none where there is no driver."""
    try:
        listed = subprocess.run(  # noqa: S603  # a constant
            LIST_COMMAND, capture_output=True, text=True, check=True, timeout=LIST_TIMEOUT_S
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_list(listed)


def parse_list(listed: str) -> tuple[InstalledGpu, ...]:
    """Read the output of ``nvidia-smi -L``: a line a card, and below it an indented line for each MIG instance."""
    found: list[tuple[str, list[str]]] = []
    for line in listed.splitlines():
        match = _UUID.search(line)
        if match is None:
            continue
        if line[0].isspace() and found:
            found[-1][1].append(match[1])
        else:
            found.append((match[1], []))
    return tuple(InstalledGpu(uuid, tuple(instances)) for uuid, instances in found)


def visible_gpus(
    environ: Mapping[str, str] = os.environ,
    list_installed: Callable[[], Sequence[InstalledGpu]] = installed_gpus,
) -> tuple[str, ...]:
    """Return the names of the GPUs that CUDA would show to this process, in order, each once.

    Parameters
    ----------
    environ
        Its ``CUDA_VISIBLE_DEVICES`` is followed as CUDA does: an empty value hides all, and the first name that is none
        of a GPU hides itself and those behind it. Names are returned as they stand there.
    list_installed
        Lists the machine's GPUs. It is not called where the variable hides them all.
    """
    setting = environ.get(VISIBLE)
    if setting is None:
        gpus = list_installed()
        # A divided card computes only in its instances.
        return tuple(name for index, gpu in enumerate(gpus) for name in (gpu.instances or (str(index),)))
    wanted = [name.strip() for name in setting.split(",")]
    if not wanted[0]:
        return ()
    gpus = list_installed()
    names: dict[str, None] = {}
    for name in wanted:
        if not _is_installed(name, gpus):
            break
        names[name] = None
    return tuple(names)


def _is_installed(name: str, gpus: Sequence[InstalledGpu]) -> bool:
    if name.isdecimal():
        return int(name) < len(gpus)
    # CUDA takes the beginning of a UUID as well. The older form of MIG names, MIG-<UUID of the card>/<i>/<j>, is not in
    # the driver's list: any is taken where some card is divided.
    if name.startswith("MIG-") and "/" in name:
        return any(gpu.instances for gpu in gpus)
    uuids = [uuid for gpu in gpus for uuid in (gpu.uuid, *gpu.instances)]
    return len(name) > len("GPU-") and any(uuid.startswith(name) for uuid in uuids)


def auto_workers(gpus: Sequence[str], cores: int) -> int:
    """Return how many workers fill this machine: one for each GPU, or one for every two cores without."""
    return len(gpus) or max(1, cores // CORES_PER_WORKER)


def worker_environments(gpus: Sequence[str], workers: int) -> list[dict[str, str]]:
    """Return the variables that show each worker its own GPU; GPUs are given out in turn where workers are more."""
    if not gpus:
        return [{} for _ in range(workers)]
    return [{VISIBLE: gpus[number % len(gpus)]} for number in range(workers)]
