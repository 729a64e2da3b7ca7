"""A small server with the hub's protocol: files, listings and revisions of repositories, as huggingface_hub requests them.

Addresses and answers are those of the hub's API documentation and of the client's requests (huggingface_hub 2.4).
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from featurestore.object_stores import hub as client

TOKEN = "hf_secret_token_of_a_user"
COMMIT = "5" * 40
LATER = "7" * 40
BRANCH = "refs/pr/3"


@dataclass
class Hub:
    """Repositories by name (``datasets/OWNER/NAME``, ``OWNER/NAME`` for models), each with commits by revision.

    Parameters
    ----------
    files
        Of one repository and commit, by path.
    revisions
        Commit of each name of a revision; the same in all repositories.
    status, code, message
        Answer everything so, if the status is not 200.
    failures
        Statuses that the next requests for files and listings get, first to last.
    page
        Entries of a listing in one answer; the hub's own number is 1,000.
    requests
        Method and path of each request.
    """

    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, "v2": COMMIT, BRANCH: COMMIT})
    status: int = 200
    code: str = ""
    message: str = ""
    failures: list[int] = field(default_factory=list)
    page: int = 1000
    requests: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    url: str = ""

    def add(self, repository: str, path: str, data: bytes, commit: str = COMMIT) -> None:
        """Put a file into a repository."""
        self.files.setdefault((repository, commit), {})[path] = data

    def add_folder(self, repository: str, folder: Path, below: str = "", commit: str = COMMIT) -> None:
        """Put all files of a folder into a repository."""
        for file in folder.rglob("*"):
            if file.is_file():
                self.add(repository, below + file.relative_to(folder).as_posix(), file.read_bytes(), commit)

    def seen(self, part: str) -> list[str]:
        """Return the requests whose path holds a text."""
        return [request for request in self.requests if part in request]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self, method: str) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        hub.requests.append(f"{method} {unquote(self.path)}")
        hub.tokens.add(self.headers.get("Authorization"))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        if hub.status != 200:
            return self._refuse(hub.status, hub.code, hub.message)
        if hub.failures:
            return self._refuse(hub.failures.pop(0))
        if parts.path == "/api/models":  # whether the hub can be reached at all
            return self._json([])
        if parts.path.startswith("/api/"):
            kind, rest = parts.path.removeprefix("/api/").split("/", 1)
            owner, name, *words = rest.split("/")
            repository = f"datasets/{owner}/{name}" if kind == "datasets" else f"{owner}/{name}"
            what, *words = words or ["revision"]
            revision = words.pop(0) if words else "main"
            path = "/".join(words)
        else:
            what = "resolve"
            before, _, after = parts.path[1:].partition("/resolve/")
            repository, (revision, _, path) = before, after.partition("/")
        revision, path = unquote(revision), unquote(path)
        if repository not in {known for known, _ in hub.files}:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        commit = hub.revisions.get(revision, revision)
        files = hub.files.get((repository, commit))
        if files is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if what == "resolve":
            return self._file(files, path, commit)
        if what == "revision":
            return self._json({"id": repository.removeprefix("datasets/"), "sha": commit, "siblings": []})
        if what == "paths-info":
            wanted = parse_qs(body.decode())["paths"]
            return self._json(
                [entry for entry in _entries(files, "", recursive=True) if entry["path"] in wanted]
            )
        query = parse_qs(parts.query)
        found = _entries(files, path, recursive=query.get("recursive", [""])[0].lower() in ("true", "1"))
        if path and not found:
            return self._refuse(404, "EntryNotFound", f"{path} does not exist on {revision}")
        start = int(query.get("cursor", ["0"])[0])
        end = start + hub.page
        link = f"{hub.url}{parts.path}?recursive={query['recursive'][0]}&cursor={end}"
        return self._json(found[start:end], {"Link": f'<{link}>; rel="next"'} if end < len(found) else {})

    def _file(self, files: dict[str, bytes], path: str, commit: str) -> None:
        if path not in files:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        data, status = files[path], 200
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit}
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first) if first else max(0, len(data) - int(last))
            if start >= len(data):
                return self._refuse(416)
            end = min(int(last) + 1, len(data)) if first and last else len(data)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            data, status = data[start:end], 206
        return self._send(status, data, headers)

    def _json(self, value: object, headers: dict[str, str] | None = None) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _refuse(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"X-Error-Code": code} if code else {}
        self._send(status, b"", headers | ({"X-Error-Message": message} if message else {}))

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def log_message(self, *args: object) -> None:
        pass


def _entries(files: dict[str, bytes], folder: str, *, recursive: bool) -> list[dict[str, object]]:
    """Return what the hub's tree shows below a folder."""
    prefix = f"{folder}/" if folder else ""
    found: dict[str, dict[str, object]] = {}
    for path, data in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        words = path.removeprefix(prefix).split("/")
        for depth in range(1, len(words)):
            name = prefix + "/".join(words[:depth])
            if recursive or depth == 1:
                found[name] = {"type": "directory", "path": name, "size": 0, "oid": "a" * 40}
        if recursive or len(words) == 1:
            oid = hashlib.sha1(data).hexdigest()
            found[path] = {"type": "file", "path": path, "size": len(data), "oid": oid}
    return list(found.values())


@contextmanager
def serving_hub(patch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """Run a hub that this process, and those that it starts, take for theirs; its client keeps files in `cache`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = hub  # type: ignore[attr-defined]
    hub.url = f"http://127.0.0.1:{server.server_port}"
    patch.setenv("HF_ENDPOINT", hub.url)
    patch.setenv("HF_HUB_CACHE", str(cache))
    patch.setenv("HF_TOKEN", TOKEN)
    patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    patch.setattr(client, "FIRST_WAIT_S", 0.0)
    # A port may be that of an earlier test's server.
    client.forget_commits()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        client.forget_commits()
