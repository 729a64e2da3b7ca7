"""Interpolation of spots against scipy's own functions, and the networks `mlp`, `bleep` and `triplex`."""

import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from scipy.interpolate import griddata

from histosge.data.sections import Patches, TrainingSection
from histosge.data.spot_overlap import disc_overlap, spots_from_patches
from histosge.errors import ModelError
from histosge.heldout.metrics import correlate
from histosge.models import bleep, network_fitting
from histosge.models.linear_algebra import Standardiser
from histosge.models.network_fitting import FitSettings, fit_network, predict_in_parts
from histosge.models.protocol import Model
from histosge.models.registry import load_preset
from histosge.models.triplex import cut_windows

INTERPOLATIONS = ("nearest", "linear", "cubic")
GENES, DIM = 5, 7


@cache
def _section(seed: int = 1, window: int = 0, side: int = 30) -> TrainingSection:
    """Genes follow the embedding of a patch squared, or its sum over ``2 * window + 1`` patches a side."""
    rng = np.random.default_rng(seed)
    rows, cols = (axis.ravel() for axis in np.indices((side, side)))
    grid = rng.standard_normal((side, side, DIM)).astype(np.float32)
    total = sum(
        np.roll(grid, (i, j), (0, 1)) for i in range(-window, window + 1) for j in range(-window, window + 1)
    )
    loading = np.random.default_rng(7).standard_normal((DIM, GENES))
    signal = (total / (2 * window + 1)).reshape(-1, DIM) @ loading
    patches = Patches(f"S{seed}", rows, cols, grid.reshape(-1, DIM), 100.0, 100.0)
    # Off the lattice, so that no two spots are at the same distance from a patch.
    xy_um = patches.xy_um[:: 2 if window == 0 else 1] + rng.uniform(
        -9, 9, patches.xy_um[:: 2 if window == 0 else 1].shape
    )
    overlap = disc_overlap(xy_um, 60.0, patches)
    target = spots_from_patches(
        overlap, np.maximum(3 + 0.3 * (np.abs(signal) if window == 0 else signal), 0.1)
    )
    return TrainingSection(patches, overlap, xy_um, target)


def _score(model: Model, section: TrainingSection) -> float:
    guess = spots_from_patches(section.overlap, model.predict(section.patches))
    return float(correlate(section.target, guess, np.zeros(len(guess)))[0].mean())


@pytest.mark.parametrize("preset", INTERPOLATIONS)
def test_interpolation_is_scipys_between_spots_and_the_nearest_spot_beyond(preset: str) -> None:
    section = _section()
    inner = section.subset(np.all(abs(section.spot_xy_um - 1500) < 900, axis=1))
    expected = griddata(inner.spot_xy_um, inner.target.astype(float), section.patches.xy_um, method=preset)
    beyond = griddata(inner.spot_xy_um, inner.target.astype(float), section.patches.xy_um, method="nearest")
    outside = np.isnan(expected)
    assert preset == "nearest" or 300 < outside[:, 0].sum() < 700
    expected = np.clip(np.where(outside, beyond, expected), 0, None)
    predicted = load_preset(preset).fit([inner]).predict(section.patches)
    np.testing.assert_allclose(predicted, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", INTERPOLATIONS)
def test_a_slide_without_spots_is_refused_in_one_line_with_those_that_have_some(preset: str) -> None:
    model = load_preset(preset).fit([_section(1), _section(2)])
    message = (
        f"{preset} interpolates between measured spots and has none of slide 'S3': .*\\(S1, S2\\).*ridge"
    )
    with pytest.raises(ModelError, match=f"^{message}$"):
        model.predict(_section(3).patches)


@pytest.mark.parametrize("preset", ["linear", "cubic"])
@pytest.mark.parametrize("keep", [[3, 17], [1, 2, 3, 4]])
def test_spots_without_a_triangle_are_refused_in_one_line(preset: str, keep: list[int]) -> None:
    section = _section()
    on_a_line = replace(
        section, spot_xy_um=np.repeat(np.arange(len(section.target))[:, None] * 100.0, 2, axis=1)
    )
    with pytest.raises(
        ModelError, match=re.escape("slide 'S1' has ") + r"\d spots without such a triangle"
    ) as caught:
        load_preset(preset).fit([on_a_line.subset(np.array(keep))])
    assert "\n" not in str(caught.value)


def test_mlp_finds_a_curve_that_ridge_does_not() -> None:
    sections, other = [_section(1), _section(2)], _section(3)
    curve, line = (_score(load_preset(name).fit(sections), other) for name in ("mlp", "ridge"))
    assert curve > 0.5
    assert curve > line + 0.3


def test_triplex_finds_what_lies_around_a_patch_and_mlp_does_not() -> None:
    sections, other = [_section(1, 2), _section(2, 2)], _section(3, 2)
    around, alone = (_score(load_preset(name).fit(sections, epochs=8), other) for name in ("triplex", "mlp"))
    assert around > 0.7
    assert around > alone + 0.3


def test_triplex_sees_5_by_5_positions_at_both_resolutions_and_none_that_is_missing() -> None:
    section = _section()
    patches = section.patches
    keep = patches.rows > 0
    patches = replace(
        patches, rows=patches.rows[keep], cols=patches.cols[keep], embedding=patches.embedding[keep]
    )
    standardiser = load_preset("triplex").fit([section], epochs=1).standardiser  # type: ignore[attr-defined]
    middle = int(np.flatnonzero((patches.rows == 2) & (patches.cols == 11))[0])
    windows = cut_windows(patches, standardiser, np.array([middle]))
    place = np.stack([patches.cols, patches.rows], axis=1)
    # 224 um reaches two patches of 100 um, in steps of one; 640 um reaches six, in steps of three.
    for name, step in (("near", 1), ("far", 3)):
        index = getattr(windows, name)[0].numpy()
        offsets = np.round(getattr(windows, f"{name}_um").numpy() * {"near": 2.24, "far": 6.4}[name]).astype(
            int
        )
        np.testing.assert_array_equal(np.unique(offsets), step * np.arange(-2, 3))
        exists = place[middle, 1] + offsets[:, 1] >= 1
        np.testing.assert_array_equal(index >= 0, exists)


def test_bleep_predicts_the_mean_of_the_fifty_spots_nearest_by_cosine() -> None:
    section = _section()
    model = load_preset("bleep").fit([section], epochs=2)
    assert isinstance(model, bleep.BleepModel)
    with torch.inference_mode():
        inputs = torch.from_numpy(model.standardiser.apply(section.patches.embedding).astype(np.float32))
        points = model.network(inputs).numpy().astype(float)
    reference = model.reference.numpy().astype(float)
    cosine = (
        points @ reference.T / np.linalg.norm(points, axis=1)[:, None] / np.linalg.norm(reference, axis=1)
    )
    nearest = np.argsort(-cosine, axis=1)[:, :50]
    np.testing.assert_allclose(
        model.predict(section.patches), section.target[nearest].mean(axis=1), rtol=1e-4
    )


def test_the_contrastive_loss_is_that_of_the_paper_s_equations() -> None:
    rng = np.random.default_rng(5)
    image, expression = rng.standard_normal((2, 11, bleep.WIDTH)) / 8

    def log_softmax(values: np.ndarray) -> np.ndarray:
        return values - np.log(np.exp(values).sum(axis=1, keepdims=True))

    soft = np.exp(log_softmax((image @ image.T + expression @ expression.T) / 2))
    logits = expression @ image.T
    expected = -(soft * log_softmax(logits)).sum(axis=1).mean() / 2
    expected -= (soft.T * log_softmax(logits.T)).sum(axis=1).mean() / 2
    found = bleep.contrastive_loss(torch.from_numpy(image), torch.from_numpy(expression))
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_bleep_keeps_no_more_spots_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bleep, "MAX_REFERENCES", 300)
    model = load_preset("bleep").fit([_section(1), _section(2)], epochs=1)
    assert isinstance(model, bleep.BleepModel)
    assert 200 < len(model.reference) <= 300


class _Straight:
    """One weight that is pulled to 1 for half an epoch each time; held-out error is least after three epochs."""

    def __init__(self) -> None:
        self.trained: list[int] = []

    def __len__(self) -> int:
        return 12

    def make(self) -> torch.nn.Linear:
        self.trained.append(0)
        return torch.nn.Linear(1, 1)

    def loss(self, network: torch.nn.Linear, spots: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        self.trained[-1] += 1
        return network.weight.sum()

    def error(self, network: torch.nn.Linear, spots: np.ndarray) -> float:
        return abs(self.trained[-1] - 3)


def test_the_number_of_epochs_is_that_of_the_least_error_on_sections_left_out() -> None:
    sections = [_section(seed).subset(np.arange(4)) for seed in (1, 2, 3)]
    objective = _Straight()
    fitted = fit_network(objective, sections, FitSettings(max_epochs=9, batch=100), seed=0)
    assert fitted.epochs == 3
    assert objective.trained == [9, 9, 9, 3]
    assert not fitted.network.training


@pytest.mark.parametrize("preset", ["mlp", "bleep", "triplex"])
def test_a_network_s_tensor_of_another_shape_is_refused(preset: str) -> None:
    model = load_preset(preset).fit([_section()], epochs=1)
    prefix = "image" if preset == "bleep" else "network"
    for name in [name for name in model.state() if name.startswith(prefix)]:
        state = {key: np.array(value) for key, value in model.state().items()}
        state[name] = state[name][..., :-1]
        with pytest.raises(ModelError, match="has shape"):
            load_preset(preset).from_state(model.config(), state)
        del state[name]
        with pytest.raises(ModelError, match=r"missing|tensors are not those"):
            load_preset(preset).from_state(model.config(), state)


def test_parts_of_any_size_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).standard_normal((23, DIM))
    standardiser = Standardiser.fit(values)
    monkeypatch.setattr(network_fitting, "PATCHES_AT_ONCE", 5)
    found = predict_in_parts(values, standardiser, 2, lambda inputs: inputs[:, :2].numpy() * 2)
    np.testing.assert_allclose(found, 2 * standardiser.apply(values)[:, :2], rtol=1e-6)
