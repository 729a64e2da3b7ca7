"""Addresses of stores on the hub: ``hf://datasets/OWNER/NAME[@REVISION][/FOLDER]``.

Arithmetic alone: nothing is requested, and the hub's client is not imported.
"""

import os
import re
from dataclasses import dataclass, replace
from typing import Self
from urllib.parse import quote, unquote

from featurestore.credentials import strip_credentials
from featurestore.errors import StoreError

SCHEME = "hf://"
_PLACE = re.compile(
    # A revision ends at the first slash, as the hub's client reads it; one with a slash is written with %2F, except for
    # the hub's own references of pull requests and conversions.
    r"hf://datasets/(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(@(?P<revision>refs/(?:pr|convert)/[\w.-]+|[\w.%-]+))?(?P<folder>(/[^/@?#\x00-\x1f]+)*)/*"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubPlace:
    """A folder of a repository of data on the hub.

    Parameters
    ----------
    repository
        ``OWNER/NAME``.
    revision
        A branch, a tag or a commit; None for ``main``.
    folder
        Path in the repository; empty for its root.
    """

    repository: str
    revision: str | None = None
    folder: str = ""

    @classmethod
    def parse(cls, url: str) -> Self:
        """Read an address.

        Raises
        ------
        ValueError
            If it is none of a repository of data.
        """
        found = _PLACE.fullmatch(url)
        folder = found["folder"].strip("/") if found else ""
        if found is None or {".", ".."} & set(folder.split("/")):
            raise ValueError(
                "a store on the hub is hf://datasets/OWNER/NAME, with @REVISION and /FOLDER where needed"
            )
        revision = found["revision"]
        return cls(found["repository"], None if revision is None else unquote(revision), folder)

    @property
    def is_fixed(self) -> bool:
        """Whether the revision is a commit, so that what is read never changes."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    def at(self, commit: str) -> Self:
        """Return the same place in a commit."""
        return replace(self, revision=commit)

    @property
    def path(self) -> str:
        """The place as the file system takes it: ``OWNER/NAME@REVISION/FOLDER``."""
        revision = f"@{quote(self.revision, safe='')}" if self.revision else ""
        return f"{self.repository}{revision}{f'/{self.folder}' if self.folder else ''}"

    @property
    def url(self) -> str:
        """The address."""
        return f"{SCHEME}datasets/{self.path}"


def check_writable(place: str | os.PathLike[str]) -> None:
    """Refuse a place on the hub, also where its URL was made a `Path`: stores there are only read.

    Raises
    ------
    StoreError
        With the command that uploads a folder.
    """
    url = os.fspath(place)
    if url.startswith(SCHEME[:-1]):
        # A Path has lost the second slash.
        url = SCHEME + url[len(SCHEME) - 1 :].lstrip("/")
        command = "upload-large-folder OWNER/NAME FOLDER --repo-type dataset"
        if not url.startswith(f"{SCHEME}datasets/"):
            command = "upload OWNER/NAME FOLDER"
        raise StoreError(
            f"{strip_credentials(url)} is read-only: nothing is written to the hub; write to a folder, then upload it with: "
            f"hf {command}"
        )
