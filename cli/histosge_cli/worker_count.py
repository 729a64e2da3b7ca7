"""The option ``--workers N|auto``: one way to read it, for all commands that have it."""

from typing import Literal

from featurestore.errors import ClusterError


def worker_count(value: str | None) -> int | Literal["auto"] | None:
    """Return the number of worker processes that was typed, or ``auto``.

    Raises
    ------
    ClusterError
        If it is neither.
    """
    if value is None:
        return None
    text = value.strip()
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise ClusterError(f"--workers {value[:30]!r} is no number of processes: give 1 or more, or auto")
    return int(text)
