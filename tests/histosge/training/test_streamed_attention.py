"""`attention` on a cohort that is streamed: `dense` is that of a training in memory, and blocks come from the store."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _cohorts import MadeCohort, write_cohort

from featurestore.blocks import Block, plan_blocks
from featurestore.storage.store import Store
from histosge.data.embedded_slide import load_patches, open_embedded, stream_windows
from histosge.errors import ModelError
from histosge.models.block_attention import AttentionModel
from histosge.models.block_network import BlockNetwork, NetworkShape
from histosge.models.checkpoint import Checkpoint
from histosge.models.linear_algebra import Standardiser
from histosge.prediction.expression_store import ExpressionStore
from histosge.prediction.predict import PredictSettings, predict
from histosge.training.model_card import ModelCard
from histosge.training.saved_model import save_model
from histosge.training.train import TrainSettings, train

MADE = MadeCohort(sections=7, shape=(23, 31), dim=5, spots=97, genes=11, block=(7, 11), frame=5)
N_GENES = 7
SETTINGS = TrainSettings(preset="attention", genes=N_GENES, epochs=2)


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


def _with_network(cohort: tuple[Path, Path], folder: Path) -> tuple[AttentionModel, ModelCard]:
    """A model whose network is not trained, and not at its start: it adds something everywhere."""
    trained = train(*cohort, folder / "dense", replace(SETTINGS, preset="dense", intervals=False))
    dense, dim = trained.model, MADE.dim
    torch.manual_seed(1)
    shape = NetworkShape(dim, *dense.targets.axes.shape, 16, 2, (120.0, 120.0))
    network = BlockNetwork(shape, dense.targets.axes, dense.targets.sd).eval()
    torch.nn.init.normal_(network.residual.weight, std=0.3)
    ones = np.ones(dim)
    return AttentionModel(dense, Standardiser(0 * ones, ones), network), trained.card


def test_maps_are_those_of_the_whole_slide_wherever_blocks_end(
    cohort: tuple[Path, Path], tmp_path: Path
) -> None:
    model, card = _with_network(cohort, tmp_path)
    dense = model.dense
    slide = open_embedded(Store.open(str(cohort[1])), "S002", None, None)
    patches = load_patches(slide)
    whole = model.predict(patches)
    assert np.abs(whole - dense.predict(patches)).max() > 0.1
    reduce, reduced = model.split()
    n_rows, n_cols = slide.stored.grid.shape
    # As stored, and shifted by half a block.
    for shift in (0, 3):
        blocks = [
            Block(
                b.index,
                (max(0, b.rows[0] - shift), b.rows[1] - shift),
                (max(0, b.cols[0] - shift), b.cols[1] - shift),
            )
            for b in plan_blocks((n_rows + shift, n_cols + shift), MADE.block)
        ]
        found = np.full((n_rows, n_cols, N_GENES), np.nan)
        for window in stream_windows(slide, blocks, reduced.halo_um, reduce):
            own = np.flatnonzero(window.own)
            at = window.patches.rows[own], window.patches.cols[own]
            found[at] = reduced.predict_some(window.patches, own)
        np.testing.assert_allclose(found[patches.rows, patches.cols], whole, atol=1e-5, rtol=0)
    save_model(tmp_path / "model", model, replace(card, preset="attention"))
    predict(cohort[1], tmp_path / "model", tmp_path / "maps", slide_ids=["S002"])
    stored = ExpressionStore.open(str(tmp_path / "maps")).map("S002", slide.stored.grid.spec.key)
    values = stored.array.read((0, n_rows), (0, n_cols))[patches.rows, patches.cols]
    np.testing.assert_allclose(values, whole, rtol=2e-3, atol=2e-3)


@pytest.mark.gpu
def test_maps_that_are_predicted_on_a_gpu_are_those_of_the_cpu(
    cohort: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored as float16: within 2e-3, as maps of the same values are."""
    model, card = _with_network(cohort, tmp_path)
    save_model(tmp_path / "model", model, replace(card, preset="attention"))
    seen, from_tokens = set[str](), BlockNetwork.from_tokens

    def watched(self: BlockNetwork, tokens: torch.Tensor, *args: Any, **settings: Any) -> torch.Tensor:
        seen.add(tokens.device.type)
        return from_tokens(self, tokens, *args, **settings)

    monkeypatch.setattr(BlockNetwork, "from_tokens", watched)
    values = []
    for device in ("cpu", "cuda"):
        predict(cohort[1], tmp_path / "model", tmp_path / device, PredictSettings(device=device))
        stored = ExpressionStore.open(str(tmp_path / device))
        slide = open_embedded(Store.open(str(cohort[1])), "S002", None, None)
        found = stored.map("S002", slide.stored.grid.spec.key).array
        values.append(found.read(*((0, n) for n in slide.stored.grid.shape)))
    assert seen == {"cpu", "cuda"}
    np.testing.assert_allclose(values[1], values[0], rtol=2e-3, atol=2e-3)


@pytest.mark.gpu
def test_a_streamed_training_on_a_gpu_follows_that_on_the_cpu(
    cohort: tuple[Path, Path], tmp_path: Path
) -> None:
    """The command's own path, width as on a GPU and dropout on: only the loss is compared, and only roughly."""
    losses = []
    for device in ("cpu", "cuda"):
        trained = train(*cohort, tmp_path / device, SETTINGS, stream=True, device=device)
        losses.append(trained.model.config()["training"]["loss"])
    assert np.isfinite(losses).all()
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.2)


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
