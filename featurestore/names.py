"""Names in store paths: which are allowed, and how any name is made one."""

import re

_SEGMENT = re.compile(r"[A-Za-z0-9._-]+")
RESERVED = (".", "..", "zarr.json")
"""What no folder of a store can be called: other folders, and the document of the one above."""


def slug(name: str) -> str:
    """Return a name as a segment of a store path: every character but ``[A-Za-z0-9._-]`` becomes ``-``."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)


def is_segment(name: str) -> bool:
    """Tell whether a name may be a segment of a store path: ``[A-Za-z0-9._-]+``, and not reserved."""
    # A leading underscore is kept for folders of the store's own, such as _failures.
    return bool(_SEGMENT.fullmatch(name)) and not name.startswith("_") and name not in RESERVED
