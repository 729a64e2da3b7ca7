"""Members of the linear part: mixed by what spots left out on_message, between equal weights and the best ones."""

import numpy as np
from numpy.typing import NDArray

from histosge.models.kriging import Measured
from histosge.models.linear_algebra import Floats
from histosge.models.multiscale import VIEWS
from histosge.models.stacking import fit_members

DIM, PATTERNS = 3, 2


def _spots(seed: int, told_by: int) -> tuple[Measured, Floats, NDArray[np.int64]]:
    """Two sections whose patterns one view tells; the other views are noise."""
    rng = np.random.default_rng(seed)
    n = 120
    features = rng.standard_normal((2 * n, DIM * len(VIEWS)))
    weight = np.random.default_rng(9).standard_normal((DIM, PATTERNS))
    told = features[:, told_by * DIM : (told_by + 1) * DIM]
    Y = told @ weight + 0.5 * rng.standard_normal((2 * n, PATTERNS))
    slide = np.repeat([0, 1], n)
    return Measured(slide, rng.uniform(0, 3000, (2 * n, 2)), features), Y, slide


def test_weights_go_to_members_that_predict_spots_left_out() -> None:
    spots, Y, groups = _spots(1, told_by=0)
    mixed = fit_members(spots, Y, groups)
    assert len(mixed.weights) == 4
    assert min(mixed.weights) >= 0
    np.testing.assert_allclose(sum(mixed.weights), 1)
    # The patch itself tells everything: members that see it, the field's and the first ridge, share the weight.
    assert mixed.weights[0] + mixed.weights[1] > 0.9
    spots, Y, groups = _spots(1, told_by=1)
    assert fit_members(spots, Y, groups).weights[2] > 2 * mixed.weights[2]


def test_where_no_member_predicts_anything_weights_stay_about_equal_in_effect() -> None:
    spots, Y, groups = _spots(2, told_by=0)
    noise = np.random.default_rng(3).standard_normal(Y.shape)
    mixed = fit_members(spots, noise, groups)
    other, truth, _ = _spots(4, told_by=0)
    assert np.abs(mixed.affine(other.features)).mean() < 0.25
    np.testing.assert_allclose(sum(mixed.weights), 1)
    assert abs(np.corrcoef(mixed.affine(other.features).ravel(), truth.ravel())[0, 1]) < 0.3


def test_a_mixture_can_be_fitted_like_another() -> None:
    spots, Y, groups = _spots(1, told_by=0)
    mixed = fit_members(spots, Y, groups)
    again = fit_members(spots, Y, groups, mixed)
    np.testing.assert_allclose(again.affine.weight, mixed.affine.weight)
    kept = np.flatnonzero(np.arange(len(spots)) % 3 > 0)
    part = fit_members(spots.take(kept), Y[kept], groups[kept], mixed)
    assert part.weights == mixed.weights
    assert part.kernels == mixed.kernels


def test_spots_of_one_group_are_mixed_equally() -> None:
    spots, Y, _ = _spots(1, told_by=0)
    assert fit_members(spots, Y, np.zeros(len(spots), np.int64)).weights == (0.25,) * 4
