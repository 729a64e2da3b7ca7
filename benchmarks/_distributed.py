"""What a second dask worker gives an analysis and a prediction, beside what a second plain process gives the same work.

    python benchmarks/distributed.py [--quick] [--json FILE]

`fit_pca` of a store of random embeddings (1,536 numbers), and `predict` of 1,000 genes, on one and on two worker processes,
started and warm, one BLAS thread each. The plain processes do half of the slides each, by the same code without dask.
`predict` also of one slide as large as all of them, beside the same plain processes. Median of three runs of at least 30 s
on one worker. The machine must be idle. The stores are kept under ``HISTOSGE_BENCH_CACHE``, where that is set.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from _common import Result, options, report
from _models import invent_model
from _stores import Made, write_store
from distributed import Client

from featurestore.analysis.cluster_stream import ClusterStream, connect
from featurestore.analysis.patch_stream import PatchStream
from featurestore.analysis.pca import Scatter
from featurestore.analysis.slide_source import EmbeddingSource
from featurestore.storage.store import Store
from histosge.prediction.predict import PredictSettings, predict

SLIDE = Made((96, 96), 1536)
GENES = 1000
LEAST_SECONDS = 30.0
REPEATS = 3

Work = Callable[[int], None]
"""Does the whole store once, in so many processes."""


def main() -> None:
    """Measure."""
    asked = options(__doc__)
    # Before the workers start, which take over the environment; BLAS reads it when it is loaded.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    slides = 6 if asked.quick else 16
    with tempfile.TemporaryDirectory() as name:
        cache = Path(os.environ.get("HISTOSGE_BENCH_CACHE", name))
        kept, one_slide = cache / f"distributed-{slides}", cache / f"distributed-one-{slides}"
        if not kept.exists():
            write_store(kept, slides, SLIDE)
        if not one_slide.exists():
            # As many patches in all, in a slide as wide as four of the others.
            rows, cols = SLIDE.shape
            write_store(one_slide, 1, Made((rows * slides // 4, cols * 4), SLIDE.dim))
        results = measure(str(kept), str(one_slide), Path(name), quick=asked.quick)
    report("distributed", results, asked)


def measure(url: str, one_slide: str, folder: Path, *, quick: bool) -> list[Result]:
    """Compare analysis and prediction of a store, and prediction of one large slide, on one and on two processes."""
    names = PatchStream(EmbeddingSource(url)).names
    model = folder / "model"
    invent_model(Store.open(url), names[0], model, GENES)
    with (
        connect(1, None) as one,
        connect(2, None) as two,
        ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool,
    ):
        clients = {1: one, 2: two}
        streams = {n: ClusterStream(client, EmbeddingSource(url)) for n, client in clients.items()}
        return [
            *_compared(
                "analyse",
                lambda n: streams[n].fold(partial(Scatter, streams[n].dim)),
                lambda n: _shared(pool, n, names, partial(_add_up, url)),
                quick=quick,
            ),
            *_compared(
                "predict",
                lambda n: _predict_on(clients[n], url, model, folder),
                lambda n: _predict_apart(pool, n, names, url, model, folder),
                quick=quick,
            ),
            *_compared(
                "predict_one_slide",
                lambda n: _predict_on(clients[n], one_slide, model, folder),
                lambda n: _predict_apart(pool, n, names, url, model, folder),
                quick=quick,
            ),
        ]


def _compared(what: str, on_dask: Work, plain: Work, *, quick: bool) -> Iterator[Result]:
    """Time both, turn by turn in one run, and yield the speedups by a second process."""
    ways = {("dask", n): partial(on_dask, n) for n in (1, 2)} | {
        ("plain", n): partial(plain, n) for n in (1, 2)
    }
    # Warm: libraries are loaded, and the store is in the page cache.
    for way in ways.values():
        _seconds(way, 1)
    times = 1 if quick else max(1, round(LEAST_SECONDS / _seconds(ways["dask", 1], 1) + 0.5))
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in ways}
    for _ in range(1 if quick else REPEATS):
        for key, way in ways.items():
            seconds[key].append(_seconds(way, times))
    median = {key: statistics.median(found) for key, found in seconds.items()}
    for (kind, n), value in median.items():
        yield Result(f"{what}, {n} {'dask workers' if kind == 'dask' else 'plain processes'}", value, "s")
    speedup, raw = (median[kind, 1] / median[kind, 2] for kind in ("dask", "plain"))
    yield Result(f"{what}, plain processes, speedup", raw, "x")
    yield Result(f"{what}_speedup", speedup, "x", ">= 1.6")
    # Either target is enough: two cores of one machine may not give twice the speed of one.
    yield Result(f"{what}_share_of_raw", speedup / raw, "", ">= 0.9")


def _seconds(way: Callable[[], object], times: int) -> float:
    begun = time.perf_counter()
    for _ in range(times):
        way()
    return time.perf_counter() - begun


def _shared(
    pool: ProcessPoolExecutor, processes: int, names: Sequence[str], work: Callable[[Sequence[str]], object]
) -> None:
    list(pool.map(work, [names[number::processes] for number in range(processes)]))


def _add_up(url: str, names: Sequence[str]) -> int:
    stream = PatchStream(EmbeddingSource(url, names))
    return stream.fold(partial(Scatter, stream.dim)).n


def _predict_on(client: Client, url: str, model: Path, folder: Path) -> None:
    with _new_maps(folder) as maps:
        predict(url, model, maps, PredictSettings(scheduler=client.scheduler.address))


def _predict_apart(
    pool: ProcessPoolExecutor, processes: int, names: Sequence[str], url: str, model: Path, folder: Path
) -> None:
    with _new_maps(folder) as maps:
        _shared(pool, processes, names, partial(_predict_some, url, model, maps))


def _predict_some(url: str, model: Path, maps: str, names: Sequence[str]) -> int:
    return len(predict(url, model, maps, slide_ids=names))


@contextmanager
def _new_maps(folder: Path) -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        yield f"{name}/maps"


if __name__ == "__main__":
    main()
