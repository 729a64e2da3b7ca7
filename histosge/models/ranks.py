"""Several processes that train one network, as `torchrun` starts them: who this one is, and sums over all.

Each process computes its share of every batch, and gradients are summed before a step. So all of them hold the same
weights, and the result does not depend on their number beyond rounding. Written on `torch.distributed` alone: a wrapper
of the network would average gradients per process, which is wrong where shares differ in their number of spots.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor

from histosge.errors import ModelError


@dataclass(frozen=True)
class Ranks:
    """One of `world` processes.

    Parameters
    ----------
    rank, world
        Which, of how many.
    """

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes what there is to write."""
        return self.rank == 0

    def share(self, numbers: Sequence[int]) -> list[int]:
        """Return this process's part of a batch; it may be empty."""
        return list(numbers[self.rank :: self.world])

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all processes."""
        if self.world == 1 or not tensors:
            return
        # One message for all: hundreds of small ones would take longer than the step.
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        if torch.distributed.get_backend() == "nccl":  # which sums on GPUs alone
            flat = flat.cuda()
        torch.distributed.all_reduce(flat)
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].reshape(tensor.shape))
            start += tensor.numel()


def current_ranks() -> Ranks:
    """Return who this process is; one of one outside `joined_processes`."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return Ranks()
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())


def wait_for_all() -> None:
    """Return once all processes are here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


@contextmanager
def joined_processes() -> Iterator[Ranks]:
    """Join the processes that `torchrun` started, for the time of a training.

    Raises
    ------
    ModelError
        If this torch cannot connect processes, or there are more of them than GPUs.
    """
    if not torch.distributed.is_available():
        raise ModelError("this build of torch cannot connect processes; start one process without torchrun")
    device = None
    if torch.cuda.is_available():
        local, n_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= n_gpus:  # nccl refuses two processes on one GPU
            raise ModelError(
                f"torchrun started at least {local + 1} processes on a machine where torch sees {n_gpus} GPU; start one a "
                f"GPU: --nproc-per-node {n_gpus}, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
            )
        # Before the group: it binds to the current device, and all processes would share the first.
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    # Others wait while the first one reads a large cohort: half an hour, which is usual, would not do.
    torch.distributed.init_process_group(
        "gloo" if device is None else "nccl", timeout=timedelta(days=2), device_id=device
    )
    try:
        yield current_ranks()
    finally:
        torch.distributed.destroy_process_group()
