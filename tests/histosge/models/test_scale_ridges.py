"""Ridges at several scales: project-then-pool equals pool-then-project, and weights go to scales that predict."""

import numpy as np
import pytest
from _dense_oracle import all_scales, project, scaler_of_all
from sklearn.linear_model import Ridge

from histosge.data.gaussian_pooling import gaussian_pool, sum_pooled
from histosge.data.sections import Patches, TrainingSection
from histosge.data.spot_overlap import disc_overlap, spots_from_patches
from histosge.models.linear_algebra import Floats, Indices
from histosge.models.ridge_sums import LONE_GROUP_PENALTY
from histosge.models.scale_ridges import SIGMAS_UM, Outputs, fit_scale_ridges, pool_spots

DIM = 5


def _section(
    seed: int, sigma_um: float = 0.0, noise: float = 0.1, dim: int = DIM
) -> tuple[TrainingSection, Floats]:
    """Patches of noise, and two outputs that follow them at one scale."""
    rng = np.random.default_rng(seed)
    rows, cols = np.nonzero(rng.random((31, 37)) > 0.15)
    embedding = rng.standard_normal((len(rows), dim)).astype(np.float32)
    patches = Patches(f"S{seed}", rows, cols, embedding, 50.0, 100.0)
    pooled = embedding if sigma_um == 0 else gaussian_pool(patches, sigma_um, ("mean",))
    weight = np.random.default_rng(99).standard_normal((dim, 2))
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(150, 1700, 130), np.arange(150, 1500, 130)))
    xy_um = np.stack([x, y], axis=1).astype(float)
    overlap = disc_overlap(xy_um, 55.0, patches)
    keep = np.asarray(overlap.sum(axis=1)).ravel() > 0
    outputs = spots_from_patches(overlap[keep], pooled @ weight)
    outputs = outputs / outputs.std(axis=0) + noise * rng.standard_normal(outputs.shape)
    section = TrainingSection(patches, overlap[keep], xy_um[keep], np.zeros((keep.sum(), 1), np.float32))
    return section, outputs


def _labels(outputs: list[Floats]) -> Indices:
    return np.repeat(np.arange(len(outputs)), list(map(len, outputs)))


def test_projecting_first_gives_what_pooling_first_gives() -> None:
    section, _ = _section(1)
    patches = section.patches
    weight = np.random.default_rng(2).standard_normal((DIM, len(SIGMAS_UM) * 3)).astype(np.float32)
    of = np.arange(7, len(patches), 11)
    ours = sum_pooled(patches.with_embedding(patches.embedding @ weight), SIGMAS_UM, of)
    expected = np.zeros((len(of), 3))
    for i, sigma_um in enumerate(SIGMAS_UM):
        pooled = gaussian_pool(patches, sigma_um, ("mean",), of) if sigma_um else patches.embedding[of]
        expected += pooled @ weight[:, 3 * i : 3 * i + 3]
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dim", [DIM, 400])
def test_the_map_of_a_lone_section_is_the_mean_of_plain_ridges(dim: int) -> None:
    section, Y = _section(1, dim=dim)
    fitted = fit_scale_ridges([section], Outputs(Y, np.zeros(len(Y), np.int64), 2))
    expected, patches = np.zeros((len(section.patches), 2)), section.patches
    spots = [pool_spots(section, sigma_um) for sigma_um in SIGMAS_UM]
    at_patches = [
        gaussian_pool(patches, sigma_um, ("mean",)).astype(np.float64) if sigma_um else patches.embedding
        for sigma_um in SIGMAS_UM
    ]
    projection = project([section])
    assert (projection is None) == (dim == DIM)
    inputs = [
        *zip(spots, at_patches, strict=True),
        (all_scales(spots, projection), all_scales(at_patches, projection)),
    ]
    for X, of_patches in inputs:
        mean, sd = X.mean(axis=0), X.std(axis=0)
        if projection is not None and X is inputs[-1][0]:
            sd = scaler_of_all(X, projection).scale_
        length = (((X - mean) / sd) ** 2).sum(axis=1).mean()
        oracle = Ridge(alpha=LONE_GROUP_PENALTY * length).fit((X - mean) / sd, Y)
        expected += oracle.predict((of_patches - mean) / sd) / len(inputs)
    np.testing.assert_allclose(fitted.ridges.project(patches), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sigma_um", [0.0, 160.0])
def test_weights_go_to_the_scale_that_predicts_held_out_sections(sigma_um: float) -> None:
    sections, outputs = zip(*(_section(seed, sigma_um) for seed in range(4)), strict=True)
    fitted = fit_scale_ridges(sections, Outputs(np.concatenate(outputs), _labels(list(outputs)), 2))
    assert sum(fitted.ridges.weights) == pytest.approx(1)
    weights = dict(zip(SIGMAS_UM, fitted.ridges.weights[:-1], strict=True))
    assert max(weights, key=weights.__getitem__) == sigma_um


def test_out_of_fold_predictions_did_not_see_the_spot() -> None:
    sections, outputs = zip(*(_section(seed, dim=90) for seed in range(2)), strict=True)
    noise = np.random.default_rng(5).standard_normal((sum(map(len, outputs)), 1))
    folds = np.arange(len(noise)) % 5
    fitted = fit_scale_ridges(sections, Outputs(noise, _labels(list(outputs)), 1), folds)
    assert fitted.out_of_fold is not None
    assert abs(np.corrcoef(fitted.out_of_fold[:, 0], noise[:, 0])[0, 1]) < 0.15
    seen = np.concatenate([s.overlap @ fitted.ridges.project(s.patches) for s in sections])
    assert np.corrcoef(seen[:, 0], noise[:, 0])[0, 1] > 0.2


def test_an_output_beside_the_stacked_ones_has_a_penalty_of_its_own() -> None:
    sections, outputs = zip(*(_section(seed, noise=0.0) for seed in range(3)), strict=True)
    values = np.concatenate(outputs)
    # Far larger: if its error counted for the others' penalty, it would decide it.
    noise = 100 * np.random.default_rng(5).standard_normal((len(values), 1))
    both = fit_scale_ridges(sections, Outputs(np.hstack([values, noise]), _labels(list(outputs)), 2))
    alone = fit_scale_ridges(sections, Outputs(values, _labels(list(outputs)), 2))
    assert [of_scale[0] for of_scale in both.ridges.penalties] == [p for (p,) in alone.ridges.penalties]
    assert both.ridges.weights == alone.ridges.weights
    assert max(of_scale[1] for of_scale in both.ridges.penalties) > both.ridges.penalties[0][0]
