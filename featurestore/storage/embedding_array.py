"""Make the array of an encoder's embeddings on a grid, or open the one that is there if it is of the same encoder."""

from collections.abc import Mapping
from typing import Any

from zarr.errors import ContainsArrayError

from featurestore.documents import convert
from featurestore.encoders.protocol import EncoderIdentity
from featurestore.errors import IdentityMismatchError
from featurestore.grid import PatchGrid
from featurestore.location import Location
from featurestore.names import slug
from featurestore.storage.block_array import FLOAT16, BlockArray
from featurestore.storage.coding import Coding
from featurestore.storage.layout import EMBEDDING_DIMS, check_encoder_key, embedding_path, encoder_path
from featurestore.storage.stored_documents import EncoderAttrs, check_on_grid, identity_attrs
from featurestore.storage.zarr_metadata import document_label, read_attrs, write_group


def create_or_open(
    location: Location,
    slide_id: str,
    grid: PatchGrid,
    identity: EncoderIdentity,
    block_shape: tuple[int, int],
    attrs: Mapping[str, Any] | None = None,
    coding: Coding | None = None,
) -> BlockArray:
    """Create an encoder's embedding array, or open the one that is there.

    Parameters and errors are those of `featurestore.storage.store.Store.add_embedding`.
    """
    check_encoder_key(identity.key)
    path = embedding_path(slide_id, grid.spec.key, identity.key)
    if (stored := read_encoder(location, path)) is not None:
        return _open_same(location, path, grid, stored, identity, coding)
    if location.exists(f"{path}/c") and not location.exists(f"{path}/zarr.json"):
        # Blocks without an array: a run wrote them after `rm` had removed it. They would count as done, although
        # they may come from another encoder.
        location.remove(f"{path}/c")
    write_group(location, encoder_path(slide_id, grid.spec.key, identity.key), {})
    # A block larger than the grid would be stored with its padding.
    rows, cols = min(block_shape[0], grid.n_rows), min(block_shape[1], grid.n_cols)
    try:
        return BlockArray.create(
            location,
            path,
            shape=(grid.n_rows, grid.n_cols, identity.dim),
            chunks=(rows, cols, identity.dim),
            dtype="float16",
            dims=EMBEDDING_DIMS,
            attrs={**(attrs or {}), "encoder": identity_attrs(identity)},
            coding=coding or FLOAT16,
        )
    except ContainsArrayError:  # another run created it since we looked: it must be the same encoder, too
        stored = read_encoder(location, path) or EncoderAttrs("-", 1, {}, "")
        return _open_same(location, path, grid, stored, identity, coding)


def read_encoder(location: Location, path: str) -> EncoderAttrs | None:
    """Return which encoder made the array at a path; None if there is none."""
    found = read_attrs(location, path).get("encoder")
    label = document_label(location, path)
    return convert(found, EncoderAttrs, label, at="attributes.encoder") if found else None


def _open_same(
    location: Location,
    path: str,
    grid: PatchGrid,
    stored: EncoderAttrs,
    identity: EncoderIdentity,
    coding: Coding | None,
) -> BlockArray:
    """Open an array after comparing its encoder, its shape and its coding with what is asked for."""
    slide_id, grid_key, *_ = path.split("/")
    removal = (
        f"histosge rm {location.label} --slide {slide_id} --grid {grid_key} --encoder {slug(identity.key)}"
    )
    # The key, too: `a:b` and `a/b` have the same slug.
    if stored.fingerprint != identity.fingerprint or stored.key != identity.key:
        raise IdentityMismatchError(
            f"{slide_id}/{grid_key} holds embeddings of encoder {stored.key!r} with fingerprint "
            f"{stored.fingerprint[:16]}, now it is {identity.key!r} with {identity.fingerprint[:16]}; clear them with: "
            f"{removal}"
        )
    array = BlockArray.open(location, path, read_only=False)
    check_on_grid(f"{location.label}/{path}", array.shape, grid)
    if coding is not None and array.coding != coding:
        raise IdentityMismatchError(
            f"the embedding {path} is stored as {array.coding.name}, now it is to be {coding.name}; leave out "
            f"--store-as to go on, or clear it with: {removal}"
        )
    return array
