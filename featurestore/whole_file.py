"""Files and folders of this machine that appear whole or not at all.

They are written under another name beside their place, and renamed when they are complete. A process that is killed
leaves that other name behind, never half a file under the right one.

Terms
    partial    ``<name>.<32 digits>.partial``: being written, or left by a process that was killed
    replaced   ``<name>.<32 digits>.replaced``: an older folder, on file systems that cannot swap two folders, in the
               moment between two renames
"""

import ctypes
import os
import re
import shutil
import stat
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

from featurestore.errors import OutputError

PARTIAL_SUFFIX = ".partial"
REPLACED_SUFFIX = ".replaced"
PARTIAL_AGE_S = 3600
"""Partial files younger than this may belong to a process that is still writing."""
# Linux, ext4, XFS, tmpfs, APFS and most others: bytes in one name of a path.
_NAME_BYTES = 255
# A dot, 32 hexadecimal digits and the longer suffix.
_ADDED_BYTES = 1 + 32 + len(REPLACED_SUFFIX)
# Letters of a long name that are kept: four bytes each at most, so that it fits with what is added.
_KEPT_LETTERS = 50
_RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")
# From linux/fs.h and sys/stdio.h of macOS.
_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2


def is_partial(name: str) -> bool:
    """Tell whether a file of this name is being written, or was when its process was killed."""
    return name.endswith(PARTIAL_SUFFIX)


def check_output(path: str | Path, *, folder: bool = False) -> None:
    """Refuse a place that a file or a folder cannot be written to, before hours are spent on what goes there.

    Nothing is made. Whether something that is there may be replaced is for the caller to check.

    Parameters
    ----------
    path
        Where the output is to be.
    folder
        Whether it is a folder; otherwise it is a file.

    Raises
    ------
    OutputError
        If a folder is there in place of a file, or the reverse; if it is a device or a pipe; if its name is too long;
        or if nothing can be written into the folder above it.
    """
    path = Path(path)
    try:
        with suppress(FileNotFoundError):
            _check_kind(path, path.stat().st_mode, folder=folder)
        real = Path(os.path.realpath(path))
        # The root itself has none above it.
        nearest = next(place for place in (*real.parents, real) if place.exists())
        # A file that is opened, not os.access: root may write everywhere by its bits, and yet not into /proc.
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write to {_shown(path)}: {error.strerror}; give another path") from error
    except ValueError as error:  # a NUL in the path
        raise OutputError(f"cannot write to {_shown(path)!r}: {error}; give another path") from error


def _check_kind(path: Path, mode: int, *, folder: bool) -> None:
    if folder and not stat.S_ISDIR(mode):
        raise OutputError(f"{_shown(path)} is a file, where a folder would go; give another path")
    if not folder and stat.S_ISDIR(mode):
        raise OutputError(f"{_shown(path)} is a folder, where a file would go; give the path of a file")
    if not folder and not stat.S_ISREG(mode):
        raise OutputError(f"{_shown(path)} is a device or a pipe, no file; give the path of a file")


def _shown(path: Path) -> str:
    """Return a path for a message: of one that is too long, its ends."""
    text = str(path)
    return text if len(text) <= 300 else f"{text[:100]}...{text[-50:]} ({len(text)} letters)"


@contextmanager
def whole_file(path: Path, *, sweep: bool = False) -> Iterator[Path]:
    """Write a file whole or not at all; a file that is there is replaced.

    Parameters
    ----------
    path
        Its place; the folders above it are made. Through a symbolic link, the file that it names is replaced.
    sweep
        First remove what killed runs left of this path: for large files. It lists the folder that `path` is in.

    Yields
    ------
    pathlib.Path
        A path beside `path` that no other process uses. It becomes `path` when the block ends, and is removed if the
        block raises.

    Raises
    ------
    OSError
        In place of another library's error that holds one of the system's in words only.
    """
    path = _real(path)
    if sweep:
        _remove_abandoned(path)
    partial = _beside(path, PARTIAL_SUFFIX)
    try:
        yield partial
        partial.replace(path)
    except BaseException as error:
        _remove(partial)
        # Libraries in Rust, such as polars 1.35, report a full disk as an error of their own, which ends like this.
        if not isinstance(error, OSError) and (found := _RUST_OS_ERROR.search(str(error))):
            code = int(found[1])
            raise OSError(code, os.strerror(code), str(path)) from error
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Write a folder whole or not at all. A folder that is there stays until the new one is complete, and is replaced.

    What killed runs left of this path is removed first.

    Parameters
    ----------
    path
        Its place; the folders above it are made. Whether what is there may be replaced is for the caller to check.

    Yields
    ------
    pathlib.Path
        A path beside `path` that no other process uses and where nothing is yet: the block makes a folder there. It
        becomes `path` when the block ends, and is removed if the block raises.
    """
    path = _real(path)
    restore_replaced(path)
    _remove_abandoned(path)
    partial = _beside(path, PARTIAL_SUFFIX)
    try:
        yield partial
        _replace_folder(partial, path)
    finally:
        # After a swap, the old folder lies here.
        _remove(partial)


@contextmanager
def partial_place(path: Path) -> Iterator[Path]:
    """Yield a place of the same name and suffix in a folder beside `path`, on the same file system; removed at the end.

    For writers that go by the suffix, and for results that are compared with what is there before they take its place,
    see `put_in_place`. What killed runs left of this path is removed first.
    """
    path = _real(path)
    restore_replaced(path)
    _remove_abandoned(path)
    folder = _beside(path, PARTIAL_SUFFIX)
    folder.mkdir()
    try:
        yield folder / path.name
    finally:
        _remove(folder)


def put_in_place(new: Path, path: Path) -> None:
    """Let a complete file or folder take the place of another, or of none; a kill leaves the old or the new one."""
    path = _real(path)
    if new.is_dir():
        _replace_folder(new, path)
        _remove(new)
    else:
        new.replace(path)


def restore_replaced(path: Path) -> None:
    """Put an older folder back whose replacement was killed between two renames; nothing is done where `path` exists.

    Only file systems that cannot swap two folders need it.
    """
    path = Path(os.path.realpath(path))
    if path.exists() or not path.parent.is_dir():
        return
    for folder in path.parent.glob(f"*{REPLACED_SUFFIX}"):
        if folder.name.startswith(f"{_stem(path)}."):
            with suppress(OSError):  # another process was first
                folder.rename(path)
            return


def _real(path: Path) -> Path:
    # Beside the file itself, not beside a link to it: a rename over a link would replace the link, and the place that
    # it names may be another file system.
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _beside(path: Path, suffix: str) -> Path:
    # Unique, since two runs of one command may write the same file at once: the last one wins, neither fails.
    return path.with_name(f"{_stem(path)}.{uuid.uuid4().hex}{suffix}")


def _stem(path: Path) -> str:
    """Return the name of a path, shortened where more could not be added to it."""
    is_long = len(os.fsencode(path.name)) + _ADDED_BYTES > _NAME_BYTES
    return path.name[:_KEPT_LETTERS] if is_long else path.name


def _replace_folder(partial: Path, path: Path) -> None:
    # An empty folder is replaced by the rename itself.
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        partial.rename(path)
        return
    if _swap(partial, path):
        return
    # Two renames, as no system call replaces a folder that is not empty. `restore_replaced` undoes the first if the
    # process is killed before the second.
    old = _beside(path, REPLACED_SUFFIX)
    path.rename(old)
    try:
        partial.rename(path)
    except BaseException:
        old.rename(path)
        raise
    _remove(old)


def _swap(one: Path, other: Path) -> bool:
    """Let two names change places in one step; False where the system or the file system cannot."""
    # In glibc from 2.28 on, and in macOS from 10.12. NFS and some FUSE file systems answer EINVAL.
    name, before, between, flag = {
        "linux": ("renameat2", [_AT_FDCWD], [_AT_FDCWD], _RENAME_EXCHANGE),
        "darwin": ("renamex_np", [], [], _RENAME_SWAP),
    }.get(sys.platform, ("", [], [], 0))
    function = getattr(ctypes.CDLL(None), name, None) if name else None
    if function is None:
        return False
    return bool(function(*before, os.fsencode(one), *between, os.fsencode(other), flag) == 0)


def _remove_abandoned(path: Path) -> None:
    for file in path.parent.iterdir():
        if file.name.startswith(f"{_stem(path)}.") and is_partial(file.name):
            with suppress(FileNotFoundError):  # finished by its own process since it was listed
                if _last_written(file) < time.time() - PARTIAL_AGE_S:
                    _remove(file)


def _last_written(path: Path) -> float:
    """Return when anything in a file or folder was last written: a folder's own time says only when names changed."""
    below = path.rglob("*") if path.is_dir() else ()
    return max(entry.stat().st_mtime for entry in chain((path,), below))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
