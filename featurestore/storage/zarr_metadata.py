"""The zarr.json documents that a store writes itself: groups, and the root with its spec.

A group is one small JSON object of the Zarr format 3; writing it whole in one request is what makes it a commit.
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
    """Gather the metadata of everything below a group into its own document, so that opening costs one request.

    The layout is the one that zarr and xarray read (``consolidated_metadata``, inline).
    """
    below = sorted(name for name in location.sizes(path) if name.endswith("/zarr.json"))
    documents = {name.removesuffix("/zarr.json"): location.read_json(f"{path}/{name}") for name in below}
    whole = {"kind": "inline", "must_understand": False, "metadata": documents}
    own = location.read_json(f"{path}/zarr.json") or {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {},
    }
    location.write_json(f"{path}/zarr.json", {**own, "consolidated_metadata": whole})


def create_root(location: Location, spec: str, version: int, what: str) -> None:
    """Make an empty store, or check the one that is there.

    Raises
    ------
    StoreError
        If something else lies there: it is left untouched.
    """
    if location.is_file():
        raise StoreError(f"{location.label} is a file, not a {what}; give the path of a folder")
    there = location.exists("zarr.json")
    others = [] if there else [*location.folders(), *filterfalse(is_partial, location.files())]
    # Looked for once more after the listing: the root's document is the first that a run writes, so it is
    # there for whatever another run, begun at the same moment, has let the listing see.
    if there or location.exists("zarr.json"):
        check_root(location, spec, version, what)
    elif others:
        raise StoreError(
            f"{location.label} holds something that is no {what}; nothing was written, give an empty or new path"
        )
    else:
        write_group(location, "", {"spec": spec, "version": version})


def check_root(location: Location, spec: str, version: int, what: str) -> None:
    """Check that a store of a known version lies there.

    Raises
    ------
    StoreError
        If not, saying what was found.
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
