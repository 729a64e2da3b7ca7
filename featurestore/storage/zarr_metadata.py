"""The zarr.json documents that we write ourselves: groups, and the root with its specification.

A group is one small JSON document of the Zarr format 3. It is written whole in one request, so it either is there with
all its attributes or is not: that is what a commit of metadata means here.
"""

from itertools import filterfalse
from typing import Any

from featurestore.errors import StoreError
from featurestore.location import Location
from featurestore.whole_file import is_partial


def write_group(location: Location, path: str, attrs: dict[str, Any]) -> None:
    """Write a group's document, whole or not at all."""
    document = {"zarr_format": 3, "node_type": "group", "attributes": attrs}
    location.write_json(f"{path}/zarr.json" if path else "zarr.json", document)


def read_attrs(location: Location, path: str) -> dict[str, Any]:
    """Return the attributes of a group or array; empty if there is none."""
    document = location.read_json(f"{path}/zarr.json" if path else "zarr.json")
    return dict(document.get("attributes") or {}) if document else {}


def consolidate(location: Location, path: str) -> None:
    """Copy the metadata of everything below a group into its own document, so that opening it costs one request.

    The layout is the one that zarr and xarray read (``consolidated_metadata``, inline).
    """
    below = _documents_below(location, path)
    while True:
        documents = {name.removesuffix("/zarr.json"): location.read_json(f"{path}/{name}") for name in below}
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


def create_root(location: Location, spec: str, version: int, what: str) -> None:
    """Make an empty store, or check the existing one.

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
        check_root(location, spec, version, what)
    elif others:
        raise StoreError(
            f"{location.label} holds something that is not a {what}; nothing was written, give an empty or new path"
        )
    else:
        write_group(location, "", {"spec": spec, "version": version})


def check_root(location: Location, spec: str, version: int, what: str) -> None:
    """Check that a location holds a store of a version that we know.

    Raises
    ------
    StoreError
        If it does not, with what was found.
    """
    attrs = read_attrs(location, "")
    if attrs.get("spec") != spec:
        found = f"spec {attrs['spec']!r}" if attrs.get("spec") else "no histosge store"
        raise StoreError(f"{location.label} holds {found}, not a {what} ({spec!r})")
    if int(attrs.get("version", 0)) > version:
        raise StoreError(
            f"{location.label} is a {what} of version {attrs['version']}, newer than {version}; "
            "upgrade with: pip install -U histosge"
        )
