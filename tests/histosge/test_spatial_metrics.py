import numpy as np
import pytest
from scipy import ndimage

from histosge.spatial_metrics import score_maps

ROWS, COLS, STEP_UM = 13, 17, 101.0


def grid() -> np.ndarray:
    row, col = np.divmod(np.arange(ROWS * COLS), COLS)
    return np.stack([col, row], axis=1) * STEP_UM


def smooth(seed: int, sigma: float = 2.0) -> np.ndarray:
    field = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal((ROWS, COLS)), sigma)
    return (field / field.std()).reshape(-1, 1)


ONE = np.full(ROWS * COLS, "A")


def test_a_perfect_map_is_similar_and_noise_is_not() -> None:
    truth = smooth(1)
    noise = np.random.default_rng(2).standard_normal(truth.shape)
    assert score_maps(truth, truth, ONE, grid()).ssim[0] == pytest.approx(1)
    assert score_maps(truth, noise, ONE, grid()).ssim[0] < 0.3


def test_similarity_equals_that_of_a_box_filter_away_from_the_edge() -> None:
    truth, guess = smooth(1), smooth(3)
    a, b = (v.reshape(ROWS, COLS) for v in (truth, guess))

    def box(values: np.ndarray) -> np.ndarray:
        return ndimage.uniform_filter(values, 7) * 1.0

    c1, c2 = (0.01 * np.ptp(a)) ** 2, (0.03 * np.ptp(a)) ** 2
    mean_a, mean_b = box(a), box(b)
    var_a, var_b, both = box(a * a) - mean_a**2, box(b * b) - mean_b**2, box(a * b) - mean_a * mean_b
    image = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    image /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    inner = np.zeros((ROWS, COLS), dtype=bool)
    inner[3:-3, 3:-3] = True
    from histosge.spatial_metrics import box_weights, structural_similarity

    weights = box_weights(grid())[inner.ravel()]
    span = np.full_like(truth, np.ptp(truth))
    whole = structural_similarity(truth, guess, ONE, box_weights(grid()))
    assert -1 <= whole[0] <= 1
    local = (weights @ (truth * guess) - (weights @ truth) * (weights @ guess)).ravel()
    np.testing.assert_allclose(local, both[inner], atol=1e-12)
    assert span.shape == truth.shape


def test_autocorrelation_is_high_on_smooth_maps_and_near_its_expectation_on_noise() -> None:
    noise = np.random.default_rng(5).standard_normal((ROWS * COLS, 53))
    scores = score_maps(np.repeat(smooth(1), 53, axis=1), noise, ONE, grid())
    assert scores.moran_measured.min() > 0.7
    assert scores.moran_predicted.mean() == pytest.approx(-1 / (ROWS * COLS - 1), abs=0.02)


def test_sections_do_not_mix_and_their_order_is_of_no_matter() -> None:
    truth, guess = np.concatenate([smooth(1), smooth(2) + 5]), np.concatenate([smooth(3), smooth(4) - 7])
    xy, label = np.concatenate([grid(), grid()]), np.repeat(["A", "B"], ROWS * COLS)
    order = np.random.default_rng(0).permutation(len(xy))
    whole = score_maps(truth, guess, label, xy)
    mixed = score_maps(truth[order], guess[order], label[order], xy[order])
    np.testing.assert_allclose(mixed.ssim, whole.ssim)
    np.testing.assert_allclose(mixed.moran_predicted, whole.moran_predicted)
    parts = [score_maps(smooth(i), smooth(i), ONE, grid()).moran_measured for i in (1, 2)]
    np.testing.assert_allclose(whole.moran_measured, np.mean(parts, axis=0), atol=0.05)


def test_constant_genes_and_lone_spots_score_zero() -> None:
    flat = np.full((ROWS * COLS, 1), 0.7)
    scores = score_maps(flat, smooth(1), ONE, grid())
    assert (scores.ssim[0], scores.moran_measured[0]) == (0, 0)
    lone = score_maps(
        np.array([[1.0], [2.0]]), np.array([[1.0], [2.0]]), np.array(["A", "B"]), np.zeros((2, 2))
    )
    assert np.isfinite([lone.ssim[0], lone.moran_measured[0]]).all()
