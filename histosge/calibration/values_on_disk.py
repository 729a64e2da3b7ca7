"""What calibration needs of values that do not fit into memory."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32]


class ValuesOnDisk(Protocol):
    """An array ``(n_spots, n_genes)`` of which some genes are read at a time."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return how many spots and genes."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: tuple[slice, slice | NDArray[np.int64]]) -> Values:
        """Return all spots of some genes."""
        ...
