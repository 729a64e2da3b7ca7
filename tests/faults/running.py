"""Ways to run the command line in processes of its own, and to look at what it leaves."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from _s3 import Proxy, Server, environment

from featurestore.grid import GridSpec

GRID = GridSpec(0.5, 64, 24)
OPTIONS = ("--mpp", "0.5", "--patch", "64", "--stride", "24")


def contents(folder: Path) -> dict[str, bytes]:
    """Every object of a local store; what a killed write left behind is none."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.endswith(".partial"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def blocks(folder: Path) -> set[Path]:
    return set(folder.rglob("embedding/c/*/*/0"))


@dataclass
class Run:
    """One `histosge` process, in a process group of its own."""

    process: "subprocess.Popen[str]"

    def wait(self, timeout: float = 600) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def kill_group(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def workers(self) -> list[int]:
        """Process ids of its worker processes."""
        listed = subprocess.run(["ps", "-eww", "-o", "pid,pgid,args"], capture_output=True, text=True).stdout
        rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
        return [
            int(pid) for pid, group, args in rows if int(group) == self.process.pid and "spawn_main" in args
        ]


Start = Callable[..., Run]


def wait_until(condition: Callable[[], object], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def wait_for_blocks(run: Run, store: Path, n: int = 1) -> None:
    """Wait until a run has written some blocks; a run that ends before is a failure at once, with what it printed."""
    wait_until(lambda: len(blocks(store)) >= n or run.process.poll() is not None)
    assert run.process.poll() is None, run.wait()


class Cluster:
    """A dask scheduler and one worker, each a process of its own."""

    def __init__(self, folder: Path, threads: int = 1) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        written = folder / f"scheduler-{uuid.uuid4().hex}.json"
        self._start("scheduler", "--port", 0, "--host", "127.0.0.1", "--scheduler-file", written)
        # Not started at once: a worker gives up after a minute, and a busy machine may take that long to start a scheduler.
        wait_until(lambda: _address(written))
        self.address = _address(written)
        self.start_worker(threads)

    def start_worker(self, threads: int = 1) -> None:
        """Start a worker; do not wait for it."""
        self._start("worker", self.address, "--nthreads", threads, "--no-nanny")

    def _start(self, kind: str, *arguments: object) -> None:
        command = [
            sys.executable,
            "-m",
            f"distributed.cli.dask_{kind}",
            *map(str, arguments),
            "--no-dashboard",
        ]
        quiet = subprocess.DEVNULL
        self.processes.append(subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True))

    def kill(self) -> None:
        """Kill the scheduler first, then the worker."""
        for process in self.processes:
            process.kill()
            process.wait()


def _address(scheduler_file: Path) -> str:
    """Return the address that a scheduler wrote down once it listened; empty until then."""
    try:
        return str(json.loads(scheduler_file.read_text())["address"])
    except (FileNotFoundError, json.JSONDecodeError):
        return ""


@dataclass
class S3:
    """A server that keeps plain files, a proxy in front of it, and how to reach it."""

    server: Server
    proxy: Proxy
    folder: Path

    @property
    def environ(self) -> dict[str, str]:
        return environment(self.proxy.port)

    def store(self) -> Path:
        return self.folder / "test" / "store"
