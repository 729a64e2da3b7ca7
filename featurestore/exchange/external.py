"""Embeddings of other tools as values: what their files state, whatever the format.

Terms
    level-0 px  pixels of the slide's finest level
    corner      of a patch: its top-left
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.errors import StoreError

SMALL_BYTES = 64 << 20
"""An array up to this size is read whatever the size of its file: 4 million corners, 16,000 vectors of 1,024 numbers."""
MAX_EXPANSION = 20
"""A larger array may be this many times the size of its file. Vectors are nearly random: compression halves them at most."""


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
    corners
        Of the patches, ``(x, y)``, shape ``(n, 2)``, in the order of `features`: level-0 px, or microns if `in_microns`.
    in_microns
        Whether `corners`, `patch_side` and `step` are microns.
    patch_px
        Side of a patch as the encoder saw it; None if the file does not state it.
    patch_side
        Its side on the slide; None if the file does not state it.
    step
        From one patch to the next, on the slide; None if the file does not state it.
    overlap
        Of two neighbours, on the slide, where the file states it.
    mpp, size_px
        Of level 0; None if the file does not state it.
    size_tolerance_px
        How far `size_px` may be from the slide's: it was computed from a coarser level.
    encoder_facts
        What else the file states of the encoder: part of its identity.
    provenance
        What the file states of itself and of the slide: kept, and no part of any identity.

    Raises
    ------
    StoreError
        If there are no patches, or the arrays do not belong together, or a corner is no number.
    """

    format: str
    slide_id: str
    encoder: str
    features: NDArray[np.floating]
    corners: NDArray[np.float64]
    in_microns: bool = False
    patch_px: int | None = None
    patch_side: float | None = None
    step: float | None = None
    overlap: float = 0.0
    mpp: float | None = None
    size_px: tuple[int, int] | None = None
    size_tolerance_px: float = 1.0
    encoder_facts: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or self.corners.shape != (len(self.features), 2):
            raise StoreError(
                f"{self.label}: features {self.features.shape} and coordinates {self.corners.shape} do not belong "
                "together; they should be (n, dim) and (n, 2)"
            )
        if not self.features.size:
            raise StoreError(f"{self.label} holds no patch")
        # Before anything becomes an integer: NaN and 1e300 would become a corner somewhere on the slide.
        unusable = ~(np.abs(self.corners) < 2**31).all(axis=1)
        if unusable.any():
            raise StoreError(
                f"{self.label}: coordinates of {int(unusable.sum())} patches are no positions on a slide"
            )

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"{self.format} file of slide {self.slide_id!r}"

    def in_level0_px(self, mpp: float) -> "ExternalEmbeddings":
        """Return the same embeddings with all lengths in pixels of level 0, whose microns per pixel are given."""
        if not self.in_microns:
            return self
        side, step = (None if length is None else length / mpp for length in (self.patch_side, self.step))
        return replace(self, corners=self.corners / mpp, patch_side=side, step=step, in_microns=False)


def check_array(label: str, shape: tuple[int, ...], dtype: np.dtype[Any], file_bytes: int) -> None:
    """Refuse an array before its memory is taken.

    Raises
    ------
    StoreError
        If it holds no plain numbers, or claims to be far larger than the file in which it is.
    """
    if dtype.kind not in "fiu":
        raise StoreError(f"{label} is of dtype {dtype}, not of numbers")
    # Python's integers: the product of a hostile shape overflows numpy's.
    count = dtype.itemsize
    for side in shape:
        count *= int(side)
    most = max(SMALL_BYTES, MAX_EXPANSION * file_bytes)
    if count > most:
        raise StoreError(
            f"{label} claims {count:,} bytes, more than {most:,} in a file of {file_bytes:,}; it is damaged, "
            "or write it without compression"
        )


def stated_number(attrs: Mapping[str, Any], name: str, label: str, *, at_least: float = 0.0) -> float | None:
    """Return a positive number among a file's attributes, or None if there is none.

    Parameters
    ----------
    at_least
        If positive, the smallest value; otherwise any value above 0 is one.

    Raises
    ------
    StoreError
        If what is there is no such number.
    """
    value = attrs.get(name)
    if value is None:
        return None
    try:
        number = float(np.asarray(value).reshape(-1)[0])
    except (TypeError, ValueError, IndexError, OverflowError):
        number = float("nan")
    if not (0 < number < 2**31 and number >= at_least):
        raise StoreError(f"{label}: its attribute {name} is {str(value)[:40]!r}, not a positive number")
    return number
