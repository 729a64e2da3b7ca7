"""Work that is divided where the memory of a GPU does not suffice for it."""

import sys
import warnings
from collections import deque
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch

from histosge.errors import ModelError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Division(NamedTuple, Generic[Item]):
    """How a piece of work is divided.

    Parameters
    ----------
    size
        Of a piece: how many of its units there are.
    halve
        A piece of at least two units -> two pieces.
    units
        Name of the units, for messages.
    """

    size: Callable[[Item], int]
    halve: Callable[[Item], tuple[Item, Item]]
    units: str


class MemoryLimit:
    """How much is computed at once: as much as there is, and half of it each time that a GPU's memory runs out.

    Parameters
    ----------
    instead
        What to use where not even one unit fits, for the message.
    """

    def __init__(self, instead: str) -> None:
        self._most, self._instead, self._has_warned = sys.maxsize, instead, False

    def run(self, work: Callable[[Item], Result], item: Item, division: Division[Item]) -> list[Result]:
        """Do some work, in parts where it does not fit, and return the results of the parts in order.

        Parameters
        ----------
        work
            Done anew on the halves where it ends for want of memory: until then it must have changed nothing.

        Raises
        ------
        ModelError
            If the memory does not suffice for a single unit.
        """
        waiting, done = deque([item]), list[Result]()
        while waiting:
            part = waiting.popleft()
            size = division.size(part)
            if size > self._most:
                waiting.extendleft(reversed(division.halve(part)))
                continue
            try:
                done.append(work(part))
            except torch.cuda.OutOfMemoryError as error:
                if size < 2:
                    raise ModelError(
                        f"the GPU has too little free memory for one of the {division.units}; "
                        f"use {self._instead}, or free the GPU"
                    ) from error
                self._most = size // 2
                waiting.appendleft(part)
            else:
                continue
            # Here, not where the error is caught: it holds the frames, and so the tensors, of what failed.
            self._make_room(division.units)
        return done

    def _make_room(self, units: str) -> None:
        torch.cuda.empty_cache()  # pieces that were cut for the larger work would be in the way
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"the GPU is out of memory, going on with at most {self._most} {units} at once", stacklevel=4
            )
