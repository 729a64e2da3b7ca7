"""Training `dense` on a cohort that does not fit into memory: memory, time, reads, and whether the model is the right one.

    python benchmarks/cohort.py [--quick] [--json FILE]

The store has 100 sections of 10,000 patches x 1,536 numbers, each with 3,000 spots x 1,000 genes, written as the embedding
writes them (3.8 GB with the expression; kept under ``HISTOSGE_BENCH_CACHE`` where that is set). `histosge train` runs on the
first 25 and on all 100 sections, each in a process of its own, with one BLAS thread; with --quick on 20 and 80 of 80.
While it runs, the work folder takes about 4 GB.

    gets_per_block_and_pass   reads of stored objects, by planned blocks and the passes that read embeddings
    peak_gb                   resident memory at its highest, of the larger training
    peak_ratio_4x_sections    of both trainings
    time_ratio_4x_sections    CPU-seconds a section, of both: it hardly depends on other work on the machine
    max_difference            largest difference between predictions of a streamed training and an oracle in plain float64
                              (`_dense_oracle.py`: scipy and scikit-learn, in memory), over their standard deviation, on six
                              small sections
    workers_speedup           `train --scheduler` with one worker over two, started and warm, one BLAS thread each, beside
                              two plain trainings at once over one after the other (workers_share_of_raw); the models are the
                              same to the bit (workers_difference)
    1,000 sections: ...       what the larger training comes to at 1,000 sections: nothing was run at that size
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
from _cohorts import MadeCohort, write_cohort, write_sheet
from _common import Result, options, report
from _dense_oracle import DenseOracle, predict_exactly
from safetensors.numpy import load_file

from featurestore.analysis.cluster_stream import connect
from histosge.data.section_loading import Selection, load_sections, training_section
from histosge.training.train import TrainSettings, train

SMALL = MadeCohort(sections=6, shape=(48, 52), dim=192, spots=500, genes=200, block=(16, 16), frame=4)
# Blocks of 25 x 25 fill a slide of 100 x 100 patches: with 32 x 32, those at its edges would take 60 % more.
LARGE = MadeCohort(sections=100, block=(25, 25))
PASSES = 3
"""Passes that read embeddings: the survey, the sums, and the predictions of held-out sections."""


def main() -> None:
    """Measure."""
    asked = options(__doc__)
    counts = (20, 80) if asked.quick else (25, 100)
    with tempfile.TemporaryDirectory() as name:
        kept = Path(os.environ.get("HISTOSGE_BENCH_CACHE", name)) / f"cohort-{LARGE.sections}"
        made = MadeCohort(sections=counts[1], block=LARGE.block)
        write_cohort(kept, made)
        scratch = Path(name)
        few, many = (run(kept, made, n, scratch) for n in counts)
        difference = difference_from_oracle(scratch / "small")
        shared_out = on_workers(kept, made, scratch, repeats=1 if asked.quick else 3)
    results = [
        *(
            Result(f"{r.sections} sections: CPU-seconds a section", r.cpu_s / r.sections, "s")
            for r in (few, many)
        ),
        *(Result(f"{r.sections} sections: seconds", r.seconds, "s") for r in (few, many)),
        *(Result(f"{r.sections} sections: peak", r.peak_gb, "GB") for r in (few, many)),
        Result("embeddings in memory would take", many.embedding_gb, "GB"),
        Result("gets_per_block_and_pass", many.gets / many.blocks / PASSES, "", "= 1"),
        Result("peak_gb", many.peak_gb, "GB", "<= 3"),
        Result("peak_ratio_4x_sections", many.peak_gb / few.peak_gb, "x", "<= 1.15"),
        Result(
            "time_ratio_4x_sections",
            (many.cpu_s / many.sections) / (few.cpu_s / few.sections),
            "x",
            "<= 1.15",
        ),
        Result("max_difference", difference, "sd", "<= 1e-6"),
        *shared_out,
        *on_paper(many),
    ]
    report("cohort", results, asked)


SCRIPT = """
    import json, sys, time
    from pathlib import Path

    from featurestore.storage.block_array import BlockArray
    from histosge.training.train import TrainSettings, train

    reads, read_block = 0, BlockArray.read_block
    def count(*args, **kwargs):
        global reads
        reads += 1
        return read_block(*args, **kwargs)
    BlockArray.read_block = count
    begun = time.perf_counter(), time.process_time()
    sheet, store, model, scheduler = sys.argv[1:]
    train(sheet, store, model, TrainSettings(genes=1000, scheduler=scheduler or None), stream=True)
    seconds, cpu_s = time.perf_counter() - begun[0], time.process_time() - begun[1]
    (peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(json.dumps([seconds, cpu_s, int(peak) / 2**20, reads]))
"""


@dataclass(frozen=True)
class Run:
    """One training in a process of its own."""

    sections: int
    seconds: float
    cpu_s: float
    peak_gb: float
    gets: int
    blocks: int
    embedding_gb: float


def run(kept: Path, made: MadeCohort, sections: int, scratch: Path) -> Run:
    """Train on the first sections of a store."""
    sheet = write_sheet(kept, scratch / f"first-{sections}.csv", made, range(sections))
    seconds, cpu_s, peak_gb, gets = finish(start(sheet, kept / "store", scratch / f"model-{sections}"))
    rows, cols = (-(-n // b) for n, b in zip(made.shape, made.block, strict=True))
    n_patches = sections * made.shape[0] * made.shape[1]
    return Run(
        sections, seconds, cpu_s, peak_gb, gets, sections * rows * cols, n_patches * made.dim * 4 / 2**30
    )


def start(
    sheet: Path, store: Path, model: Path, scheduler: str = "", threads: int = 1
) -> "subprocess.Popen[str]":
    """Start a training in a process of its own, which has so many threads, or on the workers of a scheduler."""
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(sheet), str(store), str(model), scheduler]
    # Threads of BLAS that wait for each other would count as work.
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def finish(process: "subprocess.Popen[str]") -> list[float]:
    """Return what a training prints: seconds, CPU-seconds, peak in GB, reads."""
    out, err = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the training failed: {err}")
    found: list[float] = json.loads(out)
    return found


WORKER_SECTIONS = 10
"""More than a minute on one worker."""


@contextmanager
def warm_cluster(workers: int) -> Iterator[str]:
    """Start worker processes that have loaded what a training needs, and return the scheduler's address."""
    with connect(workers, None) as client:
        client.run(import_module, "histosge.training.train")
        yield client.scheduler.address


def on_workers(kept: Path, made: MadeCohort, scratch: Path, repeats: int) -> list[Result]:
    """Compare trainings on one and on two workers, and one plain training with two at once. The machine must be idle."""
    sheet = write_sheet(kept, scratch / "workers.csv", made, range(WORKER_SECTIONS))
    store, found = kept / "store", dict[str, list[float]]()
    for number in range(repeats):
        for workers in (1, 2):
            model = scratch / f"workers-{workers}-{number}"
            with warm_cluster(workers) as scheduler:
                # Between the passes its process computes, and the workers wait: as many threads as with `--workers`.
                seconds, *_ = finish(start(sheet, store, model, scheduler, threads=workers))
            found.setdefault(f"{workers} workers", []).append(seconds)
        for processes in (1, 2):
            models = [scratch / f"plain-{processes}-{number}-{i}" for i in range(processes)]
            started = [start(sheet, store, model) for model in models]
            longest = max(finish(process)[0] for process in started)
            # Each does the whole work: two at once would do it in half of that.
            found.setdefault(f"{processes} plain", []).append(longest / processes)
    median = {name: statistics.median(seconds) for name, seconds in found.items()}
    speedup, raw = median["1 workers"] / median["2 workers"], median["1 plain"] / median["2 plain"]
    states = [load_file(scratch / f"workers-{n}-0" / "model.safetensors") for n in (1, 2)]
    difference = max(float(np.abs(states[0][name] - states[1][name]).max()) for name in states[0])
    return [
        *(
            Result(f"{WORKER_SECTIONS} sections on {name}: seconds", value, "s")
            for name, value in median.items()
        ),
        Result("workers_difference", difference, "", "= 0"),
        Result("workers_speedup", speedup, "x"),
        # Two cores of one machine may not give twice the speed of one.
        Result("workers_share_of_raw", speedup / raw, "", ">= 0.9"),
    ]


PAPER_SECTIONS = 1000


def on_paper(many: Run) -> list[Result]:
    """Return what a training comes to at a thousand sections like those that were measured."""
    times = PAPER_SECTIONS / many.sections
    name = f"{PAPER_SECTIONS:,} sections"
    return [
        Result(f"{name}: passes over embeddings", PASSES),
        Result(f"{name}: requests for blocks", many.gets * times),
        # Stored in half precision.
        Result(f"{name}: read", PASSES * many.embedding_gb / 2 * times, "GB"),
        Result(f"{name}: hours on one core", many.cpu_s * times / 3600, "h"),
    ]


def difference_from_oracle(folder: Path) -> float:
    """Return how far predictions of a streamed training lie from the oracle's, over their standard deviation."""
    sheet, store = write_cohort(folder, SMALL)
    saved = train(sheet, store, folder / "model", TrainSettings(genes=150, intervals=False), stream=True)
    loaded = load_sections(str(sheet), str(store), Selection())
    sections = [training_section(item.section, saved.card.genes) for item in loaded]
    patches, oracle = sections[0].patches, DenseOracle.fit(sections)
    wanted, found = oracle.predict(patches), predict_exactly(saved.model.state(), patches)
    return float(np.abs(found - wanted).max() / wanted.std())


if __name__ == "__main__":
    main()
