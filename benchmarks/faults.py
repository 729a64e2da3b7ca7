"""What a pulled plug costs: a run is killed again and again, then finished, and compared with one that was left alone.

python benchmarks/faults.py [--quick] [--json FILE]
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import Result, options, report, section, timed


def main() -> None:
    """Kill and measure."""
    asked = options(__doc__)
    kills = 2 if asked.quick else 8
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        slide = section(folder, quick=asked.quick).slide
        alone, _ = timed(_start(slide, folder / "alone").communicate)
        blocks = len(_blocks(folder / "alone"))
        before, lost, spent = set(), 0, 0.0
        for i in range(kills):
            target = blocks * (i + 1) // (kills + 1)
            run, begun = _start(slide, folder / "killed"), time.perf_counter()
            while len(_blocks(folder / "killed")) < max(target, 1) and run.poll() is None:
                time.sleep(0.01)
            os.killpg(run.pid, signal.SIGKILL)
            run.communicate()
            spent += time.perf_counter() - begun
            done = _blocks(folder / "killed")
            lost += len(before - done)
            before = done
        last, (out, _) = timed(_start(slide, folder / "killed").communicate)
        computed = int(out.split(b": ")[1].split()[0]) if b"blocks computed" in out else 0
        equal = _contents(folder / "killed") == _contents(folder / "alone")
    report(
        "faults",
        [
            Result("blocks in the store", blocks),
            Result("kills", kills),
            Result("blocks lost that were written", lost, "", "= 0"),
            Result("blocks computed by the last run", computed, f"of {blocks - len(before)} missing"),
            Result("store equal to the undisturbed one", float(equal), "", "= 1"),
            Result("undisturbed run", alone, "s"),
            Result("all runs with kills", spent + last, "s"),
        ],
        asked,
    )


def _start(slide: Path, store: Path) -> "subprocess.Popen[bytes]":
    grid = ["--mpp", "0.5", "--patch", "112", "--stride", "56"]
    command = [sys.executable, "-m", "histosge_cli", "embed", str(slide), str(store), *grid]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, start_new_session=True)


def _blocks(store: Path) -> set[Path]:
    return {path.relative_to(store) for path in store.rglob("embedding/c/*/*/0")}


def _contents(store: Path) -> dict[str, bytes]:
    files = (p for p in store.rglob("*") if p.is_file() and not p.name.endswith(".partial"))
    return {str(p.relative_to(store)): p.read_bytes() for p in files}


if __name__ == "__main__":
    main()
