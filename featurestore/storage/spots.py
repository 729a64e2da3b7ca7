"""Embeddings of patches that are on no grid: each at its own position, as other tools cut them.

``<slide>/spots-<label>/`` holds `y`, `x` (patch) and ``<encoder>/embedding`` (patch, feature). They are listed, validated
and read; training and prediction need a grid.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec
from zarr.errors import ContainsArrayError

from featurestore.documents import convert
from featurestore.encoders.protocol import EncoderIdentity
from featurestore.errors import IdentityMismatchError, first_line
from featurestore.location import Location
from featurestore.storage.embedding_array import read_encoder
from featurestore.storage.layout import SPOTS, check_encoder_key, embedding_path, encoder_path, grid_path
from featurestore.storage.store import Store
from featurestore.storage.stored_documents import MAX_PATCHES, EncoderAttrs, identity_attrs
from featurestore.storage.zarr_metadata import (
    ZARR_ERRORS,
    document_label,
    open_array,
    read_array,
    read_attrs,
    write_group,
)

CHUNK = 1024
"""Patches of one object: as many as a block of a grid."""


@dataclass(frozen=True)
class PatchSpots:
    """Where patches are that are on no grid.

    Parameters
    ----------
    mpp, patch_px
        Scale and side of the patches, as the encoder saw them.
    slide_mpp, effective_mpp
        Microns per pixel at level 0, and of the patches exactly.
    x_um, y_um
        Their centres, microns from the slide's top-left, shape ``(n,)`` each.
    """

    mpp: float
    patch_px: int
    slide_mpp: float
    effective_mpp: float
    x_um: NDArray[np.float64]
    y_um: NDArray[np.float64]

    @property
    def key(self) -> str:
        """Their label in a store, such as ``spots-mpp0.5000_px224``."""
        return f"{SPOTS}mpp{self.mpp:.4f}_px{self.patch_px}"

    def to_attrs(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "mpp": self.mpp,
            "patch_px": self.patch_px,
            "slide_mpp": self.slide_mpp,
            "effective_mpp": self.effective_mpp,
            "patches": len(self.x_um),
        }


def add_spots(
    store: Store,
    slide_id: str,
    spots: PatchSpots,
    identity: EncoderIdentity,
    vectors: NDArray[np.float16],
    attrs: Mapping[str, Any],
    software: Mapping[str, str],
) -> None:
    """Write patches and their embeddings; what a killed run left is written again.

    Parameters
    ----------
    vectors
        Shape ``(n, dim)``; a row of NaN could not be read.
    attrs, software
        Attributes of the embedding besides the encoder's identity, and versions.

    Raises
    ------
    IdentityMismatchError
        If other patches, or those of another encoder, are stored under these names.
    """
    check_encoder_key(identity.key)
    path, location = grid_path(slide_id, spots.key), store.location
    clear = f"clear them with: histosge rm {location.label} --slide {slide_id} --grid {spots.key}"
    if read_attrs(location, path).get("spots"):
        x, y = (read_array(location, f"{path}/{name}", (None,), "f") for name in "xy")
        if not (np.array_equal(x, spots.x_um) and np.array_equal(y, spots.y_um)):
            raise IdentityMismatchError(f"{path} is stored with other patches; {clear}")
    else:
        for name, values in (("y", spots.y_um), ("x", spots.x_um)):
            _write(location, f"{path}/{name}", values, ("patch",), {"units": "micrometer"})
        # Last, as for a grid: patches without it were not written completely.
        write_group(location, path, {"spots": spots.to_attrs(), "software": dict(software)})
    array = embedding_path(slide_id, spots.key, identity.key)
    stored = read_encoder(location, array)
    if stored and (stored.key, stored.fingerprint) != (identity.key, identity.fingerprint):
        raise IdentityMismatchError(
            f"{path} holds embeddings of encoder {stored.key!r} with fingerprint {stored.fingerprint[:16]}, now it is "
            f"{identity.key!r} with {identity.fingerprint[:16]}; {clear}"
        )
    if not stored or set(_chunks(location, array)) != set(range(_count(len(vectors)))):
        write_group(location, encoder_path(slide_id, spots.key, identity.key), {})
        _write(location, array, vectors, ("patch", "feature"), {**attrs, "encoder": identity_attrs(identity)})
    store.consolidate(slide_id)


def read_spots(
    store: Store, slide_id: str, spots: PatchSpots, identity: EncoderIdentity
) -> NDArray[np.float16] | None:
    """Return the stored vectors of patches, ``(n, dim)``; None if they are not there completely.

    Raises
    ------
    IdentityMismatchError
        If other patches, or another encoder's vectors, are stored under these names.
    """
    location = store.location
    attrs = read_attrs(location, grid_path(slide_id, spots.key)).get("spots")
    array = embedding_path(slide_id, spots.key, identity.key)
    stored = read_encoder(location, array)
    if not attrs or not stored:
        return None
    if (stored.key, stored.fingerprint) != (identity.key, identity.fingerprint):
        raise IdentityMismatchError(
            f"{array} holds vectors of fingerprint {stored.fingerprint[:16]}, now {identity.key!r} has "
            f"{identity.fingerprint[:16]}; give another store"
        )
    n = len(spots.x_um)
    x, y = (read_array(location, f"{grid_path(slide_id, spots.key)}/{name}", (None,), "f") for name in "xy")
    if not (np.array_equal(x, spots.x_um) and np.array_equal(y, spots.y_um)):
        raise IdentityMismatchError(f"{array} is stored with other patches; give another store")
    if set(_chunks(location, array)) != set(range(_count(n))):
        return None  # a killed run
    return np.asarray(read_array(location, array, (n, identity.dim), "f"), dtype=np.float16)


class SpotsAttrs(msgspec.Struct, frozen=True):
    """Attributes ``spots`` of a group of patches that are on no grid."""

    patches: Annotated[int, msgspec.Meta(ge=1, le=MAX_PATCHES)]


def spot_state(location: Location, slide_id: str, key: str, encoder_slug: str) -> tuple[int, int, int, int]:
    """Return how many objects of an embedding exist, how many it needs, its patches, and its bytes.

    Raises
    ------
    DocumentError
        If its documents are damaged.
    """
    patches = _patches(location, grid_path(slide_id, key))
    chunks = _chunks(location, f"{grid_path(slide_id, key)}/{encoder_slug}/embedding")
    return len(set(chunks) & set(range(_count(patches)))), _count(patches), patches, sum(chunks.values())


def check_spots(
    location: Location, slide_id: str, key: str, encoder_slugs: list[str]
) -> Iterator[tuple[str, str]]:
    """Yield ``(path, what is wrong)`` of patches that are on no grid.

    Raises
    ------
    DocumentError
        If a document or an array is damaged.
    """
    path = grid_path(slide_id, key)
    if not read_attrs(location, path).get("spots"):
        yield path, "the patches were not written completely"
        return
    n = _patches(location, path)
    for name in ("y", "x"):
        if not np.isfinite(read_array(location, f"{path}/{name}", (n,), "f")).all():
            yield f"{path}/{name}", "holds numbers that are not finite"
    for encoder_slug in encoder_slugs:
        name = f"{path}/{encoder_slug}/embedding"
        array = open_array(location, name)
        encoder = convert(
            dict(array.attrs).get("encoder"),
            EncoderAttrs,
            document_label(location, name),
            at="attributes.encoder",
        )
        expected = (n, encoder.dim)
        if array.shape != expected or array.dtype != np.float16 or array.chunks[1:] != expected[1:]:
            yield name, f"is {array.dtype} {array.shape}, should be float16 {expected}"
            continue
        if EncoderIdentity(encoder.key, encoder.dim, encoder.facts).fingerprint != encoder.fingerprint:
            yield name, "its fingerprint is not that of its facts"
        existing = _chunks(location, name)
        for index in range(_count(n)):
            if index not in existing:
                yield f"{name}/c/{index}/0", "the object is missing"
                continue
            try:
                values = np.asarray(array[index * CHUNK : (index + 1) * CHUNK])
            except ZARR_ERRORS as error:
                yield f"{name}/c/{index}/0", f"damaged: {first_line(error)}"
                continue
            if np.isinf(values).any():
                yield f"{name}/c/{index}/0", "holds infinity"


def _patches(location: Location, path: str) -> int:
    found = read_attrs(location, path).get("spots")
    return convert(found, SpotsAttrs, document_label(location, path), at="attributes.spots").patches


def _count(patches: int) -> int:
    return -(-patches // CHUNK)


def _chunks(location: Location, array: str) -> dict[int, int]:
    """Return the bytes of each object of an embedding, by its number."""
    found = {}
    for name, size in location.sizes(array).items():
        parts = name.split("/")
        if len(parts) == 3 and parts[0] == "c" and parts[1].isdecimal() and parts[2] == "0":
            found[int(parts[1])] = size
    return found


def _write(
    location: Location, path: str, values: NDArray[Any], dims: tuple[str, ...], attrs: dict[str, Any]
) -> None:
    try:
        array = zarr.create_array(
            location.zarr(),
            name=path,
            shape=values.shape,
            chunks=(min(CHUNK, len(values)), *values.shape[1:]),
            dtype=values.dtype,
            fill_value=float("nan"),
            compressors=[Crc32cCodec()],
            dimension_names=dims,
            attributes=attrs,
        )
    except ContainsArrayError:
        array = zarr.open_array(location.zarr(), path=path, mode="r+", zarr_format=3)
        if array.shape != values.shape:
            location.remove(path)
            _write(location, path, values, dims, attrs)
            return
    # Also objects that are NaN throughout: what exists is what is done.
    array.with_config({"write_empty_chunks": True})[...] = values
