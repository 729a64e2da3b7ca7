"""Files and folders of this machine that appear whole or not at all.

They are written under another name beside their place, and renamed when they are complete. A process that is killed
leaves that other name behind, never half a file under the right one.
"""

import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL_SUFFIX = ".partial"
PARTIAL_AGE_S = 3600
"""Partial files younger than this may belong to a process that is still writing."""


def is_partial(name: str) -> bool:
    """Tell whether a file of this name is being written, or was when its process was killed."""
    return name.endswith(PARTIAL_SUFFIX)


@contextmanager
def whole_file(path: Path, *, sweep: bool = False) -> Iterator[Path]:
    """Write a file or a folder whole or not at all; a file that is there is replaced.

    Parameters
    ----------
    path
        Its place; the folders above it are made. A folder there must be empty: no rename replaces a full one.
    sweep
        First remove what killed runs left of this path: for large files. It lists the folder that `path` is in.

    Yields
    ------
    pathlib.Path
        A path beside `path` that no other process uses. It becomes `path` when the block ends, and is removed if the
        block raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if sweep:
        _remove_abandoned(path)
    # Unique, since two runs of one command may write the same file at once: the last one wins, neither fails.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        _remove(partial)
        raise


def _remove_abandoned(path: Path) -> None:
    for file in path.parent.iterdir():
        if file.name.startswith(f"{path.name}.") and is_partial(file.name):
            with suppress(FileNotFoundError):  # finished by its own process since it was listed
                if file.stat().st_mtime < time.time() - PARTIAL_AGE_S:
                    _remove(file)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
