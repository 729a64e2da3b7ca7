"""A count likelihood that is fitted section by section is the one that is fitted in memory, also on held-out sections."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from _cohorts import MadeCohort, write_cohort
from _dense_oracle import predict_exactly
from distributed import Client

from featurestore.analysis.cluster_stream import connect
from featurestore.events import Progress
from featurestore.storage.block_array import BlockArray
from featurestore.storage.store import Store
from histosge.data.embedded_slide import load_patches, open_embedded
from histosge.training.saved_model import SavedModel, load_model
from histosge.training.train import TrainSettings, train

# Six sections: each fit of the calibration has four, from which on whole sections are left out in memory, too.
MADE = MadeCohort(sections=6, shape=(23, 29), dim=11, spots=97, genes=19, block=(7, 11), frame=3)
SETTINGS = TrainSettings(genes=13, loss="nb")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_cohort(tmp_path_factory.mktemp("cohort"), MADE)


@pytest.fixture(scope="module")
def streamed(cohort: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dense` of negative binomial loss that one process streamed; only for reading."""
    folder = tmp_path_factory.mktemp("streamed") / "model"
    train(*cohort, folder, SETTINGS, stream=True)
    assert not list(folder.parent.glob(".*"))
    return folder


def _log_rates(saved: SavedModel, store: Path) -> np.ndarray:
    """Predict a slide's patches in double precision, as the count likelihood has them."""
    state = saved.model.state()
    head = {
        "targets.axes": state["counts.weight"].T,
        "targets.mean": state["counts.offset"],
        "targets.sd": 1.0,
    }
    patches = load_patches(open_embedded(Store.open(str(store)), "S002", None, None))
    return predict_exactly({**state, **head}, patches)


def _assert_same(found: SavedModel, wanted: SavedModel, store: Path) -> None:
    a, b = _log_rates(found, store), _log_rates(wanted, store)
    assert np.abs(a - b).max() / b.std() < 1e-6


def test_streamed_and_in_memory_are_one_model_with_the_same_intervals(
    cohort: tuple[Path, Path], streamed: Path, tmp_path: Path
) -> None:
    found, whole = load_model(streamed), train(*cohort, tmp_path / "whole", SETTINGS, stream=False)
    assert found.card == whole.card
    _assert_same(found, whole, cohort[1])
    assert whole.intervals is not None
    assert found.intervals is not None
    assert found.intervals.held_out == whole.intervals.held_out
    assert found.intervals.n_spots == whole.intervals.n_spots
    np.testing.assert_allclose(found.intervals.half_width, whole.intervals.half_width, rtol=1e-5)
    np.testing.assert_allclose(found.intervals.trust, whole.intervals.trust, atol=1e-5)
    # They are of the counts' own predictions: squared errors have others.
    by_squares = train(*cohort, tmp_path / "mse", replace(SETTINGS, loss="mse"), stream=True).intervals
    assert by_squares is not None
    assert np.abs(by_squares.half_width / found.intervals.half_width - 1).max() > 1e-3
    # Sections cannot be added to it.
    assert not (streamed / "stats").exists()
    assert "stats" not in json.loads((streamed / "config.json").read_text())


def test_poisson_is_streamed_too_and_reads_no_embedding_for_a_step(
    cohort: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, loss="poisson", intervals=False)
    whole = train(*cohort, tmp_path / "whole", settings, stream=False)
    steps, reads = list[str](), dict[tuple[str, object], int]()
    read_block = BlockArray.read_block

    def count(array: BlockArray, block, *args, **kwargs):  # type: ignore[no-untyped-def]
        key = (array.path, block.index)
        reads[key] = reads.get(key, 0) + 1
        return read_block(array, block, *args, **kwargs)

    monkeypatch.setattr(BlockArray, "read_block", count)
    found = train(
        *cohort, tmp_path / "model", settings, stream=True, on_progress=lambda p: steps.append(p.label)
    )
    assert set(reads.values()) == {3}
    _assert_same(found, whole, cohort[1])
    passes = [label for label in steps if label.endswith("of S005") and "counts" in label]
    assert passes[:2] == [
        "pass 5 of at least 6, counts (1) of S005",
        "pass 6 of at least 7, counts (2) of S005",
    ]
    assert len(passes) > 3


class StoppedError(Exception):
    """As if the process were killed."""


def test_an_interrupted_fit_goes_on_from_the_last_step(
    cohort: tuple[Path, Path], streamed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(progress: Progress) -> None:
        if "counts (4) of S003" in progress.label:
            raise StoppedError

    steps: list[str] = []
    with pytest.raises(StoppedError):
        train(*cohort, tmp_path / "model", SETTINGS, stream=True, on_progress=stop)
    reads: list[str] = []
    read_block = BlockArray.read_block
    monkeypatch.setattr(
        BlockArray,
        "read_block",
        lambda array, *a, **k: reads.append(array.path) or read_block(array, *a, **k),
    )
    again = train(
        *cohort, tmp_path / "model", SETTINGS, stream=True, on_progress=lambda p: steps.append(p.label)
    )
    assert reads == []
    assert again.fingerprint == load_model(streamed).fingerprint
    undisturbed: list[str] = []
    train(
        *cohort, tmp_path / "whole", SETTINGS, stream=True, on_progress=lambda p: undisturbed.append(p.label)
    )
    # The totals and two steps were done.
    assert sum("counts" in label for label in undisturbed) == sum("counts" in label for label in steps) + 18
    assert not list(tmp_path.glob(".*"))


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with connect(2, None) as connected:
        yield connected


def test_workers_fit_the_same_bits(
    client: Client, cohort: tuple[Path, Path], streamed: Path, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, scheduler=client.scheduler.address)
    assert train(*cohort, tmp_path / "model", settings).fingerprint == load_model(streamed).fingerprint
