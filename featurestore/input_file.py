"""What lies at a path that a user named, found without opening it: opening a pipe waits until somebody writes."""

import os
import stat
from typing import Literal

Kind = Literal["file", "folder", "other"]
"""Of what is there, links followed; ``other`` is a pipe, a socket or a device."""

_SHOWN = 200


def kind_of(path: str | os.PathLike[str]) -> Kind | None:
    """Return what is at a path; None if there is nothing, or no file can have that name."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116  # a path of the user's may be no valid `Path`
    except (OSError, ValueError):  # not there, not allowed, too long, a NUL inside
        return None
    if stat.S_ISREG(mode):
        return "file"
    return "folder" if stat.S_ISDIR(mode) else "other"


def shown(path: str | os.PathLike[str]) -> str:
    """Return a path for a message of one line: of one that is too long, its ends; other signs escaped."""
    text = os.fspath(path)
    text = text if text.isprintable() else text.encode("unicode_escape").decode()
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}...{text[-_SHOWN // 4 :]}"
