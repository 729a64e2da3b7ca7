"""Files from elsewhere: what is checked before a library opens them, and what its errors become."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import h5py
import polars as pl

from featurestore.errors import FeatureStoreError, first_line
from featurestore.input_file import kind_of, shown
from histosge.errors import ExpressionError

FREE_BYTES = 256 << 20
"""An HDF5 file may claim this much whatever its own size: constant arrays take next to no room."""
MOST_COMPRESSED = 1100
"""Bytes in memory for one in the file: deflate reaches 1,032 at most, which is the limit of its format."""
MOST_OBJECTS = 100_000
"""Of one HDF5 file. AnnData files hold some hundred."""
_POINTER = b"version https://git-lfs.github.com/spec"


ROWS = 1 << 19
"""Rows of a large table in memory at once: 10 MB of a cell's corners (some 20,000 cells), 30 MB of molecules."""


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a library raises while it reads a file into one line.

    Only the library's own calls belong inside: our errors pass through, but our bugs would not be seen.

    Parameters
    ----------
    what
        What the file should be, for the message, such as ``AnnData``.

    Raises
    ------
    ExpressionError
        With the library's first line.
    """
    try:
        yield
    except FeatureStoreError:
        raise
    except (Exception, pl.exceptions.PanicException) as error:
        # A panic of polars is no Exception (2.1). Not a list of classes: anndata raises its private IORegistryError
        # (0.12), and on damaged files h5py, zarr and pandas raise almost any builtin.
        raise ExpressionError(f"{shown(path)} cannot be read as {what}: {first_line(error)}") from error


def require_file(path: Path) -> None:
    """Refuse what is no regular file, and what is only a note of where the file is.

    Raises
    ------
    ExpressionError
        For nothing, a folder, a pipe or a device; and for a Git LFS pointer.
    """
    kind = kind_of(path)
    if kind != "file":
        found = {None: "is not there", "folder": "is a folder", "other": "is a pipe or a device"}[kind]
        raise ExpressionError(f"{shown(path)} {found}; give a regular file")
    try:
        with path.open("rb") as file:
            head = file.read(len(_POINTER))
    except OSError as error:
        raise ExpressionError(f"{shown(path)} cannot be read: {error.strerror or error}") from error
    if head == _POINTER:
        raise ExpressionError(f"{shown(path)} is a Git LFS pointer, not the file; run: git lfs pull")


def parquet_slices(file: Path, columns: list[str]) -> Iterator[pl.DataFrame]:
    """Yield columns of a parquet file, `ROWS` rows at a time: never more is in memory than these and a row group.

    Raises
    ------
    ExpressionError
        If it cannot be read.
    """
    for number in count():
        with reading(file, "parquet"):
            found = pl.scan_parquet(file).select(columns).slice(number * ROWS, ROWS).collect()
        if not len(found):
            return
        yield found


def check_hdf5(path: Path) -> frozenset[str]:
    """Check what an HDF5 file claims to hold, before anything of it is read; return the names at its top.

    Raises
    ------
    ExpressionError
        If it is none, claims more than can be in it, or takes data from other files.
    """
    require_file(path)
    with reading(path, "HDF5"), h5py.File(path) as h5:
        allowed = FREE_BYTES + MOST_COMPRESSED * path.stat().st_size
        claimed, seen = 0, set()
        groups: list[Any] = [h5]
        while groups:
            group = groups.pop()
            for name in group:
                link = group.get(name, getlink=True)
                if isinstance(link, h5py.ExternalLink):
                    raise ExpressionError(f"{shown(path)}: {name!r} is a link to another file; copy it in")
                item = group[name]
                # By the object, not the name: hard links may form a circle.
                key = h5py.h5o.get_info(item.id).addr
                if key in seen:
                    continue
                seen.add(key)
                if len(seen) > MOST_OBJECTS:
                    raise ExpressionError(f"{shown(path)} holds over {MOST_OBJECTS} objects: no expression")
                if isinstance(item, h5py.Group):
                    groups.append(item)
                elif isinstance(item, h5py.Dataset):
                    if item.is_virtual or item.external:
                        raise ExpressionError(f"{shown(path)}: {item.name} lies in another file; copy it in")
                    claimed += item.nbytes if item.shape is not None else 0
                if claimed > allowed:
                    raise ExpressionError(
                        f"{shown(path)} claims {claimed:.3g} bytes in {path.stat().st_size} of its own ({item.name}); "
                        "it is damaged or made to fill the memory"
                    )
        # Names only: reading values, and attributes, is left to the library that knows what it needs.
        return frozenset(h5)
