"""A model that is adapted section by section is the one that is adapted in memory."""

from pathlib import Path

import numpy as np
import pytest
from _cohorts import MadeCohort, write_cohort, write_sheet
from _dense_oracle import predict_exactly

from featurestore.events import Progress
from featurestore.storage.block_array import BlockArray
from featurestore.storage.store import Store
from histosge.data.embedded_slide import load_patches, open_embedded
from histosge.errors import ModelError
from histosge.training.saved_model import SavedModel, load_model
from histosge.training.train import TrainSettings, train

# The first three are the earlier model's; five new ones are held out in four folds.
MADE = MadeCohort(sections=8, shape=(23, 29), dim=13, spots=97, genes=23, block=(7, 11), frame=3)
NEW = range(3, 8)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    _, store = write_cohort(folder, MADE)
    write_sheet(folder, folder / "old.csv", MADE, range(3))
    write_sheet(folder, folder / "new.csv", MADE, NEW)
    for preset in ("dense", "ridge"):
        settings = TrainSettings(preset=preset, genes=19, intervals=False)
        train(folder / "old.csv", store, folder / preset, settings, keep_sums=False)
    return folder


def _adapt(world: Path, folder: Path, preset: str, **options: object) -> SavedModel:
    return train(world / "new.csv", world / "store", folder, start_from=world / preset, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def streamed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dense` that one process adapted section by section; only for reading."""
    folder = tmp_path_factory.mktemp("streamed") / "model"
    _adapt(world, folder, "dense", stream=True)
    return folder


@pytest.mark.parametrize("preset", ["dense", "ridge"])
def test_streamed_and_in_memory_are_one_adapted_model(
    preset: str, world: Path, streamed: Path, tmp_path: Path
) -> None:
    said = dict[bool, list[str]]()
    found = dict[bool, SavedModel]()
    for stream in (True, False):
        said[stream] = []
        found[stream] = _adapt(
            world, tmp_path / str(stream), preset, stream=stream, on_message=said[stream].append
        )
    one, other = found[True], found[False]
    assert one.card == other.card
    assert one.card.origin is not None
    patches = load_patches(open_embedded(Store.open(str(world / "store")), "S005", None, None))
    if preset == "dense":
        a, b = (predict_exactly(saved.model.state(), patches) for saved in (one, other))
        config = one.model.config(), other.model.config()
        np.testing.assert_allclose(config[0]["penalties"], config[1]["penalties"])
        np.testing.assert_allclose(config[0]["weights"], config[1]["weights"], atol=1e-6)
        state, wanted = one.model.state(), other.model.state()
        np.testing.assert_allclose(state["targets.highest"], wanted["targets.highest"])
        # Depth is the last output of each scale.
        np.testing.assert_allclose(state["scales.offset"][-1], wanted["scales.offset"][-1], rtol=1e-6)
    else:
        a, b = (
            patches.embedding.astype(np.float64) @ saved.model.state()["weight"]
            + saved.model.state()["offset"]
            for saved in (one, other)
        )
    assert np.abs(a - b).max() / b.std() < 1e-6
    assert one.intervals is not None
    assert other.intervals is not None
    assert one.intervals.n_spots == other.intervals.n_spots
    np.testing.assert_allclose(one.intervals.half_width, other.intervals.half_width, rtol=1e-5)
    np.testing.assert_allclose(one.intervals.trust, other.intervals.trust, atol=1e-5)
    # The same lines, but for that on streaming.
    own = [line for line in said[True] if "sections are streamed" not in line]
    assert len(own) == len(said[True]) - 1
    assert own == said[False]
    assert not list(tmp_path.glob(".*"))


class StoppedError(Exception):
    """As if the process were killed."""


def test_an_interrupted_adaptation_goes_on_where_it_was(
    world: Path, streamed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("histosge.training.streaming.gather.SECONDS_BETWEEN_SAVES", 0.0)

    def stop_at(label: str):  # type: ignore[no-untyped-def]
        def stop(progress: Progress) -> None:
            if label in progress.label:
                raise StoppedError

        return stop

    for label in ("earlier model on S005", "reading S006", "holding out S004", "intervals on S007"):
        with pytest.raises(StoppedError):
            _adapt(world, tmp_path / "model", "dense", stream=True, on_progress=stop_at(label))
    reads: list[str] = []
    read_block = BlockArray.read_block
    monkeypatch.setattr(
        BlockArray,
        "read_block",
        lambda array, *a, **k: reads.append(array.path) or read_block(array, *a, **k),
    )
    again = _adapt(world, tmp_path / "model", "dense", stream=True)
    assert reads == []
    assert again.fingerprint == load_model(streamed).fingerprint
    assert not list(tmp_path.glob(".*"))


def test_patterns_come_from_the_most_variable_genes_and_the_others_follow(
    world: Path, streamed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("histosge.models.target_sums.MAX_BASIS", 15)
    found = _adapt(world, tmp_path / "model", "dense", stream=True, keep_sums=False)
    patches = load_patches(open_embedded(Store.open(str(world / "store")), "S005", None, None))
    a, b = (predict_exactly(saved.model.state(), patches) for saved in (found, load_model(streamed)))
    # Of fewer genes it is another model, but nearly the same, for the genes outside of the basis, too.
    assert np.abs(a - b).max() / b.std() > 1e-6
    # By how much all of them vary: a gene that is mostly noise has another map.
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.95


def test_new_sections_are_streamed_by_the_rule_of_a_training(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("histosge.training.streamed.STREAM_FROM_BYTES", 1000)
    few = write_sheet(world, world / "few.csv", MADE, range(4, 7))
    train(few, world / "store", tmp_path / "few", start_from=world / "ridge", on_message=said.append)
    assert any("held in memory" in line and "3 new sections are fewer than 4" in line for line in said)
    _adapt(world, tmp_path / "ridge", "ridge", on_message=said.append)
    assert any("sections are streamed" in line for line in said)
    with pytest.raises(ModelError, match="3 new sections are fewer than 4") as refused:
        train(few, world / "store", tmp_path / "no", TrainSettings(workers=2), start_from=world / "ridge")
    assert "\n" not in str(refused.value)
    with pytest.raises(ModelError, match="new sections cannot be streamed"):
        train(few, world / "store", tmp_path / "no", start_from=world / "ridge", stream=True)
    assert not (tmp_path / "no").exists()
