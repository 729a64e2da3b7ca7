"""The zarr.json documents that we write ourselves: groups, and the root with its specification.

A group is one small JSON document of the Zarr format 3. It is written whole in one request, so it either is there with
all its attributes or is not: that is what a commit of metadata means here.
"""

import lzma
import zlib
from collections.abc import Mapping
from itertools import filterfalse
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import StorePath

from featurestore.documents import DocumentError, convert
from featurestore.errors import StoreError, StoreNotFoundError, first_line
from featurestore.location import Location
from featurestore.storage.stored_documents import RootAttrs
from featurestore.whole_file import is_partial
from featurestore.zarr_documents import GroupDocument, check_node

# What zarr and its codecs raise for metadata or bytes that are damaged; the errors of zlib and lzma are no ValueError.
ZARR_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    NotImplementedError,
    RuntimeError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
)


def write_group(location: Location, path: str, attrs: dict[str, Any]) -> None:
    """Write a group's document, whole or not at all."""
    document = {"zarr_format": 3, "node_type": "group", "attributes": attrs}
    location.write_json(f"{path}/zarr.json" if path else "zarr.json", document)


def read_attrs(location: Location, path: str) -> dict[str, Any]:
    """Return the attributes of a group or array; empty if there is none.

    Raises
    ------
    DocumentError
        If its document is damaged.
    """
    document = location.read_json(f"{path}/zarr.json" if path else "zarr.json")
    attributes = document.get("attributes") if document else None
    if attributes is None:
        return {}
    if not isinstance(attributes, dict):
        raise DocumentError(f"{document_label(location, path)} is damaged: attributes is no object")
    return attributes


def document_label(location: Location, path: str) -> str:
    """Return how messages name the document of a group or array."""
    return f"{location.label}/{path}/zarr.json" if path else f"{location.label}/zarr.json"


def open_array(location: Location, path: str, *, read_only: bool = True) -> "zarr.Array[Any]":
    """Open an array of format 3.

    Raises
    ------
    StoreError
        If there is none.
    DocumentError
        If its metadata are damaged, or it may not be opened.
    """
    # With the format given: zarr would also look for the documents of format 2, a request each.
    try:
        return zarr.open_array(
            location.zarr(read_only=read_only), path=path, mode="r" if read_only else "r+", zarr_format=3
        )
    except FileNotFoundError as error:
        raise StoreError(f"{location.label} holds no array {path}") from error
    except StoreError:
        raise
    except ZARR_ERRORS as error:
        raise DocumentError(f"{document_label(location, path)} is damaged: {first_line(error)}") from error


def array_from_document(location: Location, path: str, document: dict[str, Any]) -> "zarr.Array[Any]":
    """Open an array of format 3 whose document was read before, as from a group's consolidated ones: without a request.

    Raises
    ------
    DocumentError
        If its metadata are damaged, or it may not be opened.
    """
    label = document_label(location, path)
    check_node(document, label)
    metadata: Any = document  # zarr types it, and takes any
    try:
        place = StorePath(location.zarr(read_only=True), path)
        return zarr.Array(zarr.AsyncArray(metadata=metadata, store_path=place))
    except StoreError:
        raise
    except ZARR_ERRORS as error:
        raise DocumentError(f"{label} is damaged: {first_line(error)}") from error


def read_array(
    location: Location, path: str, shape: tuple[int | None, ...], kinds: str = "u"
) -> NDArray[Any]:
    """Read a small array whole, after its shape was compared: no memory is taken for one that is not as it should be.

    Parameters
    ----------
    shape
        That it must have; None for a length that is not known before.
    kinds
        Of its dtype, as numpy names them: ``u`` unsigned, ``f`` float, ``T`` text.

    Raises
    ------
    StoreError
        If there is none.
    DocumentError
        If its shape or dtype is another, or its bytes are damaged.
    """
    return read_values(open_array(location, path), f"{location.label}/{path}", shape, kinds)


def read_values(
    array: "zarr.Array[Any]", label: str, shape: tuple[int | None, ...], kinds: str = "u"
) -> NDArray[Any]:
    """Read an opened array whole, see `read_array`."""
    fits = len(array.shape) == len(shape) and all(
        n in (None, found) for n, found in zip(shape, array.shape, strict=True)
    )
    if not fits or array.dtype.kind not in kinds:
        expected = tuple("any" if n is None else n for n in shape)
        raise DocumentError(
            f"{label} is damaged: it is {array.dtype} {array.shape}, and should be {expected}"
        )
    try:
        return np.asarray(array[...])
    except StoreError:
        raise
    except ZARR_ERRORS as error:
        raise DocumentError(f"{label} is damaged: {first_line(error)}") from error


def consolidate(location: Location, path: str) -> None:
    """Copy the metadata of everything below a group into its own document, so that opening it costs one request.

    The layout is the one that zarr and xarray read (``consolidated_metadata``, inline).
    """
    below = _documents_below(location, path)
    while True:
        read = {name.removesuffix("/zarr.json"): location.read_json(f"{path}/{name}") for name in below}
        # One that was removed since the listing is left out: metadata of nothing would make the whole unreadable.
        documents = {name: document for name, document in read.items() if document is not None}
        whole = {"kind": "inline", "must_understand": False, "metadata": documents}
        own = location.read_json(f"{path}/zarr.json") or {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": {},
        }
        location.write_json(f"{path}/zarr.json", {**own, "consolidated_metadata": whole})
        # Two runs that add an encoder each would otherwise write over each other's: the last one to write looks again,
        # and finds what the other added since it listed.
        written, below = below, _documents_below(location, path)
        if below == written:
            return


def _documents_below(location: Location, path: str) -> list[str]:
    return sorted(name for name in location.sizes(path) if name.endswith("/zarr.json"))


def consolidated_documents(location: Location, path: str) -> dict[str, dict[str, Any]]:
    """Return the documents that are consolidated in a group, by their path below it; empty if there are none.

    Raises
    ------
    DocumentError
        If the group's document is damaged.
    """
    document = location.read_json(f"{path}/zarr.json")
    return {} if document is None else documents_below(document, document_label(location, path))


def documents_below(document: dict[str, Any], label: str) -> dict[str, dict[str, Any]]:
    """Return what `consolidated_documents` does, of a group's document that is read already."""
    group = check_node(document, label)
    found = group.consolidated_metadata if isinstance(group, GroupDocument) else None
    return found.metadata if found else {}


def create_root(
    location: Location, spec: str, version: int, what: str, attrs: Mapping[str, Any] | None = None
) -> RootAttrs:
    """Make an empty store, or check the existing one; return the attributes of its root.

    Parameters
    ----------
    attrs
        Further attributes of a store that is made.

    Raises
    ------
    StoreError
        If there is something else; it is not changed.
    """
    if location.is_file():
        raise StoreError(f"{location.label} is a file, not a {what}; give the path of a folder")
    has_document = location.exists("zarr.json")
    others = [] if has_document else [*location.folders(), *filterfalse(is_partial, location.files())]
    # Looked for again after the listing. Another run that starts at this moment writes the root's document first, so if
    # the listing shows anything of that run, the document exists by now.
    if has_document or location.exists("zarr.json"):
        return _check_root(read_attrs(location, ""), location, spec, version, what)
    if others:
        raise StoreError(
            f"{location.label} holds something that is not a {what}; nothing was written, give an empty or new path"
        )
    made = {"spec": spec, "version": version, **(attrs or {})}
    write_group(location, "", made)
    # Where attributes were given, read again: of two runs that make a store at this moment the last one's stay.
    return _check_root(read_attrs(location, "") if attrs else made, location, spec, version, what)


def open_root(location: Location, spec: str, version: int, what: str, if_absent: str) -> RootAttrs:
    """Check that a location holds a store of a version that we know, and that there is anything at all.

    Returns the attributes of its root.

    Parameters
    ----------
    if_absent
        The message where there is nothing: it says how to make one.

    Raises
    ------
    StoreNotFoundError
        If there is nothing.
    StoreError
        If there is something else, with what was found.
    """
    # The document first, and once: a public bucket may serve objects and refuse to say whether a folder is there.
    attributes = read_attrs(location, "")
    if not attributes and not location.exists():
        raise StoreNotFoundError(if_absent)
    return _check_root(attributes, location, spec, version, what)


def _check_root(
    attributes: dict[str, Any], location: Location, spec: str, version: int, what: str
) -> RootAttrs:
    attrs = convert(attributes, RootAttrs, document_label(location, ""), at="attributes")
    if attrs.spec != spec:
        found = f"spec {attrs.spec[:60]!r}" if attrs.spec else "no histosge store"
        raise StoreError(f"{location.label} holds {found}, not a {what} ({spec!r})")
    if attrs.version > version:
        raise StoreError(
            f"{location.label} is a {what} of version {attrs.version}, newer than {version}; "
            "upgrade with: pip install -U histosge"
        )
    return attrs
