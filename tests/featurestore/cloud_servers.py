"""Emulators of Google Cloud Storage and Azure, each in a process of its own, with one bucket."""

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from _s3 import free_port

BUCKET = "test"
START_S = 180
# Azurite's own account, which is in its documentation.
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@dataclass(frozen=True)
class CloudServer:
    """A running emulator: the scheme of its URLs, its port, and what a client's environment needs."""

    scheme: str
    port: int

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.scheme, self.port)


def environment(scheme: str, port: int) -> dict[str, str]:
    """Return what a client needs to reach a server or a proxy in front of it."""
    if scheme == "gs":
        return {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}"}
    return {
        "AZURE_STORAGE_CONNECTION_STRING": (
            f"DefaultEndpointsProtocol=http;AccountName={AZURE_ACCOUNT};AccountKey={AZURE_KEY};"
            f"BlobEndpoint=http://127.0.0.1:{port}/{AZURE_ACCOUNT};"
        )
    }


def _command(scheme: str, port: int, azurite: str | None) -> list[str]:
    where = ["--host=127.0.0.1", f"--port={port}", "--in-memory", f"--default-bucket={BUCKET}"]
    if scheme == "gs":
        return [sys.executable, "-m", "gcp_storage_emulator", "start", *where]
    where = ["--blobHost", "127.0.0.1", "--blobPort", str(port)]
    # Without the version's check: the Python client asks for newer ones than azurite knows.
    assert azurite, "azurite is missing: npm install azurite"
    return [
        azurite,
        *where,
        "--inMemoryPersistence",
        "--skipApiVersionCheck",
        "--disableTelemetry",
        "--silent",
    ]


@contextmanager
def serving_cloud(scheme: str, folder: Path, azurite: str | None = None) -> Iterator[CloudServer]:
    """Run an emulator for a while; `folder` is its working directory, `azurite` the program for Azure."""
    server = CloudServer(scheme, free_port())
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(
        _command(scheme, server.port, azurite),
        stdout=quiet,
        stderr=quiet,
        cwd=folder,
        env={**os.environ, "PYTHONWARNINGS": ""},
    )
    try:
        deadline = time.monotonic() + START_S
        while not _answers(server.port):
            assert process.poll() is None, f"the emulator of {scheme}:// ended"
            assert time.monotonic() < deadline, f"the emulator of {scheme}:// did not start"
            time.sleep(0.05)
        if scheme == "az":
            make_container(server, BUCKET)
        yield server
    finally:
        process.kill()
        process.wait()


def make_container(server: CloudServer, name: str, public: str | None = None) -> None:
    from azure.storage.blob import BlobServiceClient

    with BlobServiceClient.from_connection_string(
        server.environment["AZURE_STORAGE_CONNECTION_STRING"]
    ) as client:
        client.create_container(name, public_access=public)


def make_bucket(server: CloudServer, name: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    connection.request(
        "POST", "/storage/v1/b", json.dumps({"name": name}), {"Content-Type": "application/json"}
    )
    assert connection.getresponse().status == 200
    connection.close()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
