"""What holds for every preset, on small sections whose genes follow the embeddings."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from histosge.data.gaussian_pooling import gaussian_pool
from histosge.data.sections import Patches, TrainingSection
from histosge.data.spot_overlap import disc_overlap, spots_from_patches
from histosge.errors import ModelError
from histosge.heldout.metrics import correlate
from histosge.models.low_rank_targets import MAX_LOG
from histosge.models.presets.dense import DenseModel
from histosge.models.protocol import Model
from histosge.models.registry import PRESETS, load_preset
from histosge.models.residual_kriging import ResidualKriging

GENES = 8
NETWORKS = ("paper", "mlp", "bleep", "triplex")
"""Trained for as many epochs as `_fit` gives, which is few; rounding of the inputs changes their steps."""
LEARNERS = ("ridge", "dense", "attention", "dense+attention", "gp", "dense+spots", *NETWORKS)


@cache
def _section(
    seed: int, dim: int = 12, side: int = 22, offset: float = 0.0, *, noise: bool = False
) -> TrainingSection:
    """Genes are combinations of four smooth fields; the embedding is a linear map of those fields plus noise."""
    rng = np.random.default_rng(seed)
    rows, cols = np.nonzero(rng.random((side, side)) > 0.08)
    blank = Patches(
        f"S{seed}", rows, cols, rng.standard_normal((len(rows), 4)).astype(np.float32), 50.0, 100.0
    )
    fields = gaussian_pool(blank, 100.0, ("mean",))
    fields = (fields - fields.mean(axis=0)) / fields.std(axis=0)
    shared = np.random.default_rng(99)
    loading, mixing = shared.standard_normal((4, GENES)), shared.standard_normal((4, dim))
    logs = np.maximum(2 + 0.4 * fields @ loading + offset, 0.05)
    embedding = fields @ mixing + 0.3 * rng.standard_normal((len(rows), dim))
    if noise:
        embedding = rng.standard_normal(embedding.shape)
    patches = blank.with_embedding(embedding.astype(np.float32))
    x, y = (
        axis.ravel() for axis in np.meshgrid(np.arange(150, side * 50, 100), np.arange(150, side * 50, 100))
    )
    xy = np.stack([x, y], axis=1).astype(float)
    overlap = disc_overlap(xy, 55.0, patches)
    keep = np.asarray(overlap.sum(axis=1)).ravel() > 0
    target = spots_from_patches(overlap[keep], logs) + 0.1 * rng.standard_normal((keep.sum(), GENES))
    return TrainingSection(patches, overlap[keep], xy[keep], target.astype(np.float32))


def _score(model: Model, section: TrainingSection) -> float:
    guess = spots_from_patches(section.overlap, model.predict(section.patches))
    pearson, _ = correlate(section.target, guess, np.zeros(len(guess)))
    return float(pearson.mean())


def _fit(preset: str, sections: list[TrainingSection], seed: int = 0) -> Model:
    return load_preset(preset).fit(sections, seed=seed, epochs=15)


@cache
def _fitted(preset: str, *seeds: int) -> Model:
    """One model of plain sections for all tests that only look at it."""
    return _fit(preset, [_section(seed) for seed in seeds])


@pytest.mark.parametrize("preset", LEARNERS)
def test_genes_that_follow_embeddings_are_predicted_on_another_section(preset: str) -> None:
    model = _fitted(preset, 1, 2)
    assert _score(model, _section(3)) > (0.3 if preset in NETWORKS else 0.85)


@pytest.mark.parametrize("preset", LEARNERS)
def test_noise_is_not_predicted_on_another_section(preset: str) -> None:
    model = _fit(preset, [_section(1, noise=True), _section(2, noise=True)])
    scores = [_score(model, _section(seed, noise=True)) for seed in (3, 4, 5)]
    assert abs(np.mean(scores)) < 0.1


def _unpredictable(seed: int) -> TrainingSection:
    """Targets that nothing predicts: only a fit that saw them can reproduce them."""
    section = _section(seed, dim=60, noise=True)
    target = 3 + np.random.default_rng(50 + seed).standard_normal(section.target.shape)
    return replace(section, target=target.astype(np.float32))


@pytest.mark.parametrize("max_exact_spots", [3000, 50])
def test_residuals_are_interpolated_from_other_spots_when_their_share_is_chosen(
    max_exact_spots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("kriging", "residual_kriging"):
        monkeypatch.setattr(f"histosge.models.{module}.MAX_EXACT_SPOTS", max_exact_spots)
    section = _unpredictable(1)
    _, (added,) = ResidualKriging.fit_out_of_fold([section], [np.zeros_like(section.target)])
    one_label = np.zeros(len(added), np.int64)
    assert correlate(section.target, added, one_label)[0].mean() < 0.2


def test_out_of_fold_predictions_did_not_see_the_spot() -> None:
    sections = [_unpredictable(1), _unpredictable(2)]
    truth = np.concatenate([s.target for s in sections])
    label = np.repeat([0, 1], [len(s.target) for s in sections])
    model = DenseModel.fit(sections)
    seen = [spots_from_patches(s.overlap, model.predict(s.patches)) for s in sections]
    assert correlate(truth, np.concatenate(seen), label)[0].mean() > 0.3
    out_of_fold = np.concatenate(DenseModel.out_of_fold(sections))
    assert correlate(truth, out_of_fold, label)[0].mean() < 0.05


def test_dense_beats_ridge_where_single_patches_are_noisy() -> None:
    def blurred(seed: int) -> TrainingSection:
        section = _section(seed)
        rng = np.random.default_rng(seed)
        noisy = section.patches.embedding + 3 * rng.standard_normal(section.patches.embedding.shape)
        return replace(section, patches=section.patches.with_embedding(noisy.astype(np.float32)))

    sections = [blurred(1), blurred(2)]
    assert _score(_fit("dense", sections), blurred(3)) > _score(_fit("ridge", sections), blurred(3)) + 0.05


def test_knn_interpolates_its_own_slide_and_gives_the_mean_on_another() -> None:
    section = _section(1)
    model = _fit("knn", [section])
    assert _score(model, section) > 0.8
    elsewhere = model.predict(_section(2).patches)
    np.testing.assert_allclose(elsewhere, np.broadcast_to(elsewhere[0], elsewhere.shape))


def test_mean_is_the_mean_everywhere() -> None:
    sections = [_section(1), _section(2)]
    predicted = _fit("mean", sections).predict(_section(3).patches)
    pooled = np.concatenate([s.target for s in sections]).mean(axis=0)
    np.testing.assert_allclose(predicted, np.broadcast_to(pooled, predicted.shape), rtol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_saved_model_gives_the_same_bits(preset: str) -> None:
    section = _section(1)
    first = _fitted(preset, 1)
    expected = first.predict(section.patches)
    config = json.loads(json.dumps(first.config()))
    again = load_preset(preset).from_state(config, {k: np.array(v) for k, v in first.state().items()})
    np.testing.assert_array_equal(expected, again.predict(section.patches))
    assert again.halo_um == first.halo_um


@pytest.mark.parametrize("preset", PRESETS)
def test_predictions_are_finite_not_negative_and_have_the_promised_shape(preset: str) -> None:
    section = _section(1)
    far = section.patches.with_embedding(section.patches.embedding * 30)
    for patches in (section.patches, far):
        predicted = _fitted(preset, 1).predict(patches)
        assert predicted.shape == (len(patches), GENES)
        assert predicted.dtype == np.float32
        assert np.isfinite(predicted).all()
        assert (predicted >= 0).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_gene_that_does_not_vary_and_a_dead_feature_do_no_harm(preset: str) -> None:
    section = _section(1)
    target, embedding = section.target.copy(), section.patches.embedding.copy()
    target[:, 3], embedding[:, 5] = 1.5, 4.0
    section = replace(section, target=target, patches=section.patches.with_embedding(embedding))
    predicted = _fit(preset, [section]).predict(section.patches)
    assert np.isfinite(predicted).all()
    if preset != "paper":
        np.testing.assert_allclose(predicted[:, 3], 1.5, atol=0.02)


@pytest.mark.parametrize("preset", ["ridge", "dense"])
def test_embeddings_wider_than_there_are_spots_are_learned_from(preset: str) -> None:
    model = _fit(preset, [_section(1, dim=700), _section(2, dim=700)])
    assert _score(model, _section(3, dim=700)) > 0.8


def test_an_offset_between_sections_does_not_pass_for_a_pattern() -> None:
    model = _fit("dense", [_section(1), _section(2, offset=1.5)])
    assert _score(model, _section(3)) > 0.85


@pytest.mark.parametrize("preset", PRESETS)
def test_a_part_with_its_halo_gives_what_the_whole_gives(preset: str) -> None:
    section = _section(1, side=40)
    model, patches = _fit(preset, [section]), section.patches
    halo = int(np.ceil(model.halo_um / patches.stride_um))

    def inside(margin: int) -> np.ndarray:
        return (abs(patches.rows - 19.5) < 4 + margin) & (abs(patches.cols - 19.5) < 4 + margin)

    near = inside(halo)
    part = replace(
        patches, rows=patches.rows[near], cols=patches.cols[near], embedding=patches.embedding[near]
    )
    expected = model.predict(patches)[inside(0)]
    np.testing.assert_allclose(model.predict(part)[inside(0)[near]], expected, rtol=1e-4, atol=1e-5)


def test_dense_never_goes_flat_where_it_is_low() -> None:
    section = _section(1)
    low = section.patches.with_embedding(section.patches.embedding * 6)
    predicted = _fitted("dense", 1).predict(low)
    for gene in range(GENES):
        values = np.sort(predicted[:, gene])
        assert len(np.unique(values)) > 0.9 * len(values)


def test_no_gene_is_predicted_above_twice_the_highest_rate_that_training_measured() -> None:
    section = _section(1)
    far = section.patches.with_embedding(section.patches.embedding * 1000)
    model, highest = _fitted("dense", 1), section.target.max(axis=0)
    predicted = model.predict(far)
    assert (predicted <= highest + np.log(2) + 1e-5).all()
    assert (predicted.max(axis=0) > highest).any()
    assert predicted.max() < MAX_LOG
    # Where nothing is extrapolated the bound changes no bit.
    near = model.predict(section.patches)
    inside = (near < np.minimum(highest, 8)).all(axis=0)
    assert inside.any()
    unbounded = replace(model, targets=replace(model.targets, highest=None)).predict(section.patches)
    np.testing.assert_array_equal(near[:, inside], unbounded[:, inside])


def test_a_model_without_a_bound_of_its_own_ends_at_all_counts_of_a_spot() -> None:
    section = _section(1)
    far = section.patches.with_embedding(section.patches.embedding * 1000)
    model = _fitted("dense", 1)
    earlier = replace(model, targets=replace(model.targets, highest=None))
    assert earlier.predict(far).max() == pytest.approx(MAX_LOG)


def test_an_unknown_preset_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        ModelError,
        match=r"bleep, cubic, dense, dense\+attention, dense\+spots, gp, knn, linear, mean, mlp, nearest, paper, ridge",
    ):
        load_preset("transformer")


@pytest.mark.parametrize("preset", PRESETS)
def test_the_same_seed_learns_the_same_bits(preset: str) -> None:
    sections = [_section(1), _section(2)]
    model = _fitted(preset, 1, 2)
    first = model.state()
    with torch.random.fork_rng(devices=[]):
        torch.rand(11)  # whatever else drew numbers in between
        again = _fit(preset, sections)
        second = again.state()
    patches = sections[0].patches
    np.testing.assert_array_equal(model.predict(patches), again.predict(patches))
    assert list(first) == list(second)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], strict=True)


def test_another_seed_gives_another_paper_network_and_leaves_the_global_generator_alone() -> None:
    section = _section(1)
    before = torch.random.get_rng_state()
    first, second = _fit("paper", [section], seed=0), _fit("paper", [section], seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (first.predict(section.patches) != second.predict(section.patches)).any()


@pytest.mark.parametrize("preset", PRESETS)
def test_patches_in_another_order_give_the_same_map(preset: str) -> None:
    section = _section(1)
    model, patches = _fitted(preset, 1), section.patches
    order = np.random.default_rng(7).permutation(len(patches))
    shuffled = replace(
        patches, rows=patches.rows[order], cols=patches.cols[order], embedding=patches.embedding[order]
    )
    np.testing.assert_allclose(model.predict(shuffled), model.predict(patches)[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("preset", LEARNERS)
def test_the_units_of_an_embedding_do_not_matter(preset: str) -> None:
    rng = np.random.default_rng(7)
    scale, shift = 10.0 ** rng.uniform(-2, 2, 12), rng.uniform(-1, 1, 12)

    def rescaled(section: TrainingSection) -> TrainingSection:
        embedding = (section.patches.embedding + shift) * scale
        return replace(section, patches=section.patches.with_embedding(embedding.astype(np.float32)))

    sections, other = [_section(1), _section(2)], _section(3)
    plain = _fitted(preset, 1, 2).predict(other.patches)
    scaled = _fit(preset, [rescaled(s) for s in sections]).predict(rescaled(other).patches)
    difference = np.abs(scaled - plain).mean() / plain.std()
    assert difference < (0.1 if preset in NETWORKS else 0.001)


@pytest.mark.parametrize("preset", ["ridge", "dense"])
def test_on_noise_the_chosen_penalty_costs_hardly_more_than_the_mean(preset: str) -> None:
    sections = [_section(1, dim=60, noise=True), _section(2, dim=60, noise=True)]
    other = _section(3, dim=60, noise=True)

    def squared_error(name: str) -> float:
        guess = spots_from_patches(other.overlap, _fit(name, sections).predict(other.patches))
        return float(((guess - other.target) ** 2).mean())

    assert squared_error(preset) < 1.05 * squared_error("mean")


def test_dense_predicts_another_section_around_the_mean_of_all_training_spots() -> None:
    sections = [_section(1), _section(2, offset=1.5)]
    pooled = np.concatenate([s.target for s in sections]).mean(axis=0)
    predicted = _fit("dense", sections).predict(_section(3).patches)
    assert abs(predicted.mean() - pooled.mean()) < 0.2


def test_dense_learns_nothing_from_tissue_beyond_its_halo() -> None:
    section = _section(1, dim=300, side=40)
    left = section.subset(section.spot_xy_um[:, 0] < 400)
    beyond = section.patches.xy_um[:, 0] > 400 + 55 + 50 + load_preset("dense").fit([left]).halo_um
    assert beyond.sum() > 50
    other = section.patches.embedding.copy()
    other[beyond] = 1000.0
    changed = replace(left, patches=section.patches.with_embedding(other))
    first, second = _fit("dense", [left]).state(), _fit("dense", [changed]).state()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_knn_weights_the_nearest_eight_spots_by_inverse_distance() -> None:
    whole = _section(1)
    # Off a regular lattice no two distances tie, so the nearest eight are beyond doubt.
    jittered = whole.spot_xy_um + np.random.default_rng(7).uniform(-13, 13, whole.spot_xy_um.shape)
    section = replace(whole, spot_xy_um=jittered)
    distance = np.linalg.norm(section.patches.xy_um[:, None] - jittered[None], axis=2)
    nearest = np.argsort(distance, axis=1)[:, :8]
    weight = 1 / np.take_along_axis(distance, nearest, axis=1)
    expected = (weight[..., None] * section.target[nearest]).sum(axis=1) / weight.sum(axis=1)[:, None]
    predicted = _fit("knn", [section]).predict(section.patches)
    np.testing.assert_allclose(predicted, expected, rtol=1e-4, atol=1e-5)


def test_no_gene_of_the_paper_network_is_constant_where_it_follows_the_embedding() -> None:
    section = _section(1)
    predicted = _fitted("paper", 1).predict(section.patches)
    assert (predicted.std(axis=0) > 0.1).all()
    assert ((predicted == 0).mean(axis=0) < 0.2).all()


def test_the_paper_network_predicts_a_slide_larger_than_its_table_of_positions() -> None:
    section = _section(1)
    model, patches = _fitted("paper", 1), section.patches
    far = replace(patches, rows=patches.rows + 5000, cols=patches.cols + 7001)
    predicted = model.predict(far)
    assert predicted.shape == (len(far), GENES)
    assert np.isfinite(predicted).all()


def test_a_feature_that_never_varied_in_training_may_vary_elsewhere() -> None:
    def with_feature(section: TrainingSection, values: np.ndarray | float) -> TrainingSection:
        embedding = section.patches.embedding.copy()
        embedding[:, 5] = values
        return replace(section, patches=section.patches.with_embedding(embedding))

    model = _fit("dense", [with_feature(_section(1), 0.37), with_feature(_section(2), 0.37)])
    elsewhere = _section(3)
    drift = 0.37 + 0.01 * np.random.default_rng(0).standard_normal(len(elsewhere.patches))
    assert _score(model, with_feature(elsewhere, drift)) > 0.85


@pytest.mark.gpu
def test_the_paper_network_learns_the_same_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    sections = [_section(1), _section(2)]
    on_gpu = _fit("paper", sections)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = _fit("paper", sections)
    patches = _section(3).patches
    a, b = on_gpu.predict(patches).ravel(), on_cpu.predict(patches).ravel()
    assert a @ b / np.sqrt(a @ a * (b @ b)) > 0.999
