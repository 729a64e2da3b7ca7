"""What training and encoding lose beside other work, and in a container with fewer cores than it sees.

    python benchmarks/contention.py [--quick] [--json FILE]

Two commands run as a user types them, with the libraries' own number of threads: `embed` of a slide with ViT-S/16 (random
weights), and `train --preset dense` on three sections whose embeddings have 1,024 dimensions. Each runs alone, beside one
process a core that is never idle, and, where control groups can be made, with a quota of one CPU. The shorter of two runs
counts, start-up included; --quick runs each once.

- slowdown_busy, slowdown_quota: time beside other work, and with the quota, over that alone; the larger of the two commands
- of a machine that lets nobody make a control group only the reading of a quota is checked, on a made-up folder
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from _common import Result, options, report

from featurestore.blocks import plan_blocks
from featurestore.cores import THREAD_SETTINGS, count_cores
from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.encoders.protocol import EncoderIdentity
from featurestore.grid import GridSpec
from featurestore.storage.store import Store
from histosge.synthetic import SyntheticSpec, make_cohort

VIT = "timm:vit_small_patch16_224"
SECTIONS, DIM = 3, 1024
SPEC = GridSpec(mpp=0.5, patch_px=224, stride_px=112)
BUSY = "while True: pass"
CPU_US = 100_000
"""One CPU: so many microseconds of each period, which is as long."""
PLACES = ("/sys/fs/cgroup/cpu", "/sys/fs/cgroup")
"""Where control groups are made: version 1, then version 2."""

Command = Sequence[str]


def main() -> None:
    """Measure."""
    asked = options(__doc__)
    repeats, cores = 1 if asked.quick else 2, count_cores().cores
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        commands = prepare(folder)
        alone = {work: _best(command, folder, repeats) for work, command in commands.items()}
        with busy_processes(cores):
            busy = {work: _best(command, folder, repeats) for work, command in commands.items()}
        with one_cpu() as group:
            quota = {
                work: _best(command, folder, repeats, group)
                for work, command in (commands.items() if group else ())
            }
    results = [Result(f"{work}: alone", seconds, "s") for work, seconds in alone.items()]
    results += [Result(f"{work}: beside {cores} busy processes", busy[work], "s") for work in busy]
    results += [Result(f"{work}: with one CPU of {cores}", quota[work], "s") for work in quota]
    results.append(Result("slowdown_busy", max(busy[work] / alone[work] for work in busy), "x", "<= 3"))
    if quota:
        slowdown = max(quota[work] / alone[work] for work in quota)
        results.append(Result("slowdown_quota", slowdown, "x", "<= 3"))
    else:
        results.append(Result("slowdown_quota", None, "not measured", "<= 3"))
        results.append(Result("cores_of_made_up_quota", read_made_up_quota(), "of 1 CPU", "= 1"))
    report("contention", results, asked)


# ---------------------------------------------------------------- the work


def prepare(folder: Path) -> dict[str, Command]:
    """Make slides, spots and a store to train on; return the commands, whose last argument is a new place to write."""
    cohort = make_cohort(folder / "cohort", SyntheticSpec(size_px=(4000, 4000)), SECTIONS)
    store = str(folder / "store")
    embed(str(cohort.sheet), store, EmbedSettings(("colour",), SPEC))
    for section in cohort.sections:
        _widen(Store.open(store), section.slide.stem)
    grid = ["--mpp", "0.5", "--patch", "224", "--stride", "224"]
    histosge = [sys.executable, "-m", "histosge_cli"]
    slide = str(cohort.sections[0].slide)
    return {
        "encode": [*histosge, "embed", "--encoder", VIT, "--random-weights", *grid, slide],
        "train": [*histosge, "train", "--encoder", "random", str(cohort.sheet), store],
    }


def _widen(store: Store, slide_id: str) -> None:
    """Add an embedding as wide as a ViT-L's: the colours of the slide, mixed at random, and noise."""
    grid = store.grid(slide_id, SPEC.key)
    colour = store.embedding(slide_id, SPEC.key, "colour")
    wide = store.add_embedding(slide_id, grid.grid, EncoderIdentity("random", DIM), colour.block_shape)
    mixing = np.random.default_rng(0).standard_normal((colour.shape[2], DIM))
    rng = np.random.default_rng(1)
    for block in plan_blocks(grid.is_tissue.shape, colour.block_shape):
        if grid.is_tissue[block.slices].any():
            values = colour.read_block(block).astype(np.float32)
            mixed = (values / 255) @ mixing + 0.3 * rng.standard_normal((*block.shape, DIM))
            wide.write(block, mixed.astype(np.float16))
    store.consolidate(slide_id)


def _best(command: Command, folder: Path, repeats: int, group: Path | None = None) -> float:
    """Return the shortest time of a command, in seconds."""
    # As a user's: settings of whoever runs the benchmark would hide what the libraries do by themselves.
    environ = {name: value for name, value in os.environ.items() if name not in THREAD_SETTINGS}
    # A process enters the group before it becomes the command, so that all of it, start-up too, is limited.
    enter = ["bash", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "bash"] if group else []
    seconds = []
    for _ in range(repeats):
        out = folder / "out"
        begun = time.perf_counter()
        subprocess.run([*enter, *command, str(out)], env=environ, check=True, capture_output=True)
        seconds.append(time.perf_counter() - begun)
        shutil.rmtree(out)
    return min(seconds)


# ---------------------------------------------------------------- what it shares the machine with


@contextmanager
def busy_processes(n: int) -> Iterator[None]:
    """Run processes that compute without a pause."""
    running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(n)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


@contextmanager
def one_cpu() -> Iterator[Path | None]:
    """Make a control group with a quota of one CPU; None where that is not possible."""
    group = next(filter(None, map(_make_group, PLACES)), None)
    try:
        yield group
    finally:
        if group is not None:
            group.rmdir()


def _make_group(place: str) -> Path | None:
    group = Path(place) / f"histosge-contention-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        return None
    v1, v2 = group / "cpu.cfs_quota_us", group / "cpu.max"
    try:
        if v1.exists():
            v1.write_text(str(CPU_US))
            (group / "cpu.cfs_period_us").write_text(str(CPU_US))
            return group
        if v2.exists():
            v2.write_text(f"{CPU_US} {CPU_US}")
            return group
    except OSError:
        pass
    group.rmdir()  # its place hands the CPU controller to no group
    return None


def read_made_up_quota() -> int:
    """Return the cores that are counted in a made-up folder of the kernel's with a quota of one CPU."""
    with tempfile.TemporaryDirectory() as name:
        files = {
            "proc/self/cgroup": "0::/",
            "proc/self/mountinfo": "1 1 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw",
            "sys/fs/cgroup/cpu.max": f"{CPU_US} {CPU_US}",
        }
        for path, text in files.items():
            (Path(name) / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(name) / path).write_text(text)
        return count_cores(Path(name), {}).cores


if __name__ == "__main__":
    main()
