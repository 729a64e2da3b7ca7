"""The dashboard of a local run: on the port that was named, and for this machine alone."""

import socket
import urllib.request

import pytest
from _s3 import free_port

from featurestore.embedding import limits
from featurestore.embedding.dask_clients import local_client
from featurestore.errors import ClusterError


def _other_address() -> str:
    """Return an address of this machine that others use; without a network one that is loopback, but not 127.0.0.1."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return "127.0.0.2"
        return str(probe.getsockname()[0])


def test_it_answers_on_its_port_of_loopback_and_nowhere_else() -> None:
    port = free_port()
    with local_client(1, threads=1, dashboard=port):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=120) as answer:
            assert answer.status == 200
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((_other_address(), port), timeout=120)


def test_a_port_that_is_taken_and_a_package_that_is_missing_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "find_spec", lambda name: object())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ClusterError, match=r"port cannot be had .*; give another one"):
            limits.check_dashboard(taken.getsockname()[1])
    limits.check_dashboard(free_port())
    monkeypatch.setattr(limits, "find_spec", lambda name: None)
    with pytest.raises(ClusterError, match=r"pip install 'histosge\[dashboard\]'"):
        limits.check_dashboard(free_port())
