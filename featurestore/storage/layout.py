"""Names and dimensions of a store: docs/SPEC.md as values. No I/O.

Paths are relative to the store's root, with ``/`` between their segments.
"""

import re

from featurestore.errors import StoreError
from featurestore.names import MAX_NAME, RESERVED, check_segment, is_segment, slug

SPEC_NAME = "histosge-featurestore"
SPEC_VERSION = 1
FAILURES = "_failures"

SPOTS = "spots-"
"""How the folders of patches that are on no grid begin."""
EMBEDDING = "embedding"
EMBEDDING_DIMS = ("y", "x", "feature")
GRID_ARRAYS: dict[str, tuple[tuple[str, ...], str]] = {
    "y": (("y",), "float64"),
    "x": (("x",), "float64"),
    "tissue": (("y", "x"), "uint8"),
    "rgb": (("y", "x", "channel"), "uint8"),
}
"""Arrays of every grid: name -> (dimensions, dtype)."""
QUALITY = "quality"
QUALITY_ARRAY: tuple[tuple[str, ...], str] = (("y", "x"), "uint8")
"""Dimensions and dtype of the array of flags, which a grid may lack."""

_CHUNK = re.compile(r"c/(\d+)/(\d+)/(\d+)")


def grid_path(slide_id: str, grid_key: str) -> str:
    """Path of a grid's group.

    Raises
    ------
    StoreError
        If a name could lead out of the store.
    """
    return f"{check_segment(slide_id, 'slide id')}/{check_segment(grid_key, 'grid')}"


def encoder_path(slide_id: str, grid_key: str, encoder_key: str) -> str:
    """Path of an encoder's group; the key becomes a slug.

    Raises
    ------
    StoreError
        If a name could lead out of the store, or is that of one of a grid's own arrays.
    """
    # Reserved names, too: an encoder called `tissue` would be written over the array of that name.
    check_encoder_key(encoder_key)
    return f"{grid_path(slide_id, grid_key)}/{slug(encoder_key)}"


def check_encoder_key(encoder_key: str) -> None:
    """Refuse a key that cannot name the folder of an encoder.

    Raises
    ------
    StoreError
        If it is the name of something else in a store, begins with an underscore, or is too long.
    """
    name = slug(encoder_key)
    if not is_segment(name) or name.lower() in RESERVED or len(name) > MAX_NAME:
        raise StoreError(
            f"encoder {encoder_key[:40]!r} cannot name a folder of a store (reserved, or more than {MAX_NAME} letters); "
            "give it another name, as with --encoder"
        )


def embedding_path(slide_id: str, grid_key: str, encoder_key: str) -> str:
    """Path of the embedding array."""
    return f"{encoder_path(slide_id, grid_key, encoder_key)}/{EMBEDDING}"


def failure_path(
    slide_id: str, grid_key: str = "", encoder_key: str = "", block: tuple[int, int] | None = None
) -> str:
    """Path of the JSON document with the reason why a slide, or some patches of a block, could not be read."""
    # A document for each block: workers write theirs without reading those of others.
    parts = [FAILURES, check_segment(slide_id, "slide id")]
    if block is not None:
        parts += [grid_key, slug(encoder_key), f"{block[0]}.{block[1]}"]
    return "/".join(parts) + ".json"


def chunk_index(relative: str) -> tuple[int, ...] | None:
    """Return the index of a chunk from its path below the array, or None if it is not a chunk."""
    match = _CHUNK.fullmatch(relative)
    return tuple(int(part) for part in match.groups()) if match else None
