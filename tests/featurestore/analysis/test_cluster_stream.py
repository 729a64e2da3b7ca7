"""Analyses on a real dask cluster: the result of one process, whatever happens to the workers."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from _s3 import Proxy, environment, free_port, serving
from _stores import SPEC, Made, write_store
from counting_sums import Killing
from distributed import Client
from make_slides import tissue_like, write_pyramid

from featurestore.analysis.cluster_stream import ClusterStream, connect
from featurestore.analysis.kmeans import KMeansSettings, fit_kmeans
from featurestore.analysis.neighbours import patch_at, similar
from featurestore.analysis.patch_stream import PatchStream, open_stream
from featurestore.analysis.pca import fit_pca, write_scores
from featurestore.analysis.slide_source import EmbeddingSource
from featurestore.analysis.summary import summarise
from featurestore.embedding.dask_clients import remote_client
from featurestore.embedding.embed import embed
from featurestore.errors import ClusterError, ClusterWarning, StoreError
from featurestore.events import OnProgress, ignore_progress
from featurestore.storage.store import Store

MADE = Made((23, 29), 13, (4, 4), frame=2)
SLIDES = 5


def _write(url: str) -> Store:
    """Slides of three pieces each; one patch of the first is unreadable."""
    store = write_store(url, SLIDES, MADE)  # type: ignore[arg-type]
    array = store.embedding("S00", SPEC.key, "random", read_only=False)
    block = store.grid("S00", SPEC.key).planned(MADE.block)[11]
    values = array.read_block(block).copy()
    assert np.isfinite(values[1, 2]).all()
    values[1, 2] = np.nan
    array.write(block, values)
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _write(str(tmp_path_factory.mktemp("store") / "store")).location.url


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with connect(2, None) as connected:
        yield connected


def _on(client: Client, url: str, on_progress: OnProgress = ignore_progress) -> ClusterStream:
    return ClusterStream(client, EmbeddingSource(url), on_progress)


def _summary(stream: PatchStream) -> list[np.ndarray]:
    frame = summarise(stream)
    assert frame["absent"][0] == 1
    vectors = [frame[name].to_numpy() for name in ("mean", "sd")]
    return [*vectors, frame.select("patches", "absent", "shift").to_numpy()]


def _pca(stream: PatchStream) -> list[np.ndarray]:
    fitted = fit_pca(stream, 5)
    assert fitted.n_patches == stream.counts.patches > 1000
    scores = [values.to_numpy() for _, values in fitted.transform(stream)]
    return [fitted.mean, fitted.components, fitted.explained_variance, np.concatenate(scores)]


def _clusters(stream: PatchStream) -> list[np.ndarray]:
    fitted = fit_kmeans(stream, KMeansSettings(3, passes=4, tolerance=0, sample=211))
    return [fitted.centres, np.array(fitted.inertia), fitted.counts.drop("slide").to_numpy()]


def _similar(stream: PatchStream) -> list[np.ndarray]:
    frame = similar(stream, patch_at(stream, "S01", 5, 7), 97, "euclidean")
    return [frame.drop("slide").to_numpy(), frame["slide"].to_numpy().astype(str)]


ANALYSES = [_summary, _pca, _clusters, _similar]


def _close(found: np.ndarray, expected: np.ndarray) -> None:
    if expected.dtype.kind == "U":
        assert np.array_equal(found, expected)
    else:
        np.testing.assert_allclose(found.astype(float), expected.astype(float), rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("analysis", ANALYSES)
def test_workers_give_the_result_of_one_process(
    client: Client, store: str, analysis: Callable[[PatchStream], list[np.ndarray]]
) -> None:
    stream, alone = _on(client, store), open_stream(store)
    for found, expected in zip(analysis(stream), analysis(alone), strict=True):
        _close(found, expected)
    assert stream.passes == alone.passes
    assert stream.counts == alone.counts


def test_labels_and_scores_of_workers_are_written_here(client: Client, store: str, tmp_path: Path) -> None:
    for name, stream in (("one", open_stream(store)), ("two", _on(client, store))):
        fit_kmeans(stream, KMeansSettings(3), tmp_path / name)
        write_scores(fit_pca(stream, 2), stream, tmp_path / f"{name}-scores")
    labels = [pl.read_parquet(tmp_path / name / "*.parquet") for name in ("one", "two")]
    assert labels[0].equals(labels[1])
    scores = [pl.read_parquet(tmp_path / f"{name}-scores" / "*.parquet") for name in ("one", "two")]
    np.testing.assert_allclose(scores[0]["pc2"], scores[1]["pc2"], atol=1e-5)


def test_the_bits_do_not_depend_on_the_workers_nor_on_their_deaths(client: Client, store: str) -> None:
    expected = _pca(_on(client, store))
    with connect(1, None) as one:
        assert _same(_pca(_on(one, store)), expected)
        killed: list[int] = []

        def kill(progress: object) -> None:
            if stream.counts.blocks == 0 and stream.passes == 1 and not killed:
                killed.extend(one.run(os.getpid).values())
                os.kill(killed[0], signal.SIGKILL)

        stream = _on(one, store, kill)
        found = _pca(stream)
    assert killed
    assert _same(found, expected)


def _same(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(np.array_equal(one, other, equal_nan=True) for one, other in pairs)


@pytest.mark.e2e
def test_a_slide_that_kills_workers_is_named(store: str) -> None:
    with connect(1, None) as client, pytest.raises(ClusterError, match="slide 'S03' kills the processes"):
        _on(client, store).fold(Killing)


def test_a_damaged_block_is_refused_with_its_name(client: Client, tmp_path: Path) -> None:
    damaged = _write(str(tmp_path / "store"))
    block = sorted((tmp_path / "store").rglob("S02/**/embedding/c/*/*/0"))[3]
    data = bytearray(block.read_bytes())
    data[3] ^= 1
    block.write_bytes(data)
    with pytest.raises(StoreError, match=r"S02/.* is damaged: its checksum"):
        summarise(_on(client, damaged.location.url))


@contextmanager
def _worker_elsewhere(scheduler: str, **environ: str) -> Iterator["subprocess.Popen[bytes]"]:
    command = [
        sys.executable,
        "-m",
        "distributed.cli.dask_worker",
        scheduler,
        "--no-nanny",
        "--nthreads",
        "1",
    ]
    quiet = subprocess.DEVNULL
    # Without the current folder on the path: a checkout that was installed for editing holds metadata of its own there.
    environment = {**os.environ, "PYTHONSAFEPATH": "1", **environ}
    process = subprocess.Popen([*command, "--no-dashboard"], env=environment, stdout=quiet, stderr=quiet)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_worker_of_another_version_is_refused_in_one_line(store: str, tmp_path: Path) -> None:
    installed = tmp_path / "histosge-9.9.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: histosge\nVersion: 9.9\n")
    write_pyramid(tmp_path / "S.tif", tissue_like(300, 300, 2.0), 2.0)
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    with connect(1, None) as client, _worker_elsewhere(client.scheduler.address, PYTHONPATH=path):
        client.wait_for_workers(2)
        with pytest.raises(ClusterError, match=r"runs histosge 9\.9 and this process \S+; install") as caught:
            _on(client, store)
        with pytest.raises(ClusterError, match=r"runs histosge 9\.9"):
            embed(tmp_path / "S.tif", tmp_path / "new", scheduler=client.scheduler.address)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.e2e
def test_a_worker_of_another_version_that_joins_late_computes_nothing(store: str, tmp_path: Path) -> None:
    installed = tmp_path / "histosge-9.9.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: histosge\nVersion: 9.9\n")
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    with connect(1, None) as client:
        stream = _on(client, store)
        with _worker_elsewhere(client.scheduler.address, PYTHONPATH=path):
            client.wait_for_workers(2)
            client.retire_workers([w for w, n in client.run(version, "histosge").items() if n != "9.9"])
            with pytest.raises(ClusterError, match=r"runs histosge 9\.9"):
                summarise(stream)


@pytest.mark.e2e
def test_a_scheduler_that_dies_is_one_line(store: str) -> None:
    port = free_port()
    place = ["--host", "127.0.0.1", "--port", str(port), "--no-dashboard"]
    quiet = subprocess.DEVNULL
    scheduler = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_scheduler", *place], stdout=quiet, stderr=quiet
    )
    address = f"tcp://127.0.0.1:{port}"
    try:
        _wait_for(port)
        with ExitStack() as stack:
            with pytest.warns(ClusterWarning, match="has no workers yet"):
                client = stack.enter_context(remote_client(address))
            stack.enter_context(_worker_elsewhere(address))
            client.wait_for_workers(1)
            stream = _on(client, store, lambda progress: scheduler.kill())
            with pytest.raises(ClusterError, match="the scheduler went away; start it again"):
                summarise(stream)
    finally:
        scheduler.kill()
        scheduler.wait()


def _wait_for(port: int, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        else:
            return


@pytest.mark.s3
@pytest.mark.e2e
def test_on_s3_workers_read_each_block_once_a_pass_through_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    def busy(number: int, method: str, path: str) -> str | None:
        return "503" if refuse and method == "GET" and number % 23 == 3 else None

    refuse = False
    with serving(tmp_path / "objects") as server:
        proxy = Proxy(server.port, busy)
        for name, value in environment(proxy.port).items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        _write(str(tmp_path / "objects" / "test" / "store"))
        expected = fit_pca(open_stream(str(tmp_path / "objects" / "test" / "store")), 3)
        with connect(2, None) as client:
            stream = _on(client, "s3://test/store")
            proxy.reset()
            fitted = fit_pca(stream, 3)
            blocks = Counter(
                path for method, path in proxy.log if method == "GET" and "/embedding/c/" in path
            )
            assert set(blocks.values()) == {1}
            assert blocks.total() == stream.counts.blocks
            refuse = True
            again = fit_pca(_on(client, "s3://test/store"), 3)
            assert proxy.faults > 2
        proxy.close()
        s3fs.S3FileSystem.clear_instance_cache()
    for found in (fitted, again):
        np.testing.assert_allclose(found.components, expected.components, atol=1e-9)
