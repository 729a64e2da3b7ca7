"""`attention` on a cohort that is streamed: `dense` is that of a training in memory, and blocks come from the store."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from _cohorts import MadeCohort, write_cohort

from featurestore.storage.store import Store
from histosge.data.embedded_slide import load_patches, open_embedded
from histosge.errors import ModelError
from histosge.models.checkpoint import Checkpoint
from histosge.training.train import TrainSettings, train

MADE = MadeCohort(sections=7, shape=(23, 31), dim=5, spots=97, genes=11, block=(7, 11), frame=5)
SETTINGS = TrainSettings(preset="attention", genes=7, epochs=2)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_cohort(tmp_path_factory.mktemp("cohort"), MADE)


def test_streamed_attention_is_trained_on_what_streamed_dense_lacks(
    cohort: tuple[Path, Path], tmp_path: Path
) -> None:
    messages: list[str] = []
    streamed = train(*cohort, tmp_path / "streamed", SETTINGS, stream=True, on_message=messages.append)
    assert sum(message.startswith("attention: ") for message in messages) == 1
    whole = train(*cohort, tmp_path / "whole", SETTINGS, stream=False)
    facts, others = streamed.model.config()["training"], whole.model.config()["training"]
    assert len(facts["loss"]) == 2
    assert facts["sections"] == others["sections"] == [3, 1, 3, 0]
    # The same stopping sections by folds of `dense` that differ, so not the same digits.
    assert facts["stopping_error"][0] == pytest.approx(others["stopping_error"][0], rel=0.05)
    patches = load_patches(open_embedded(Store.open(str(cohort[1])), "S002", None, None))
    ours, theirs = (replace(m.model, network=None).predict(patches) for m in (streamed, whole))
    assert np.abs(ours - theirs).max() / ours.std() < 1e-5
    assert not list(tmp_path.glob(".*"))


@pytest.mark.e2e
def test_an_interrupted_streamed_training_goes_on_to_the_same_bits(
    cohort: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = train(*cohort, tmp_path / "undisturbed", SETTINGS, stream=True)

    class StoppedError(Exception):
        pass

    save = Checkpoint.save

    def save_and_stop(self: Checkpoint, epochs: int, *args) -> None:  # type: ignore[no-untyped-def]
        save(self, epochs, *args)
        raise StoppedError

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "save", save_and_stop)
        with pytest.raises(StoppedError):
            train(*cohort, tmp_path / "model", SETTINGS, stream=True)
    assert (tmp_path / ".model.streamed" / "network").exists()
    again = train(*cohort, tmp_path / "model", SETTINGS, stream=True)
    assert again.fingerprint == undisturbed.fingerprint
    assert not list(tmp_path.glob(".*"))


def test_intervals_of_a_streamed_attention_are_refused(cohort: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="further fits"):
        train(*cohort, tmp_path / "model", replace(SETTINGS, intervals=True), stream=True)
