"""A training that was interrupted goes on from its last written epoch, to the same bits."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from histosge.models.checkpoint import Checkpoint
from histosge.models.protocol import is_resumable
from histosge.models.registry import load_preset
from histosge.synthetic import GeneCounts, SyntheticSpec, make_cohort
from histosge.training.in_memory import checkpoint_path
from histosge.training.train import TrainSettings, train

EPOCHS = 7
STOP_AFTER = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("data")
    spec = SyntheticSpec(
        size_px=(1208, 1128), mpp=0.5, genes=GeneCounts(6, 5, 3, 3), spot_diameter_um=41.0, spot_pitch_um=59.0
    )
    sheet = str(make_cohort(folder, spec, 1).sheet)
    grid = GridSpec(mpp=1.0, patch_px=48, stride_px=24)
    embed(sheet, str(folder / "store"), EmbedSettings(encoders=("colour",), spec=grid))
    return sheet, str(folder / "store")


def _settings(seed: int = 0) -> TrainSettings:
    return TrainSettings(preset="paper", genes=5, epochs=EPOCHS, seed=seed)


def _interrupt(data: tuple[str, str], model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until the middle of the epoch after `STOP_AFTER` complete ones."""
    write = Checkpoint.save

    def save(self: Checkpoint, epochs: int, *state: object) -> None:
        self._cost_s = 0.0
        write(self, epochs, *state)  # type: ignore[arg-type]
        if epochs == STOP_AFTER:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "save", save)
        with pytest.raises(KeyboardInterrupt):
            train(*data, model, _settings())


def _epochs_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note every epoch that ends from here on."""
    run: list[int] = []
    monkeypatch.setattr(Checkpoint, "save", lambda self, epochs, *state: run.append(epochs))
    return run


def test_a_repeat_goes_on_from_the_last_complete_epoch_to_the_same_bits(
    data: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(*data, tmp_path / "whole", _settings())
    model = tmp_path / "model"
    _interrupt(data, model, monkeypatch)
    assert checkpoint_path(model).is_file()
    assert not model.exists()
    run = _epochs_run(monkeypatch)
    assert train(*data, model, _settings()).fingerprint == whole.fingerprint
    assert run == [4, 5, 6, 7]
    assert not checkpoint_path(model).exists()


def test_a_training_of_another_kind_starts_over(
    data: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(*data, tmp_path / "whole", _settings(seed=5))
    model = tmp_path / "model"
    _interrupt(data, model, monkeypatch)
    run = _epochs_run(monkeypatch)
    assert train(*data, model, _settings(seed=5)).fingerprint == whole.fingerprint
    assert run == list(range(1, EPOCHS + 1))


def _tear(kept: Path) -> None:
    kept.write_bytes(kept.read_bytes()[:997])


def _begun_elsewhere(kept: Path) -> None:
    saved = torch.load(kept, weights_only=True)
    assert saved["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    torch.save({**saved, "device": "another kind of processor"}, kept)


@pytest.mark.parametrize("spoil", [_tear, _begun_elsewhere])
def test_what_cannot_be_gone_on_from_is_no_obstacle(
    data: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None]
) -> None:
    model = tmp_path / "model"
    _interrupt(data, model, monkeypatch)
    spoil(checkpoint_path(model))
    run = _epochs_run(monkeypatch)
    train(*data, model, _settings())
    assert run == list(range(1, EPOCHS + 1))


def test_writing_takes_no_more_than_its_share(tmp_path: Path) -> None:
    network, rng = torch.nn.Linear(3, 5), np.random.default_rng(0)
    optimiser = torch.optim.Adam(network.parameters())
    checkpoint = Checkpoint(tmp_path / "file", "key")
    checkpoint.save(1, network, optimiser, rng)
    checkpoint._cost_s = 1000.0
    checkpoint.save(2, network, optimiser, rng)
    assert Checkpoint(tmp_path / "file", "key").restore(network, optimiser, rng) == 1


def test_a_model_whose_fit_takes_no_checkpoint_is_trained_without_one(
    data: tuple[str, str], tmp_path: Path
) -> None:
    assert not is_resumable(load_preset("mean"))
    train(*data, tmp_path / "model", TrainSettings(preset="mean", genes=5))
    assert not checkpoint_path(tmp_path / "model").exists()
