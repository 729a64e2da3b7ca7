"""Training in several processes, as `torchrun` starts them: they train one network together, and the first one writes.

All processes run the same command. Each reads the sheet and the expression for itself, and computes its share of every
batch (`histosge.models.ranks`). A model that is not trained in steps is fitted by each of them, and gains nothing.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Made = TypeVar("Made")


def is_launched() -> bool:
    """Tell whether this process is one of several that `torchrun` started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first_process() -> bool:
    """Tell whether this process is the one that prints and writes; one that is alone is."""
    return not is_launched() or os.environ.get("RANK", "0") == "0"


@contextmanager
def joined() -> Iterator[None]:
    """Connect the processes for the time of a training, also as a decorator; nothing where this one is alone."""
    if not is_launched():
        yield
        return
    # Here, as most trainings need no torch.
    from histosge.models.ranks import joined_processes

    with joined_processes():
        yield


def wait_for_all() -> None:
    """Return once all processes are here; at once where this one is alone."""
    if is_launched():
        from histosge.models.ranks import wait_for_all as wait

        wait()


def first_writes(write: Callable[[], Made], read: Callable[[], Made]) -> Made:
    """Let the first process write a result, and the others read it once it is whole.

    Parameters
    ----------
    write, read
        Called in the first process, and in the others after it.
    """
    made = write() if is_first_process() else None
    wait_for_all()
    return read() if made is None else made
