"""Ways to run the command line in processes of its own, and to look at what it leaves."""

import os
import signal
import subprocess
import time
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
