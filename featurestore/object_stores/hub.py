"""Repositories of data on the hub: ``hf://datasets/OWNER/NAME``, read-only, with the package huggingface_hub.

Not with that package's `HfFileSystem`: it requests a folder's listing before each file, keeps every listing in memory, and
raises the same `FileNotFoundError` for a file and for a repository that is not there (2.4). Here an object is one request,
and what is read belongs to one commit, so that a branch may be pushed to during a run.

Endpoint, token and proxies are the client's own: ``HF_ENDPOINT``, ``HF_TOKEN`` or ``hf auth login``.
"""

import errno
import logging
import threading
from collections.abc import Iterator
from typing import Any, NoReturn
from urllib.parse import quote

from fsspec import AbstractFileSystem
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, http_backoff  # type: ignore[attr-defined]  # re-exported without a list

from featurestore.object_stores.bucket_check import ServerReplyError
from featurestore.object_stores.hub_place import SCHEME, HubPlace
from featurestore.object_stores.hub_transport import transport_errors

# The client logs each repeated request, with its URL, to a handler of its own that prints; what fails for good is an error.
logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)

TRIES, FIRST_WAIT_S, MAX_WAIT_S = 6, 1.0, 8.0
"""Of one request, with waits that double: the client's own defaults."""
_REPEATED = (429, 500, 502, 503, 504)
TIMEOUT_S = 60.0
"""Without a byte from the server, as for the other object stores."""
_NO_RANGE = 416
_MAX_MESSAGE = 200
"""Letters of the server's message that are shown."""

_commits: dict[tuple[str, str, str], str] = {}
_commits_lock = threading.Lock()


class HubStorage(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Files of repositories of data, by ``OWNER/NAME@REVISION/PATH``.

    What is not there raises `FileNotFoundError`; a repository or revision that is not there, `ServerReplyError`, as does
    everything else that the server refuses.

    Parameters
    ----------
    endpoint
        The server.
    token
        False to read without the user's token, where there is one.
    """

    protocol = "hf"
    root_marker = ""

    def __init__(self, endpoint: str, token: bool | None = None, **options: Any) -> None:
        super().__init__(endpoint=endpoint, token=token, **options)
        self.endpoint, self.token = endpoint.rstrip("/"), token

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix(f"{SCHEME}datasets/").strip("/")

    def commit_of(self, place: HubPlace) -> str:
        """Return the commit that a revision names, as it was when this process first looked.

        Every part of a run must see the same content, whatever is pushed meanwhile; so the answer is kept.
        """
        key = self.endpoint, place.repository, place.revision or "main"
        with _commits_lock:
            if key not in _commits:
                url = f"{self.endpoint}/api/datasets/{place.repository}/revision/{quote(key[2], safe='')}"
                found = self._json(self._request("GET", url, place.path))
                commit = place.at(_field(found, "sha"))
                if not commit.is_fixed:
                    raise OSError(errno.EIO, "the server names no commit of the revision")
                _commits[key] = str(commit.revision)
            return _commits[key]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """Return a file's bytes, or a part of them: one request."""
        place = self._place(path)
        headers = {}
        is_suffix = end is None and start is not None and start < 0
        # An end that counts from the file's end would need its size; nobody here reads so, and it is cut below.
        if is_suffix:
            headers["Range"] = f"bytes={start}"
        elif (start or end) and (start or 0) >= 0 and (end is None or end > (start or 0)):
            headers["Range"] = f"bytes={start or 0}-{'' if end is None else end - 1}"
        url = (
            f"{self.endpoint}/datasets/{place.repository}/resolve/{quote(place.revision or 'main', safe='')}/"
            f"{quote(place.folder)}"
        )
        response = self._request("GET", url, path, headers, allowed=(_NO_RANGE,))
        if response.status_code == _NO_RANGE:
            return b""
        data = bytes(response.content)
        # A server may answer with the whole file.
        return data if response.status_code == 206 or not (start or end) else data[start:end]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Return name, size and type: one request."""
        place = self._place(path)
        if not place.folder:
            return {"name": place.path, "size": 0, "type": "directory"}
        url = (
            f"{self.endpoint}/api/datasets/{place.repository}/paths-info/"
            f"{quote(place.revision or 'main', safe='')}"
        )
        body = {"paths": [place.folder], "expand": False}
        entries = _entries(self._json(self._request("POST", url, path, data=body)), place)
        found = next((entry for entry in entries if entry["name"] == place.path), None)
        if found is None:
            raise FileNotFoundError(path)
        return found

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """Return what is directly below a folder; a request for each thousand entries."""
        entries = list(self._tree(path, recursive=False))
        return entries if detail else [entry["name"] for entry in entries]

    def find(
        self,
        path: str,
        maxdepth: int | None = None,
        withdirs: bool = False,
        detail: bool = False,
        **_: Any,
    ) -> Any:
        """Return all files below a folder; a request for each thousand entries."""
        if maxdepth is not None:
            return super().find(path, maxdepth=maxdepth, withdirs=withdirs, detail=detail)
        found = {
            entry["name"]: entry
            for entry in self._tree(path, recursive=True)
            if withdirs or entry["type"] == "file"
        }
        return found if detail else sorted(found)

    def pipe_file(self, path: str, *_: Any, **__: Any) -> NoReturn:
        """Refuse."""
        self._refuse_write()

    def rm(self, path: Any, *_: Any, **__: Any) -> NoReturn:
        """Refuse."""
        self._refuse_write()

    def _open(self, path: str, mode: str = "rb", *_: Any, **__: Any) -> NoReturn:
        self._refuse_write()

    def _refuse_write(self) -> NoReturn:
        raise OSError(errno.EROFS, "repositories on the hub are only read")

    def _place(self, path: str) -> HubPlace:
        return HubPlace.parse(f"{SCHEME}datasets/{self._strip_protocol(path)}")

    def _tree(self, path: str, *, recursive: bool) -> Iterator[dict[str, Any]]:
        place = self._place(path)
        folder = f"/{quote(place.folder, safe='')}" if place.folder else ""
        url: str | None = (
            f"{self.endpoint}/api/datasets/{place.repository}/tree/"
            f"{quote(place.revision or 'main', safe='')}{folder}?recursive={str(recursive).lower()}&expand=false"
        )
        while url:
            response = self._request("GET", url, path)
            yield from _entries(self._json(response), place)
            url = response.links.get("next", {}).get("url")
            # The token goes along with each request, so only to the server that the user named.
            if url is not None and not url.startswith(f"{self.endpoint}/"):
                raise OSError(errno.EIO, "the server's listing goes on at another server")

    def _json(self, response: Any) -> Any:
        try:
            return response.json()
        except ValueError as error:
            raise OSError(errno.EIO, "the server's answer is no JSON") from error

    def _request(
        self,
        method: Any,
        url: str,
        path: str,
        headers: dict[str, str] | None = None,
        allowed: tuple[int, ...] = (),
        **options: Any,
    ) -> Any:
        """Send a request, again where that may help; return the response."""
        try:
            response = http_backoff(
                method,
                url,
                max_retries=TRIES - 1,
                base_wait_time=FIRST_WAIT_S,
                max_wait_time=MAX_WAIT_S,
                retry_on_status_codes=_REPEATED,
                headers=build_hf_headers(token=self.token) | (headers or {}),
                timeout=TIMEOUT_S,
                **options,
            )
        except HfHubHTTPError as error:
            raise _refusal(error.response, path) from error
        except transport_errors() as error:
            # Clients before 1.0 raise the transport's own error for a reply that stays one after all tries.
            if (reply := getattr(error, "response", None)) is not None:
                raise _refusal(reply, path) from error
            raise ConnectionError(" ".join(str(error).split()) or type(error).__name__) from error
        if response.status_code >= 400 and response.status_code not in allowed:
            raise _refusal(response, path)
        return response


def _refusal(response: Any, path: str) -> OSError:
    """Return the error of a reply."""
    code = response.headers.get("X-Error-Code", "")
    # Only by its code: a repository, a revision and a file that is not there all have the status 404, and to take a missing
    # repository for missing blocks would read as NaN.
    if code == "EntryNotFound":
        return FileNotFoundError(path)
    message = " ".join(response.headers.get("X-Error-Message", "").split())
    return ServerReplyError(response.status_code, code, message[:_MAX_MESSAGE])


def _entries(found: Any, place: HubPlace) -> list[dict[str, Any]]:
    """Return entries of a listing as fsspec names them."""
    if not isinstance(found, list):
        raise OSError(errno.EIO, "the server's listing is no list")
    root = HubPlace(place.repository, place.revision).path
    kinds = {"file": "file", "directory": "directory"}
    return [
        {
            "name": f"{root}/{_field(entry, 'path')}",
            "size": int(entry.get("size") or 0),
            "type": kinds.get(str(_field(entry, "type")), "other"),
        }
        for entry in found
    ]


def _field(entry: Any, name: str) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get(name), str):
        raise OSError(errno.EIO, f"the server's answer lacks {name!r}")
    return entry[name]


def open_hub(**options: Any) -> Any:
    """Return the file system of ``hf://`` URLs, or with ``asynchronous`` one whose methods are coroutines."""
    if not options.pop("asynchronous", False):
        return HubStorage(**options)
    return AsyncFileSystemWrapper(HubStorage(**options), asynchronous=True)


def forget_commits() -> None:
    """Look revisions up anew when they are opened next, see `HubStorage.commit_of`."""
    with _commits_lock:
        _commits.clear()
