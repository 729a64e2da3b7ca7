"""The stacked linear part: weights lie between equal ones and those that predict held-out spots best."""

import numpy as np
from numpy.typing import NDArray

from histosge.models.kriging import SpotFeatures
from histosge.models.linear_algebra import Floats
from histosge.models.multiscale import MOMENTS
from histosge.models.stacking import fit_stack

DIM, PATTERNS = 3, 2


def _spots(
    seed: int, informative: int, dim: int = DIM, noise: float = 0.5
) -> tuple[SpotFeatures, Floats, NDArray[np.int64]]:
    """Two sections whose patterns follow one moment of the features; the others are noise."""
    rng = np.random.default_rng(seed)
    n = 120
    features = rng.standard_normal((2 * n, dim * len(MOMENTS)))
    weight = np.random.default_rng(9).standard_normal((dim, PATTERNS))
    signal = features[:, informative * dim : (informative + 1) * dim]
    Y = signal @ weight + noise * rng.standard_normal((2 * n, PATTERNS))
    slide = np.repeat([0, 1], n)
    return SpotFeatures(slide, rng.uniform(0, 3000, (2 * n, 2)), features), Y, slide


def test_weights_go_to_base_models_that_predict_held_out_spots() -> None:
    spots, Y, groups = _spots(1, informative=0)
    stack = fit_stack(spots, Y, groups)
    assert len(stack.weights) == 4
    assert min(stack.weights) >= 0
    np.testing.assert_allclose(sum(stack.weights), 1)
    # All signal is in the patch itself: the base models with that input, Gaussian process and first ridge, share the weight.
    assert stack.weights[0] + stack.weights[1] > 0.9
    spots, Y, groups = _spots(1, informative=1)
    assert fit_stack(spots, Y, groups).weights[2] > 2 * stack.weights[2]


def test_where_no_base_model_predicts_anything_the_stack_predicts_little() -> None:
    spots, Y, groups = _spots(2, informative=0)
    noise = np.random.default_rng(3).standard_normal(Y.shape)
    stack = fit_stack(spots, noise, groups)
    other, truth, _ = _spots(4, informative=0)
    assert np.abs(stack.affine(other.features)).mean() < 0.25
    np.testing.assert_allclose(sum(stack.weights), 1)
    assert abs(np.corrcoef(stack.affine(other.features).ravel(), truth.ravel())[0, 1]) < 0.3


def test_a_stack_can_be_fitted_with_the_choices_of_another() -> None:
    spots, Y, groups = _spots(1, informative=0)
    stack = fit_stack(spots, Y, groups)
    again = fit_stack(spots, Y, groups, stack)
    np.testing.assert_allclose(again.affine.weight, stack.affine.weight)
    kept = np.flatnonzero(np.arange(len(spots)) % 3 > 0)
    part = fit_stack(spots.take(kept), Y[kept], groups[kept], stack)
    assert part.weights == stack.weights
    assert part.kernels == stack.kernels


def test_with_one_group_of_spots_all_weights_are_equal() -> None:
    spots, Y, _ = _spots(1, informative=0)
    assert fit_stack(spots, Y, np.zeros(len(spots), np.int64)).weights == (0.25,) * 4


def test_the_base_model_that_overfits_most_does_not_win_the_weights() -> None:
    """100 inputs for 240 spots, 20 of them informative: the Gaussian process takes all, the first ridge those 20."""
    for seed in (1, 2):
        spots, Y, groups = _spots(seed, informative=0, dim=20, noise=5.0)
        process, ridge, *_ = fit_stack(spots, Y, groups).weights
        # With predictions of their own training spots it is the other way round: 0.9 for the process.
        assert ridge > 2 * process
