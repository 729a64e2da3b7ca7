"""Names in store paths: which are allowed, and how any name is made one."""

import re

from featurestore.errors import StoreError

_SEGMENT = re.compile(r"[A-Za-z0-9._-]+")
_NO_FOLDER = {".", "..", "zarr.json"}
RESERVED = frozenset(
    {
        ".",
        "..",
        "tissue",
        "rgb",
        "quality",
        "y",
        "x",
        "zarr.json",
        ".zarray",
        ".zgroup",
        ".zattrs",
        ".zmetadata",
    }
)
"""Names of other folders, and those that a store gives to its own arrays and documents: nothing is written under them."""
MAX_NAME = 200
"""Letters of a new name. File systems take 255, of which a temporary file's own name needs about 40."""


def slug(name: str) -> str:
    """Return a name as a segment of a store path: every character but ``[A-Za-z0-9._-]`` becomes ``-``."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)


def is_segment(name: str) -> bool:
    """Tell whether a folder of a store may be a slide, a grid or an encoder: ``[A-Za-z0-9._-]+``, not the store's own."""
    # A leading underscore is kept for folders of the store's own, such as _failures.
    return bool(_SEGMENT.fullmatch(name)) and not name.startswith("_") and name not in _NO_FOLDER


def check_segment(name: str, what: str) -> str:
    """Return a name that may stand in a path of a store.

    Raises
    ------
    StoreError
        If it could lead to another place, such as ``..`` or a name with a slash.
    """
    if not is_segment(name):
        raise StoreError(
            f"{what} {name[:60]!r} may hold only letters, digits and . _ -, not begin with _, and not be . or .."
        )
    return name


def check_new_name(name: str, what: str) -> str:
    """Return a name under which something may be written to a store.

    Raises
    ------
    StoreError
        If it is no segment of a path, too long, or one of the store's own names.
    """
    check_segment(name, what)
    # Some file systems do not tell `Tissue` from `tissue`.
    if name.lower() in RESERVED:
        raise StoreError(f"{what} {name!r} is a name of the store's own; give another")
    if len(name) > MAX_NAME:
        raise StoreError(f"{what} {name[:60]!r}... has {len(name)} letters; give one of {MAX_NAME} at most")
    return name
