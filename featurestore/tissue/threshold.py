"""From which share of tissue on a patch counts as tissue: one rule for whatever reads or writes a store."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Part of the store's specification: the blocks that exist follow from it, so another value would be another format.
TISSUE_THRESHOLD = 26
"""Of 255: 10 % of a patch, rounded up."""


def is_tissue(share: Any) -> NDArray[np.bool_]:
    """Return which patches are tissue: those from the threshold on.

    Parameters
    ----------
    share
        The stored `tissue`, 0..255, of any shape: an array, or what turns into one.
    """
    return np.asarray(np.asarray(share) >= TISSUE_THRESHOLD)
