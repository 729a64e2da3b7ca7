"""A loader's batches as a dataset of torch: for `torch.utils.data.DataLoader`, and for trainers that expect one.

The only module of this folder that imports torch; `Loader.as_torch` imports it when it is called.
"""

from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.data import IterableDataset, get_worker_info

B_co = TypeVar("B_co", bound=tuple[Any, ...], covariant=True)
MAX_WORKERS = 1024
"""Workers of one `DataLoader` whose epochs are counted: one number each, far more than any machine has cores."""


LOOK_AHEAD = 64
"""Epochs whose lengths are compared: one takes milliseconds with 100,000 blocks."""


class BatchSource(Protocol[B_co]):
    """What a dataset needs of a loader."""

    def epoch(self, number: int) -> Iterator[B_co]:
        """Go through one epoch."""
        ...

    def n_batches(self, epoch: int, n_workers: int) -> int:
        """Return how many batches an epoch has when workers share it, each with an incomplete last one."""
        ...

    def for_worker(self, worker: int, n_workers: int) -> "BatchSource[B_co]":
        """Open the same store anew, for one worker's part."""
        ...


class TorchBatches(IterableDataset[B_co]):
    """Batches with tensors in place of arrays, an epoch for each time it is iterated.

    Give it to a `DataLoader` with ``batch_size=None``: it makes the batches itself. Workers share the blocks (with
    targets: the sections), and each opens the store for itself, so that neither connections nor threads are inherited;
    with ``persistent_workers=True`` it does so once.

    Parameters
    ----------
    source
        The loader.
    num_workers
        Of the `DataLoader`; the number of batches depends on it.
    first_epoch
        Number of the epoch that comes first.
    """

    def __init__(self, source: BatchSource[B_co], num_workers: int = 0, first_epoch: int = 0) -> None:
        self._source, self._num_workers = source, num_workers
        self._part: BatchSource[B_co] | None = None
        # In shared memory: a worker counts on its copy of this object, which lives for an epoch or for many.
        self._next_epoch = torch.full((MAX_WORKERS,), first_epoch, dtype=torch.int64)
        self._next_epoch.share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        """Return the batches of an epoch, see `Loader.n_batches`.

        Where several processes share the blocks, epochs differ by a few batches. The longest of the last and the next
        `LOOK_AHEAD` ones is given then: trainers take the length once, and `DataLoader` warns of every batch beyond it.
        """
        following = int(self._next_epoch[0])
        epochs = range(max(0, following - 1), following + LOOK_AHEAD)
        return max(self._source.n_batches(number, max(1, self._num_workers)) for number in epochs)

    def set_epoch(self, number: int) -> None:
        """Make the next epoch the one of this number: the same order as whenever it was gone through before."""
        self._next_epoch.fill_(number)

    def __iter__(self) -> Iterator[B_co]:
        """Go through the next epoch, or a worker's part of it.

        Raises
        ------
        ValueError
            If the `DataLoader` has another number of workers than this was made for.
        """
        info = get_worker_info()
        worker, n_workers = (info.id, info.num_workers) if info else (0, 0)
        # Another number would still stream, but the length that trainers go by would be wrong.
        if n_workers != self._num_workers:
            raise ValueError(
                f"the DataLoader has {n_workers} workers and this dataset was made for {self._num_workers}; "
                f"make it with as_torch(num_workers={n_workers})"
            )
        number = int(self._next_epoch[worker])
        self._next_epoch[worker] += 1
        return self._batches(number, worker, n_workers)

    def _batches(self, number: int, worker: int, n_workers: int) -> Iterator[B_co]:
        if self._part is None:
            self._part = self._source.for_worker(worker, n_workers) if n_workers else self._source
        # Tensors share the arrays' memory, which a loader does not write to again while they are held.
        for batch in self._part.epoch(number):
            yield type(batch)(*map(torch.from_numpy, batch))
