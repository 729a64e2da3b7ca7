"""Where a store is: a folder, or any URL that fsspec knows (``s3://``, ``memory://``).

All handles of file systems and zarr stores are made here, so credentials, listing caches and atomic writes are
handled once. Nothing here knows what the store holds.

Terms
    relative  a path below the root, ``/`` between its segments; empty for the root itself
"""

import datetime as dt
import errno
import json
import os
import re
import stat
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import fsspec

from featurestore.documents import parse_json
from featurestore.errors import StoreError
from featurestore.whole_file import PARTIAL_AGE_S, PARTIAL_SUFFIX, whole_file

if TYPE_CHECKING:
    from zarr.abc.store import Store as ZarrStore

PathOrUrl = str | os.PathLike[str]
"""A folder or file of this machine, or a URL as a string."""

_SHORTENED_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
# A user and password before the host, and a query, which may be a signature.
_CREDENTIALS = re.compile(r"(?<=://)[^/@]*@|\?.*$")
REMOVE_TRIES = 20
"""Of removing a folder that another process writes into: between two blocks of a run there are milliseconds at least."""
S3_TRIES = 6
"""Of one request, with waits that double; s3fs repeats that a few times. It must outlast a few minutes of errors."""


def as_url(place: PathOrUrl) -> str:
    """Return a path or URL as a string.

    Raises
    ------
    StoreError
        If a URL was made a `Path`, which drops one of its slashes.
    """
    url = os.fspath(place)
    if isinstance(place, PurePath) and _SHORTENED_URL.match(url):
        raise StoreError(f"{url} was a URL before it became a Path, which drops a slash; give it as a string")
    return url


def strip_credentials(url: str) -> str:
    """Return a URL without user, password or signed query: safe to store and to print."""
    return _CREDENTIALS.sub("", url) if "://" in url else url


@dataclass(frozen=True)
class Entry:
    """One object in a listing: its bytes, and when it was written, where the file system reports it (UTC)."""

    size: int
    modified: dt.datetime | None


def _modified(entry: dict[str, Any]) -> dt.datetime | None:
    # S3, local disks and memory each use another key, and some give seconds instead of a datetime.
    value = entry.get("LastModified") or entry.get("mtime") or entry.get("created")
    if isinstance(value, (int, float)):
        return dt.datetime.fromtimestamp(value, dt.UTC)
    return value.astimezone(dt.UTC) if isinstance(value, dt.datetime) else None


def storage_options(url: str) -> dict[str, Any]:
    """Return the options to open a URL with fsspec: with retries, since a run of days meets failing requests."""
    # fsspec's cached listings would hide what other workers have written.
    options: dict[str, Any] = {"use_listings_cache": False}
    if url.startswith("s3"):
        options["max_concurrency"] = 1  # with more, s3fs requests each object's size before its bytes
        options["config_kwargs"] = {
            "retries": {"max_attempts": S3_TRIES, "mode": "standard"},
            "connect_timeout": 10,
            "read_timeout": 60,
        }
    return options


def _remove_tree(fs: Any, path: str) -> None:
    """Remove an object or a folder, also where another process writes into the folder or removes it meanwhile."""
    for tries_left in reversed(range(REMOVE_TRIES)):
        try:
            fs.rm(path, recursive=True)
        except FileNotFoundError:
            if not fs.exists(path):
                return
        except OSError as error:
            # A folder is removed entry by entry: one that was written since it was listed is in the way.
            if error.errno != errno.ENOTEMPTY or not tries_left:
                raise
        else:
            return


@dataclass(frozen=True, init=False)
class Location:
    """The root of a store.

    Parameters
    ----------
    url
        A folder, or a URL. Credentials come from the environment or the profile, not from here.
    """

    url: str

    def __init__(self, url: PathOrUrl) -> None:
        object.__setattr__(self, "url", as_url(url))

    @property
    def label(self) -> str:
        """The URL as it may be printed."""
        return strip_credentials(self.url)

    @property
    def is_local(self) -> bool:
        """Whether this is a folder on this machine."""
        return "://" not in self.url or self.url.startswith("file://")

    @cached_property
    def _fs_root(self) -> tuple[Any, str]:
        try:
            fs, root = fsspec.core.url_to_fs(self.url, **storage_options(self.url))
        except ImportError as error:
            raise StoreError(
                f"{self.label} needs an extra package ({error}); install it with: pip install 'histosge[s3]'"
            ) from error
        except ValueError as error:
            raise StoreError(f"{self.label} cannot hold a store: {error}") from error
        return fs, root.rstrip("/")

    def zarr(self, *, read_only: bool = False) -> "ZarrStore":
        """Open the location as a zarr store.

        Raises
        ------
        StoreError
            If the URL needs an extra package, or is of no known kind.
        """
        from zarr.storage import FsspecStore, LocalStore

        from featurestore.checked_zarr import CheckedStore

        if self.is_local:
            return CheckedStore(LocalStore(self._fs_root[1], read_only=read_only), self.label)
        options = storage_options(self.url)
        return CheckedStore(
            FsspecStore.from_url(self.url, storage_options=options, read_only=read_only), self.label
        )

    def path(self, relative: str) -> str:
        """Return the full path of something below the root, as its file system takes it."""
        root = self._fs_root[1]
        return f"{root}/{relative}" if relative else root

    def exists(self, relative: str = "") -> bool:
        """Tell whether an object or folder exists."""
        return bool(self._fs_root[0].exists(self.path(relative)))

    def is_file(self, relative: str = "") -> bool:
        """Tell whether an object exists."""
        return bool(self._fs_root[0].isfile(self.path(relative)))

    def folders(self, relative: str = "") -> list[str]:
        """Return the names of the folders directly below, sorted; one listing."""
        return sorted(name for name, kind in self._children(relative) if kind == "directory")

    def files(self, relative: str = "") -> list[str]:
        """Return the names of the objects directly below, sorted; one listing."""
        return sorted(name for name, kind in self._children(relative) if kind == "file")

    def _children(self, relative: str) -> list[tuple[str, str]]:
        try:
            entries = self._fs_root[0].ls(self.path(relative), detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [(entry["name"].rstrip("/").rsplit("/", 1)[-1], entry["type"]) for entry in entries]

    def sizes(self, relative: str = "") -> dict[str, int]:
        """Return every object below with its bytes, by its path relative to `relative`; one listing."""
        return {name: entry.size for name, entry in self.entries(relative).items()}

    def entries(self, relative: str = "") -> dict[str, Entry]:
        """Return every object below, by its path relative to `relative`; one listing."""
        base = self.path(relative).rstrip("/") + "/"
        found = self._fs_root[0].find(self.path(relative), detail=True)
        prefix = base.lstrip("/")  # file systems differ in whether names begin with a slash
        return {
            name.lstrip("/").removeprefix(prefix): Entry(int(entry["size"] or 0), _modified(entry))
            for name, entry in found.items()
        }

    def read_json(self, relative: str) -> dict[str, Any] | None:
        """Return a JSON object, or None if there is none.

        Raises
        ------
        StoreError
            If it is not JSON, or no object.
        """
        label = f"{self.label}/{relative}"
        try:
            self._refuse_special_file(relative)
            value = parse_json(self._fs_root[0].cat_file(self.path(relative)), label)
        except (FileNotFoundError, NotADirectoryError):  # the latter where the root is a file
            return None
        if not isinstance(value, dict):
            raise StoreError(f"{label} is damaged: it is no JSON object")
        return value

    def _refuse_special_file(self, relative: str) -> None:
        """Refuse what is no file of a local disk: to open a fifo waits for ever for somebody to write."""
        if self.is_local:
            mode = Path(self.path(relative)).stat().st_mode
            if not stat.S_ISREG(mode):
                raise StoreError(f"{self.label}/{relative} is no file")

    def read_bytes(self, relative: str) -> bytes:
        """Return an object's bytes.

        Raises
        ------
        FileNotFoundError
            If there is none.
        """
        # Not open(): it requests an object's size before its bytes.
        return bytes(self._fs_root[0].cat_file(self.path(relative)))

    def write_json(self, relative: str, value: dict[str, Any]) -> None:
        """Write a JSON object, whole or not at all."""
        data = (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
        if not self.is_local:
            self._fs_root[0].pipe_file(self.path(relative), data)
            return
        with whole_file(Path(self.path(relative))) as partial:
            partial.write_bytes(data)

    def remove(self, relative: str) -> None:
        """Remove an object, or everything below a folder; it is no error if there is neither."""
        fs, _ = self._fs_root
        path = self.path(relative)
        if fs.exists(path):
            _remove_tree(fs, path)

    def sweep_partials(self, relative: str) -> int:
        """Remove partial files that killed writes left below a folder and in the folders above it; return how many.

        The root is left out, since its listing grows with the store.
        """
        if not self.is_local:
            return 0  # an object store never shows an object that was not written completely
        folder, root = Path(self.path(relative)), Path(self.path(""))
        above = [parent for parent in folder.parents if root in parent.parents]
        pattern = f"*{PARTIAL_SUFFIX}"
        horizon = time.time() - PARTIAL_AGE_S
        swept = 0
        for file in chain(folder.rglob(pattern), *(p.glob(pattern) for p in above)):
            with suppress(FileNotFoundError):  # finished or swept by another run since the listing
                if file.stat().st_mtime < horizon:
                    file.unlink()
                    swept += 1
        return swept
