"""The options ``--workers N|auto`` and ``--scheduler ADDRESS``: one way to read it, for all commands that have them."""

from typing import Literal

from featurestore.errors import ClusterError


def worker_count(value: str | None, scheduler: str | None) -> int | Literal["auto"] | None:
    """Return the number of worker processes that was typed, or ``auto``.

    Parameters
    ----------
    scheduler
        What was typed as --scheduler, which excludes --workers.

    Raises
    ------
    ClusterError
        If it is neither, or both options were given.
    """
    if value is None:
        return None
    text = value.strip()
    if text != "auto" and (not text.isdecimal() or int(text) < 1):
        raise ClusterError(f"--workers {value[:30]!r} is no number of processes: give 1 or more, or auto")
    if scheduler is not None:
        raise ClusterError(
            "--workers starts processes on this machine and --scheduler uses a running cluster; give one of them"
        )
    return "auto" if text == "auto" else int(text)
