"""Typed schemas of what stands in a store's attributes, and the bounds that a store's numbers must keep.

A store may come from anybody. Each group of attributes is converted once, where it is read, so that code behind it works
with values whose types and bounds are known. Fields that a later version adds are left out.

Terms
    patches   of one grid: arrays of a value for each patch are read whole
    object    what one block is stored as
"""

import math
from typing import Annotated, Any

import msgspec
import numpy as np

from featurestore.documents import DocumentError, convert
from featurestore.encoders.protocol import EncoderIdentity
from featurestore.grid import LEVEL_TOLERANCE, PatchGrid

MAX_PATCHES = 2**27
"""Of one grid; each takes 4 bytes of tissue and colour. A slide of 100,000 x 100,000 pixels has 40 million at stride 16."""
MAX_OBJECT_BYTES = 2**29
"""Of one stored object: two copies fit into 1 GB. A block of 32 x 32 patches has 3 MB with 1,536 features."""
MAX_BLOCKS = 2**20
"""Of one array: as many are planned in memory, about 300 MB. The largest grid has 130,000 blocks of 32 x 32 patches."""
MAX_CHANNELS = 2**20
"""Features or genes of one patch."""
MAX_TOKENS = 2**10
"""Positions along the side of one patch; the finest maps in use have 64."""
MAX_GROUPS = 2**12
"""Objects of one block, where its channels are split; each is a request."""

Microns = Annotated[float, msgspec.Meta(ge=1e-3, le=1e3)]
Pixels = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
Position = Annotated[float, msgspec.Meta(ge=-(2**31), le=2**31)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
Tokens = Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)]
# Without control characters: a message with a line break would not be one line, and a terminal would obey others.
_PRINTABLE = r"\A[^\x00-\x1f\x7f-\x9f\u2028\u2029]*\Z"
Text = Annotated[str, msgspec.Meta(max_length=4096, pattern=_PRINTABLE)]
Key = Annotated[str, msgspec.Meta(min_length=1, max_length=512, pattern=_PRINTABLE)]


class RootAttrs(msgspec.Struct, frozen=True):
    """Attributes of a store's root."""

    spec: Text = ""
    version: Count = 0
    # The name of a file on the user's machine, so nothing else may stand in it.
    private: Annotated[str, msgspec.Meta(pattern=r"\A([0-9a-f]{32})?\Z")] = ""


class SlideAttrs(msgspec.Struct, frozen=True):
    """Attributes ``slide`` of a slide's group."""

    source: Text
    size_px: tuple[Pixels, Pixels]
    mpp: Microns
    fingerprint: Text


class GridAttrs(msgspec.Struct, frozen=True):
    """Attributes ``grid`` of a grid's group."""

    mpp: Microns
    patch_px: Pixels
    stride_px: Pixels
    slide_mpp: Microns
    effective_mpp: Microns
    shape: tuple[Pixels, Pixels]
    origin_px: tuple[Position, Position] = (0.0, 0.0)
    tokens: Tokens = 1
    token_overlap_px: Count = 0
    token_cls: bool = False


class EncoderAttrs(msgspec.Struct, frozen=True):
    """Attributes ``encoder`` of an embedding array."""

    key: Key
    dim: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHANNELS)]
    facts: dict[str, Any]
    fingerprint: Text


def identity_attrs(identity: EncoderIdentity) -> dict[str, Any]:
    """Return the JSON-ready values of `EncoderAttrs`."""
    return {
        "key": identity.key,
        "dim": identity.dim,
        "facts": identity.facts,
        "fingerprint": identity.fingerprint,
    }


class FailureRecord(msgspec.Struct, frozen=True):
    """Why a slide, or some patches of a block, could not be read."""

    reason: Any = ""
    block: tuple[Count, Count] | None = None
    patches: list[Any] = []


def parse_grid(attrs: Any, label: str) -> PatchGrid:
    """Return the grid that attributes describe.

    Parameters
    ----------
    attrs
        What stands under ``grid`` in the attributes of the grid's group.
    label
        That group's document, for messages.

    Raises
    ------
    DocumentError
        If a value is missing, of another type or out of its bounds, or values contradict each other.
    """
    found = convert(attrs, GridAttrs, label, at="attributes.grid")
    n_rows, n_cols = found.shape
    if n_rows * n_cols > MAX_PATCHES:
        raise DocumentError(
            f"{label} is damaged: attributes.grid.shape is {n_rows} x {n_cols} patches; a grid has {MAX_PATCHES} at most"
        )
    # Patches are read at the requested mpp or at a level near to it: any other value contradicts the specification, and
    # distances in microns, such as a model's halo, would span any number of patches.
    if abs(found.effective_mpp / found.mpp - 1) > LEVEL_TOLERANCE + 1e-6:
        raise DocumentError(
            f"{label} is damaged: attributes.grid.effective_mpp is {found.effective_mpp:g}, more than "
            f"{LEVEL_TOLERANCE:.0%} off its mpp {found.mpp:g}"
        )
    try:
        return PatchGrid.from_attrs(attrs)
    except (ValueError, KeyError) as error:  # fields that are right alone, and contradict each other
        raise DocumentError(f"{label} is damaged: attributes.grid: {error}") from error


def check_bounds(
    label: str, shape: tuple[int, ...], object_shape: tuple[int, ...], dtype: np.dtype[Any]
) -> None:
    """Refuse an array of blocks that would take more memory than any slide needs.

    Parameters
    ----------
    label
        The array, for messages.
    shape, object_shape
        ``(rows, cols, channels)`` of the array and of one stored object.

    Raises
    ------
    DocumentError
        With the numbers.
    """
    if len(shape) != 3:
        raise DocumentError(f"{label} has {len(shape)} dimensions; a block array has 3")
    if min(shape) < 1 or min(object_shape) < 1:
        raise DocumentError(f"{label} is damaged: its shape is {shape}, of one object {object_shape}")
    if dtype.kind not in "fiu":
        raise DocumentError(f"{label} is damaged: it is {dtype}; blocks hold numbers")
    # Rounded up in whole numbers: a float is not exact beyond 2**53.
    rows, cols, groups = (-(-side // step) for side, step in zip(shape, object_shape, strict=True))
    for what, found, most in (
        ("patches", shape[0] * shape[1], MAX_PATCHES),
        ("channels", shape[2], MAX_CHANNELS),
        ("blocks", rows * cols, MAX_BLOCKS),
        ("objects a block", groups, MAX_GROUPS),
        ("bytes an object", math.prod(object_shape) * dtype.itemsize, MAX_OBJECT_BYTES),
    ):
        if found > most:
            raise DocumentError(
                f"{label} has {found} {what} (shape {shape}, of one object {object_shape}); at most {most} are read"
            )


def check_on_grid(label: str, shape: tuple[int, ...], grid: PatchGrid) -> None:
    """Refuse an array whose first two dimensions are not those of its grid.

    Raises
    ------
    DocumentError
        With both shapes.
    """
    if shape[:2] != grid.shape:
        raise DocumentError(
            f"{label} is damaged: its shape is {shape}, and the grid has {grid.n_rows} x {grid.n_cols} patches"
        )
