"""Training on dask workers gives the bits of one process, whatever happens to the workers."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from _cohorts import MadeCohort, write_cohort, write_section, write_sheet
from deadly_sections import DeadlySection
from distributed import Client
from typer.testing import CliRunner

from featurestore.analysis.cluster_stream import connect
from featurestore.errors import ClusterError
from featurestore.events import Progress
from featurestore.storage.block_array import BlockArray
from featurestore.storage.store import Store
from histosge.errors import ModelError
from histosge.training.train import TrainSettings, train
from histosge_cli.main import app

MADE = MadeCohort(sections=10, shape=(23, 29), dim=11, spots=97, genes=19, block=(7, 11), frame=3)
SETTINGS = TrainSettings(genes=13)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Ten sections: of the eight groups that are left out, two have two sections each."""
    return write_cohort(tmp_path_factory.mktemp("cohort"), MADE)


@pytest.fixture(scope="module")
def alone(cohort: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dense` that one process trained."""
    folder = tmp_path_factory.mktemp("alone") / "model"
    train(*cohort, folder, SETTINGS, stream=True)
    return folder


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with connect(2, None) as connected:
        yield connected


def _on(client: Client, settings: TrainSettings = SETTINGS) -> TrainSettings:
    return replace(settings, scheduler=client.scheduler.address)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_workers_train_the_model_of_one_process_bit_by_bit(
    client: Client, cohort: tuple[Path, Path], alone: Path, tmp_path: Path
) -> None:
    said, steps = list[str](), list[str]()
    saved = train(
        *cohort,
        tmp_path / "model",
        _on(client),
        on_message=said.append,
        on_progress=lambda p: steps.append(p.label),
    )
    # Weights, intervals, trust, kept sums and the record: nothing tells who worked on it.
    assert _contents(tmp_path / "model") == _contents(alone)
    assert (tmp_path / "model" / "stats" / "group-7.safetensors").exists()
    assert saved.intervals is not None
    assert any("sections are streamed" in line for line in said)
    for what in ("survey of", "genes of", "reading", "holding out", "intervals on"):
        assert [label for label in steps if f"{what} S009" in label]
    assert not list(tmp_path.glob(".*"))
    # Who works on it is no part of what a model is made with.
    assert train(*cohort, alone, replace(SETTINGS, workers=2)).was_there


def test_the_command_starts_workers_and_they_add_sections_to_sums(
    cohort: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, settings = cohort[0].parent, replace(SETTINGS, preset="ridge")
    train(*cohort, tmp_path / "alone", settings, stream=True)
    command = ["train", *map(str, cohort), str(tmp_path / "model"), "--preset", "ridge", "--genes", "13"]
    done = CliRunner().invoke(app, [*command, "--workers", "2", "--quiet"])
    assert done.exit_code == 0, done.output
    assert _contents(tmp_path / "model") == _contents(tmp_path / "alone")
    write_section(folder, Store.open_or_create(str(cohort[1])), MADE, 10)
    more = write_sheet(folder, folder / "more.csv", MADE, range(11))
    further = train(more, cohort[1], tmp_path / "further", start_from=tmp_path / "alone")
    shared = TrainSettings(workers=1)
    same = train(more, cohort[1], tmp_path / "shared", shared, start_from=tmp_path / "alone")
    assert same.fingerprint == further.fingerprint


@pytest.mark.e2e
def test_workers_fit_counts_and_adapt_with_the_same_bits(
    client: Client, cohort: tuple[Path, Path], tmp_path: Path
) -> None:
    counts = replace(SETTINGS, loss="poisson", intervals=False)
    few = write_sheet(cohort[0].parent, tmp_path / "few.csv", MADE, range(4))
    found, wanted = (
        train(few, cohort[1], tmp_path / name, where, stream=True)
        for name, where in (("on workers", _on(client, counts)), ("counts", counts))
    )
    assert found.fingerprint == wanted.fingerprint
    alone, shared = TrainSettings(intervals=False), _on(client, TrainSettings(intervals=False))
    new = write_sheet(cohort[0].parent, tmp_path / "new.csv", MADE, range(6, 10))
    squares = train(few, cohort[1], tmp_path / "old", replace(SETTINGS, intervals=False), keep_sums=False)
    assert not (tmp_path / "old" / "stats").exists()
    found, wanted = (
        train(new, cohort[1], tmp_path / name, where, stream=True, start_from=tmp_path / "old")
        for name, where in (("shared", shared), ("own", alone))
    )
    assert found.fingerprint == wanted.fingerprint != squares.fingerprint


class StoppedError(Exception):
    """As if the process were killed."""


def test_an_interrupted_training_goes_on_without_what_workers_gave(
    client: Client,
    cohort: tuple[Path, Path],
    alone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("histosge.training.streaming.gather.SECONDS_BETWEEN_SAVES", 0.0)

    def stop(progress: Progress) -> None:
        if "holding out S004" in progress.label:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(*cohort, tmp_path / "model", _on(client), on_progress=stop)
    read, read_block = set[str](), BlockArray.read_block
    monkeypatch.setattr(
        BlockArray, "read_block", lambda array, *a, **k: read.add(array.path) or read_block(array, *a, **k)
    )
    train(*cohort, tmp_path / "model", SETTINGS, stream=True)
    assert {path.split("/")[0] for path in read} == {f"S{number:03}" for number in range(4, 10)}
    assert _contents(tmp_path / "model") == _contents(alone)


@contextmanager
def _workers_that_die(plugin: DeadlySection) -> Iterator[Client]:
    # A nanny gives its process five seconds to end, and one that was just started anew may take longer on a busy machine.
    with suppress(TimeoutError), connect(2, None) as client:
        client.register_plugin(plugin)
        yield client
        client.wait_for_workers(2)


@pytest.mark.e2e
@pytest.mark.parametrize("deaths", [1, 2])
def test_a_worker_that_dies_changes_no_bit(
    deaths: int, cohort: tuple[Path, Path], alone: Path, tmp_path: Path
) -> None:
    (tmp_path / "deaths").mkdir()
    with _workers_that_die(DeadlySection("S003", tmp_path / "deaths", deaths)) as client:
        # After two deaths dask gives the section up, and it is tried alone.
        train(*cohort, tmp_path / "model", _on(client))
    assert len(list((tmp_path / "deaths").iterdir())) == deaths
    assert _contents(tmp_path / "model") == _contents(alone)


@pytest.mark.e2e
def test_a_section_that_kills_workers_ends_the_training_with_its_name(
    cohort: tuple[Path, Path], alone: Path, tmp_path: Path
) -> None:
    (tmp_path / "deaths").mkdir()
    with (
        _workers_that_die(DeadlySection("S003", tmp_path / "deaths", 1000)) as client,
        pytest.raises(ModelError, match="section 'S003' kills the process that reads it") as refused,
    ):
        train(*cohort, tmp_path / "model", _on(client))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "model").exists()
    # What the others gave stays.
    train(*cohort, tmp_path / "model", SETTINGS, stream=True)
    assert _contents(tmp_path / "model") == _contents(alone)


@contextmanager
def _worker_elsewhere(scheduler: str, **environ: str) -> Iterator[None]:
    command = [
        sys.executable,
        "-m",
        "distributed.cli.dask_worker",
        scheduler,
        "--no-nanny",
        "--nthreads",
        "1",
    ]
    # Without the current folder on the path: a checkout that was installed for editing holds metadata of its own there.
    environment, quiet = {**os.environ, "PYTHONSAFEPATH": "1", **environ}, subprocess.DEVNULL
    process = subprocess.Popen([*command, "--no-dashboard"], env=environment, stdout=quiet, stderr=quiet)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@pytest.mark.e2e
def test_a_worker_of_another_version_is_refused_in_one_line(
    cohort: tuple[Path, Path], tmp_path: Path
) -> None:
    installed = tmp_path / "histosge-9.9.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: histosge\nVersion: 9.9\n")
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    with connect(1, None) as client, _worker_elsewhere(client.scheduler.address, PYTHONPATH=path):
        client.wait_for_workers(2)
        with pytest.raises(
            ClusterError, match=r"runs histosge 9\.9 and this process \S+; install"
        ) as refused:
            train(*cohort, tmp_path / "model", _on(client))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"preset": "attention"}, "torchrun --nproc-per-node N -m histosge_cli train"),
        ({"preset": "paper"}, "this preset is not fitted from sums, as dense and ridge are; leave them out"),
        ({"stains": True}, "--stains needs the patches' embeddings; leave them out"),
    ],
)
def test_what_workers_cannot_share_is_refused_before_any_starts(
    changes: dict[str, object], said: str, cohort: tuple[Path, Path], tmp_path: Path
) -> None:
    for shared in ({"workers": 2}, {"scheduler": "tcp://127.0.0.1:1"}):
        with pytest.raises(ModelError, match=r"^--workers and --scheduler share out sections") as refused:
            train(*cohort, tmp_path / "model", replace(SETTINGS, **changes, **shared))  # type: ignore[arg-type]
        assert said in str(refused.value)
        assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_few_sections_and_both_options_are_refused(cohort: tuple[Path, Path], tmp_path: Path) -> None:
    few = write_sheet(cohort[0].parent, tmp_path / "few.csv", MADE, range(3))
    command = ["train", str(few), str(cohort[1]), str(tmp_path / "model"), "--workers", "2"]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, ModelError)
    assert "3 sections are fewer than 4; leave them out" in str(refused.exception)
    refused = CliRunner().invoke(app, [*command, "--scheduler", "tcp://127.0.0.1:1"])
    assert isinstance(refused.exception, ClusterError)
    assert "give one of them" in str(refused.exception)


def test_an_error_of_a_section_comes_from_the_worker_as_it_is(
    client: Client, cohort: tuple[Path, Path], tmp_path: Path
) -> None:
    sheet = tmp_path / "sheet.csv"
    broken = tmp_path / "broken.h5ad"
    broken.write_bytes(b"no expression")
    sheet.write_text(cohort[0].read_text().replace(str(cohort[0].parent / "S004.h5ad"), str(broken)))
    with pytest.raises(Exception, match=r"broken\.h5ad") as here:
        train(sheet, cohort[1], tmp_path / "model", SETTINGS, stream=True)
    with pytest.raises(type(here.value)) as there:
        train(sheet, cohort[1], tmp_path / "model", _on(client))
    assert str(there.value) == str(here.value)
