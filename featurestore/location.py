"""Where a store is: a folder of this machine, or a URL of one of `STORE_SCHEMES`.

All handles of file systems and zarr stores are made here, so credentials, listing caches, atomic writes and what a
server refuses are handled once. Nothing here knows what the store holds.

Terms
    relative  a path below the root, ``/`` between its segments; empty for the root itself
"""

import datetime as dt
import errno
import json
import stat
import time
from collections.abc import Collection
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurestore.credentials import strip_credentials
from featurestore.documents import DocumentError, check_file, parse_json
from featurestore.errors import StoreError
from featurestore.file_systems import (
    SCHEMES,
    STORE_SCHEMES,
    check_url,
    fixed_url,
    is_anonymous,
    open_file_system,
)
from featurestore.file_systems import PathOrUrl as PathOrUrl
from featurestore.file_systems import as_url as as_url
from featurestore.object_stores.hub_place import check_writable
from featurestore.server_errors import ABSENT, access_as_error
from featurestore.whole_file import PARTIAL_AGE_S, PARTIAL_SUFFIX, whole_file

if TYPE_CHECKING:
    from zarr.abc.store import Store as ZarrStore

WRITE_TRIES = 5
"""Of writing a file whose folder is removed meanwhile: a folder is removed once."""
REMOVE_TRIES = 20
"""Of removing a folder that another process writes into: between two blocks of a run there are milliseconds at least."""


@dataclass(frozen=True)
class Entry:
    """One object in a listing: its bytes, and when it was written, where the file system reports it (UTC)."""

    size: int
    modified: dt.datetime | None


def _modified(entry: dict[str, Any]) -> dt.datetime | None:
    # S3, Azure, local disks with Google, and memory each use another key, and some give seconds instead of a datetime.
    keys = ("LastModified", "last_modified", "mtime", "created")
    value = next((entry[key] for key in keys if entry.get(key)), None)
    if isinstance(value, (int, float)):
        return dt.datetime.fromtimestamp(value, dt.UTC)
    return value.astimezone(dt.UTC) if isinstance(value, dt.datetime) else None


def _write_whole(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file of this machine, also where another process removes the folder that it goes to meanwhile.

    What is written into a removed slide is found when the slide is complete; it must not end the run of the others.
    """
    for tries_left in reversed(range(WRITE_TRIES)):
        try:
            with whole_file(path) as partial, partial.open("wb") as file:
                for part in parts:
                    file.write(part)
        except FileNotFoundError:
            if not tries_left:
                raise
        else:
            return


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
    """The root of a store, or any folder or URL.

    What a server or disk refuses is an `AccessError` in every method.

    Parameters
    ----------
    url
        A folder, or a URL. Credentials come from the environment or the profile, not from here.
    schemes
        Of URLs that may be opened: more for a store that the user names (`store_location`) than for what files name.
    """

    url: str
    schemes: Collection[str]

    def __init__(self, url: PathOrUrl, schemes: Collection[str] = SCHEMES) -> None:
        object.__setattr__(self, "url", as_url(url))
        object.__setattr__(self, "schemes", tuple(schemes))

    def below(self, relative: str) -> "Location":
        """Return a folder of this location."""
        return Location(f"{self.url.rstrip('/')}/{relative}", self.schemes)

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
        fs, root = open_file_system(self.url, schemes=self.schemes)
        return fs, root.rstrip("/")

    def _access(self, relative: str, what: str = "cannot be read") -> AbstractContextManager[None]:
        """Turn what a file system raises into an `AccessError`, except that an object is not there."""
        label = f"{self.label}/{relative}" if relative else self.label
        return access_as_error(label, self.url, what, is_anonymous=is_anonymous(self.url))

    def zarr(self, *, read_only: bool = False) -> "ZarrStore":
        """Open the location as a zarr store.

        Raises
        ------
        StoreError
            If the URL needs an extra package, or is of no allowed scheme.
        """
        from featurestore.checked_zarr import CheckedStore

        if self.is_local:
            from zarr.storage import LocalStore

            return CheckedStore(LocalStore(self._fs_root[1], read_only=read_only), self.label)
        from featurestore.remote_zarr import RemoteZarrStore

        store = RemoteZarrStore.open_url(self.url, read_only=read_only, schemes=self.schemes)
        return CheckedStore(store, self.label)

    def path(self, relative: str) -> str:
        """Return the full path of something below the root, as its file system takes it."""
        root = self._fs_root[1]
        if not relative:
            return root
        if not self.is_local:
            check_url(f"{self.url.rstrip('/')}/{relative}", self.schemes)
        return f"{root}/{relative}"

    def exists(self, relative: str = "") -> bool:
        """Tell whether an object or folder exists."""
        return self._kind(relative) is not None

    def is_file(self, relative: str = "") -> bool:
        """Tell whether an object exists."""
        return self._kind(relative) == "file"

    def _kind(self, relative: str) -> str | None:
        """Return "file" or "directory", or None where nothing is."""
        path = self.path(relative)
        try:
            with self._access(relative):
                if self.is_local:
                    # Not info(): it does not follow a link, so one to nothing would exist.
                    return "directory" if stat.S_ISDIR(Path(path).stat().st_mode) else "file"
                # Not exists(), which takes every refusal of a server for an absence.
                return str(self._fs_root[0].info(path)["type"])
        except ABSENT:
            return None

    def folders(self, relative: str = "") -> list[str]:
        """Return the names of the folders directly below, sorted; one listing."""
        return sorted(name for name, kind in self._children(relative) if kind == "directory")

    def files(self, relative: str = "") -> list[str]:
        """Return the names of the objects directly below, sorted; one listing."""
        return sorted(name for name, kind in self._children(relative) if kind == "file")

    def _children(self, relative: str) -> list[tuple[str, str]]:
        try:
            with self._access(relative, "cannot be listed"):
                entries = self._fs_root[0].ls(self.path(relative), detail=True)
                return [(entry["name"].rstrip("/").rsplit("/", 1)[-1], entry["type"]) for entry in entries]
        except ABSENT:
            return []

    def sizes(self, relative: str = "") -> dict[str, int]:
        """Return every object below with its bytes, by its path relative to `relative`; one listing."""
        return {name: entry.size for name, entry in self.entries(relative).items()}

    def entries(self, relative: str = "") -> dict[str, Entry]:
        """Return every object below, by its path relative to `relative`; one listing."""
        base = self.path(relative).rstrip("/") + "/"
        prefix = base.lstrip("/")  # file systems differ in whether names begin with a slash
        try:
            with self._access(relative, "cannot be listed"):
                found = self._fs_root[0].find(self.path(relative), detail=True)
                return {
                    name.lstrip("/").removeprefix(prefix): Entry(int(entry["size"] or 0), _modified(entry))
                    for name, entry in found.items()
                }
        except ABSENT:
            return {}

    def read_json(self, relative: str) -> dict[str, Any] | None:
        """Return a JSON object, or None if there is none.

        Raises
        ------
        AccessError
            If the server or disk refuses.
        StoreError
            If it is not JSON, or no object.
        """
        label = f"{self.label}/{relative}"
        try:
            self._refuse_special_file(relative)
            try:
                value = parse_json(self.read_bytes(relative), label)
            except DocumentError:
                if self.is_local:
                    raise
                value = parse_json(self.read_bytes(relative), label)  # a reply may be cut on its way
        except ABSENT:
            return None
        if not isinstance(value, dict):
            raise StoreError(f"{label} is damaged: it is no JSON object")
        return value

    def _refuse_special_file(self, relative: str) -> None:
        """Refuse what is no file of a local disk, or larger than a document may be, before it is opened."""
        if self.is_local:
            check_file(Path(self.path(relative)), f"{self.label}/{relative}")

    def read_bytes(self, relative: str) -> bytes:
        """Return an object's bytes.

        Raises
        ------
        FileNotFoundError
            If there is none.
        AccessError
            If the server or disk refuses.
        """
        path = self.path(relative)
        with self._access(relative):
            # Not open(): it requests an object's size before its bytes.
            return bytes(self._fs_root[0].cat_file(path))

    def write_json(self, relative: str, value: dict[str, Any]) -> None:
        """Write a JSON object, whole or not at all."""
        data = (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
        if not self.is_local:
            path = self.path(relative)
            with self._access(relative, "cannot be written"):
                self._fs_root[0].pipe_file(path, data)
            return
        _write_whole(Path(self.path(relative)), data)

    def write_file(self, relative: str, *parts: bytes | memoryview) -> None:
        """Write an object of a folder on this machine, whole or not at all; a part after another, without joining them."""
        _write_whole(Path(self.path(relative)), *parts)

    def remove(self, relative: str) -> None:
        """Remove an object, or everything below a folder; it is no error if there is neither."""
        if not self.exists(relative):
            return
        path = self.path(relative)
        with self._access(relative, "cannot be removed"):
            _remove_tree(self._fs_root[0], path)

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


def store_location(url: PathOrUrl, *, writable: bool = False) -> Location:
    """Return the location of a store that the user names, also on the hub: there it is that of one commit.

    Parameters
    ----------
    writable
        Whether it is going to be written.

    Raises
    ------
    StoreError
        If it is on the hub and to be written, or names no repository of data there.
    AccessError
        If the hub refuses, or has no such repository or revision.
    """
    if writable:
        check_writable(url)
    return Location(fixed_url(url), STORE_SCHEMES)
