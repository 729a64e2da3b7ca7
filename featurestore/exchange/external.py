"""Embeddings of other tools as values: what their files state, whatever the format.

Terms
    level-0 px  pixels of the slide's finest level
    step        from one patch to the next, level-0 px
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.errors import StoreError


@dataclass(frozen=True)
class ExternalEmbeddings:
    """One slide's embeddings by one encoder of another tool.

    Parameters
    ----------
    format
        The tool that wrote the file.
    slide_id, encoder
        As the file names them.
    features
        Shape ``(n, dim)``.
    coords_px
        Top-left corners ``(x, y)`` in level-0 px, shape ``(n, 2)``, in the order of `features`.
    patch_px
        Side of a patch as the encoder saw it; None if the file does not state it.
    patch_level0_px
        Its side in level-0 px; None if the file does not state it.
    step_px
        In level-0 px; None if the file does not state it, and then it is found from the corners.
    mpp, size_px
        Of level 0; None if the file does not state it.
    facts
        What else the file states of how the embeddings were made.

    Raises
    ------
    StoreError
        If there are no patches, or the arrays do not belong together.
    """

    format: str
    slide_id: str
    encoder: str
    features: NDArray[np.floating]
    coords_px: NDArray[np.int64]
    patch_px: int | None = None
    patch_level0_px: float | None = None
    step_px: float | None = None
    mpp: float | None = None
    size_px: tuple[int, int] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or self.coords_px.shape != (len(self.features), 2):
            raise StoreError(
                f"{self.format} file of slide {self.slide_id!r}: features {self.features.shape} and coordinates "
                f"{self.coords_px.shape} do not belong together; they should be (n, dim) and (n, 2)"
            )
        if not len(self.features):
            raise StoreError(f"{self.format} file of slide {self.slide_id!r} holds no patch")


def smallest_step(coords_px: NDArray[np.int64]) -> int:
    """Return the step of a grid that all corners are on: the greatest common divisor of their distances, 0 for one."""
    steps = [np.gcd.reduce(np.diff(np.unique(axis))) for axis in coords_px.T if len(np.unique(axis)) > 1]
    return int(np.gcd.reduce(steps)) if steps else 0
