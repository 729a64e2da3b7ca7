"""What may stand in a store path, and how any name is made to."""

import re

_SEGMENT = re.compile(r"[A-Za-z0-9._-]+")


def slug(name: str) -> str:
    """Return a name as a store path segment: every character but ``[A-Za-z0-9._-]`` becomes ``-``."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)


def is_segment(name: str) -> bool:
    """Tell whether a name may stand in a store path: ``[A-Za-z0-9._-]+``, and not reserved."""
    return bool(_SEGMENT.fullmatch(name)) and not name.startswith("_") and name not in {".", ".."}
