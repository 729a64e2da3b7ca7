"""Attention on top of `dense`: used where it helps on held-out folds, and nowhere else."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from histosge.data.sections import Patches, TrainingSection
from histosge.data.spot_overlap import disc_overlap, spots_from_patches
from histosge.heldout.metrics import correlate
from histosge.models.attention import AttentionNetwork, TrainingWindows, Windows
from histosge.models.dense_attention import AttentionEnsemble, DenseAttentionModel, lower_limit
from histosge.models.linear_algebra import Standardiser
from histosge.prediction.predict import predict
from histosge.synthetic import GeneCounts, SyntheticSpec, make_cohort
from histosge.training.saved_model import load_model
from histosge.training.train import TrainSettings, train

GENES, DIM, SIDE, STRIDE = 7, 3, 15, 60.0


def _section(seed: int, *, curved: float) -> TrainingSection:
    """Genes follow the first number of the embedding, in a line and, so much, in a curve."""
    rng = np.random.default_rng(seed)
    rows, cols = (a.ravel() for a in np.mgrid[:SIDE, :SIDE])
    embedding = rng.standard_normal((SIDE * SIDE, DIM)).astype(np.float32)
    first = embedding[:, :1].astype(float)
    bump = (np.abs(first) < 0.7) - 0.5
    target = 5 + (0.5 * first + curved * bump) * np.linspace(0.5, 1.5, GENES)
    target += 0.3 * rng.standard_normal(target.shape)
    patches = Patches(f"S{seed}", rows, cols, embedding, STRIDE, STRIDE)
    overlap = disc_overlap(patches.xy_um, 40.0, patches)
    library = np.exp(8 + 0.2 * first[:, 0])
    return TrainingSection(patches, overlap, patches.xy_um, target.astype(np.float32), library)


def _pearson(model: DenseAttentionModel, section: TrainingSection) -> float:
    guess = spots_from_patches(section.overlap, model.predict(section.patches))
    return float(correlate(section.target, guess, np.zeros(len(guess)))[0].mean())


def _straight(seed: int) -> TrainingSection:
    """Genes are a linear map of the whole embedding, and noise."""
    section = _section(seed, curved=0.0)
    loading = np.random.default_rng(99).standard_normal((DIM, GENES)) / 2
    noise = 0.5 * np.random.default_rng(seed).standard_normal(section.target.shape)
    # A quarter: within what log1p(CP10k) can be, where predictions are not bounded.
    target = 5 + (section.patches.embedding @ loading + noise) / 4
    return replace(section, target=target.astype(np.float32))


def test_two_sections_that_a_line_explains_are_not_explained_twice() -> None:
    model, unseen = DenseAttentionModel.fit([_straight(11), _straight(12)], epochs=12), _straight(13)

    def error(one: DenseAttentionModel) -> float:
        guess = spots_from_patches(unseen.overlap, one.predict(unseen.patches))
        return float(((guess - unseen.target) ** 2).mean())

    assert error(model) <= 1.05 * error(replace(model, attention=None))


@pytest.fixture(scope="module")
def curved() -> DenseAttentionModel:
    return DenseAttentionModel.fit([_section(seed, curved=2.0) for seed in range(3)], epochs=15)


def test_what_no_line_can_follow_is_learned_and_carries_over(curved: DenseAttentionModel) -> None:
    assert curved.attention is not None
    assert max(curved.facts["error_change"]) < -0.2
    unseen = _section(7, curved=2.0)
    assert _pearson(curved, unseen) > _pearson(replace(curved, attention=None), unseen) + 0.15
    assert curved.remark.startswith("attention: kept")


def test_without_structure_in_the_residuals_the_map_is_that_of_dense_to_the_bit() -> None:
    sections = [_section(seed, curved=0.0) for seed in range(3)]
    model = DenseAttentionModel.fit(sections, epochs=4)
    assert model.attention is None
    assert "left out" in model.remark
    patches = _section(7, curved=0.0).patches
    np.testing.assert_array_equal(model.predict(patches), model.dense.predict(patches))
    few = [s.subset(np.arange(len(s.target)) < 30) for s in sections]
    assert "not tried" in DenseAttentionModel.fit(few).remark
    flat = [replace(s, target=np.full_like(s.target, 3)) for s in sections]
    none = DenseAttentionModel.fit(flat, epochs=1)
    assert none.attention is None
    np.testing.assert_allclose(none.predict(patches), 3, rtol=1e-5)


def test_networks_are_judged_by_the_interval_of_the_mean_over_parts() -> None:
    gains = [0.02, 0.05, -0.01, 0.04, 0.03, 0.06]
    interval = stats.ttest_1samp(gains, 0, alternative="greater").confidence_interval(0.95)
    assert lower_limit(gains) == pytest.approx(interval.low)
    # A loss on one of six parts does not forbid it; one large gain among three is no evidence.
    assert lower_limit(gains) > 0
    assert lower_limit([0.0, 0.067, 0.208]) < 0
    assert lower_limit([0.0, 0.0, 0.0]) == lower_limit([0.3]) == 0


def test_a_saved_one_predicts_the_same_bits_and_its_depth(curved: DenseAttentionModel) -> None:
    again = DenseAttentionModel.from_state(curved.config(), curved.state())
    patches, of = _section(8, curved=2.0).patches, np.arange(11, 50)
    values, depth = curved.predict_with_depth(patches, of)
    other, other_depth = again.predict_with_depth(patches, of)
    np.testing.assert_array_equal(values, other)
    assert depth is not None
    assert other_depth is not None
    np.testing.assert_array_equal(depth, other_depth)
    np.testing.assert_allclose(curved.predict(patches)[of], values, atol=1e-5)
    assert again.facts == curved.facts


def _random_attention(dim: int = DIM) -> AttentionEnsemble:
    """Networks whose weights are all random: their windows matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        networks = tuple(AttentionNetwork(dim, 4).eval() for _ in range(2))
        for network in networks:
            for weight in network.parameters():
                torch.nn.init.normal_(weight, std=0.5)
    return AttentionEnsemble(Standardiser(np.zeros(dim), np.ones(dim)), networks, 256.0)


def _turned(patches: Patches) -> Patches:
    """Turn a slide by a quarter, and mirror it."""
    return replace(patches, rows=patches.cols, cols=SIDE - 1 - patches.rows)


def test_only_distance_counts_so_a_turned_or_mirrored_slide_gives_the_same() -> None:
    patches, attention = _section(1, curved=1.0).patches, _random_attention()
    every = np.arange(len(patches))
    np.testing.assert_allclose(attention(patches, every), attention(_turned(patches), every), atol=1e-5)
    order = np.random.default_rng(2).permutation(len(patches))
    shuffled = replace(
        patches, rows=patches.rows[order], cols=patches.cols[order], embedding=patches.embedding[order]
    )
    np.testing.assert_allclose(attention(patches, every)[order], attention(shuffled, every), atol=1e-5)


def test_what_lies_in_the_window_counts_and_nothing_beyond_it_or_missing() -> None:
    patches, attention = _section(1, curved=1.0).patches, _random_attention()
    middle = np.flatnonzero((patches.rows == 7) & (patches.cols == 7))
    apart = np.maximum(abs(patches.rows - 7), abs(patches.cols - 7)) * STRIDE
    before = attention(patches, middle)
    for change, places in ((False, apart > 256), (True, (apart > 0) & (apart <= 256))):
        embedding = patches.embedding.copy()
        embedding[places] += 3
        after = attention(patches.with_embedding(embedding), middle)
        assert (np.abs(after - before).max() > 0.05) == change
    near = np.flatnonzero(apart <= 256)
    alone = replace(
        patches, rows=patches.rows[near], cols=patches.cols[near], embedding=patches.embedding[near]
    )
    np.testing.assert_allclose(attention(alone, np.flatnonzero(near == middle[0])), before, atol=1e-5)


def test_a_window_spans_the_same_microns_on_a_finer_grid() -> None:
    patches = _section(1, curved=1.0).patches
    finer = replace(patches, stride_um=STRIDE / 2)
    standardiser = Standardiser(np.zeros(DIM), np.ones(DIM))
    spans = [
        Windows.from_patches(p, standardiser, 256.0, np.arange(len(p))).distance_um.max().item()
        for p in (patches, finer)
    ]
    assert spans == pytest.approx([240 * np.sqrt(2)] * 2, rel=0.13)


def test_each_patch_under_a_spot_is_drawn_as_often_as_its_share() -> None:
    section = _section(1, curved=1.0)
    xy_um = section.spot_xy_um[[20, 100, 200]] + np.array([17.0, 5.0])
    overlap = disc_overlap(xy_um, 90.0, section.patches)
    training = TrainingWindows.from_patches(
        section.patches, overlap, np.zeros((3, 4)), Standardiser(np.zeros(DIM), np.ones(DIM)), 256.0
    )
    rng, drawn = np.random.default_rng(0), np.zeros(training.overlap.shape)
    spots = np.array([2, 0, 1])
    for _ in range(2000):
        drawn[spots, training.draw_patches(spots, rng).numpy()] += 1
    np.testing.assert_allclose(drawn / 2000, training.overlap.toarray(), atol=0.04)
    some = training.take(np.array([1]))
    with torch.no_grad():
        network = _random_attention().networks[0]
        np.testing.assert_allclose(some.predict(network), training.predict(network)[[1]], atol=1e-6)


def test_the_preset_is_trained_by_name_and_reports_its_choice(tmp_path: Path) -> None:
    spec = SyntheticSpec(
        (1208, 1128), mpp=0.5, genes=GeneCounts(4, 3, 2, 2), spot_diameter_um=41, spot_pitch_um=59
    )
    sheet = str(make_cohort(tmp_path / "data", spec, 3).sheet)
    store, model = f"{tmp_path}/store", f"{tmp_path}/model"
    embed(sheet, store, EmbedSettings(encoders=("colour",), spec=GridSpec(1.0, 48, 48)))
    said: list[str] = []
    train(
        sheet,
        store,
        model,
        TrainSettings("dense+attention", genes=5, epochs=2, intervals=False),
        on_message=said.append,
    )
    assert sum(line.startswith("attention: ") for line in said) == 1
    saved = load_model(model)
    assert isinstance(saved.model, DenseAttentionModel)
    (first, *_) = predict(store, model, f"{tmp_path}/maps")
    assert first.computed == first.planned > 0
