"""Gaussian processes: measured values, noise, other slides, and agreement of the two solvers."""

import numpy as np
import pytest

from histosge.models import kriging
from histosge.models.kriging import Kernel, Kriging, SpotFeatures, choose_kernels, leave_one_out


def _spots(n: int, seed: int = 0, slides: int = 2, dim: int = 3) -> SpotFeatures:
    rng = np.random.default_rng(seed)
    return SpotFeatures(np.arange(n) % slides, rng.uniform(0, 2000, (n, 2)), rng.standard_normal((n, dim)))


def _field(xy_um: np.ndarray) -> np.ndarray:
    return np.stack([np.sin(xy_um[:, 0] / 300), np.cos(xy_um[:, 1] / 400)], axis=1)


def test_without_noise_measured_values_come_back() -> None:
    spots = _spots(150)
    values = _field(spots.xy_um)
    process = Kriging.fit(spots, values, [Kernel(200.0, 0.3, 1e-6)] * 2)
    np.testing.assert_allclose(process(spots), values, atol=1e-3)


def test_a_smooth_field_is_interpolated_and_noise_is_not() -> None:
    known, asked = _spots(400, 1, slides=1, dim=0), _spots(200, 2, slides=1, dim=0)
    rng = np.random.default_rng(7)
    values = np.hstack([_field(known.xy_um), rng.standard_normal((400, 1))])
    values[:, :2] += 0.3 * rng.standard_normal((400, 2))
    guess = Kriging.fit(known, values - values.mean(axis=0))(asked)
    for column in range(2):
        assert np.corrcoef(guess[:, column], _field(asked.xy_um)[:, column])[0, 1] > 0.95
    assert guess[:, 2].std() < 0.35


def test_the_part_of_features_holds_on_another_slide_and_that_of_position_does_not() -> None:
    known = _spots(300, 1)
    values = known.features @ np.array([[1.0], [-2.0], [0.5]])
    process = Kriging.fit(known, values)
    assert process.kernels[0].share > 0.5
    elsewhere = _spots(50, 3)
    elsewhere = SpotFeatures(np.full(50, 9), elsewhere.xy_um, elsewhere.features)
    np.testing.assert_allclose(
        process(elsewhere), elsewhere.features @ np.array([[1.0], [-2.0], [0.5]]), atol=0.3
    )
    assert (process.spatial_part(9, elsewhere.xy_um) == 0).all()


def test_inducing_points_give_what_the_exact_solution_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    known, asked = _spots(700, 1), _spots(90, 5)
    values = _field(known.xy_um) + known.features[:, :2]
    kernels = [Kernel(300.0, 0.4, 0.1), Kernel(500.0, 0.4, 0.3)]
    exact = Kriging.fit(known, values, kernels)(asked)
    monkeypatch.setattr(kriging, "MAX_EXACT_SPOTS", 100)
    monkeypatch.setattr(kriging, "N_INDUCING", 300)
    approximate = Kriging.fit(known, values, kernels)
    assert sum(map(len, approximate.centres.values())) <= 320
    np.testing.assert_allclose(approximate(asked), exact, atol=0.05)


def test_leave_one_out_in_closed_form_equals_fits_without_the_spot() -> None:
    spots = _spots(40)
    values = _field(spots.xy_um)
    kernels = [Kernel(300.0, 0.4, 0.1)] * 2
    closed = leave_one_out(spots, values, kernels)
    for gone in (0, 17, 39):
        rest = np.delete(np.arange(40), gone)
        refitted = Kriging.fit(spots.take(rest), values[rest], kernels)(spots.take(np.array([gone])))
        # Not exactly equal: the features' scale is measured on the spots at hand.
        np.testing.assert_allclose(closed[gone], refitted[0], atol=0.02)


def test_one_kernel_serves_all_outputs_beyond_the_exact_size(monkeypatch: pytest.MonkeyPatch) -> None:
    spots = _spots(200)
    values = np.hstack([_field(spots.xy_um), spots.features])
    assert len(set(choose_kernels(spots, values))) > 1
    monkeypatch.setattr(kriging, "MAX_EXACT_SPOTS", 100)
    assert len(set(choose_kernels(spots, values))) == 1
