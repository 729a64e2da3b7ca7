"""Ridge from sums over rows, compared with scikit-learn's on the rows themselves."""

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import Ridge

from histosge.models.linear_algebra import shifted_solve
from histosge.models.ridge_sums import PENALTIES, RidgeSolver, RidgeSums, choose_penalties, total

ROWS, DIM, OUTPUTS = 113, 17, 3


def _rows(seed: int, n: int = ROWS, noise: float = 0.5) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, DIM)) * np.linspace(0.2, 3, DIM) + 7
    W = np.random.default_rng(99).standard_normal((DIM, OUTPUTS))
    return X, X @ W + noise * rng.standard_normal((n, OUTPUTS)) - 11


@pytest.mark.parametrize("n", [ROWS, DIM - 6])
def test_the_solution_is_that_of_scikit_learn(n: int) -> None:
    X, Y = _rows(1, n)
    sums = total(RidgeSums.from_rows(X[start::3], Y[start::3]) for start in range(3))
    alpha = 0.3 * ((X - X.mean(axis=0)) ** 2).sum(axis=1).mean()
    oracle = Ridge(alpha=alpha).fit(X, Y)
    ours = RidgeSolver.from_sums(sums).solve(0.3)
    np.testing.assert_allclose(ours.weight, oracle.coef_.T, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(ours.offset, oracle.intercept_, rtol=1e-7)


def test_a_group_is_taken_out_of_the_sums_exactly() -> None:
    (X, Y), (other_X, other_Y) = _rows(1), _rows(2)
    ours, other = RidgeSums.from_rows(X, Y), RidgeSums.from_rows(other_X, other_Y)
    left = RidgeSolver.from_sums(ours + other - other).solve(0.1)
    alone = RidgeSolver.from_sums(ours).solve(0.1)
    np.testing.assert_allclose(left.weight, alone.weight, rtol=1e-9)


def test_the_error_of_a_group_follows_from_its_sums_and_ignores_its_level() -> None:
    X, Y = _rows(1)
    held_X, held_Y = _rows(2)
    fit = RidgeSolver.from_sums(RidgeSums.from_rows(X, Y)).solve(1.0)
    residual = held_Y - fit(held_X)
    expected = ((residual - residual.mean(axis=0)) ** 2).sum(axis=0)
    for shift in (0.0, 5.0):
        ours = RidgeSums.from_rows(held_X, held_Y + shift).error_within(fit)
        np.testing.assert_allclose(ours, expected, rtol=1e-8)


def test_penalties_are_those_with_the_least_error_on_groups_left_out() -> None:
    parts = [_rows(seed, 23, noise=9.0) for seed in range(4)]
    sums = [RidgeSums.from_rows(*part) for part in parts]
    chosen = choose_penalties(sums, [slice(0, 2), slice(2, 3)])
    errors = np.zeros((len(PENALTIES), OUTPUTS))
    for k, (held_X, held_Y) in enumerate(parts):
        X, Y = (np.concatenate([part[i] for j, part in enumerate(parts) if j != k]) for i in (0, 1))
        length = ((X - X.mean(axis=0)) ** 2).sum(axis=1).mean()
        for i, penalty in enumerate(PENALTIES):
            residual = held_Y - Ridge(alpha=penalty * length).fit(X, Y).predict(held_X)
            errors[i] += ((residual - residual.mean(axis=0)) ** 2).sum(axis=0)
    expected = [PENALTIES[errors[:, :2].sum(axis=1).argmin()]] * 2 + [PENALTIES[errors[:, 2].argmin()]]
    np.testing.assert_array_equal(chosen.penalties, expected)
    X, Y = (np.concatenate([part[i] for part in parts[1:]]) for i in (0, 1))
    alone = RidgeSolver.from_sums(RidgeSums.from_rows(X, Y)).solve(chosen.penalties)
    np.testing.assert_allclose(chosen.without[0].weight, alone.weight, rtol=1e-8)


@pytest.mark.parametrize("dim", [1, 5, 64, 65, 200])
def test_a_triangle_of_sums_is_restored_to_the_bit(dim: int) -> None:
    X, Y = np.random.default_rng(dim).standard_normal((30, dim)), np.ones((30, 2))
    sums = RidgeSums.from_rows(X, Y)
    arrays = sums.arrays()
    # Row by row from the diagonal on, as sums that are kept with models have it.
    np.testing.assert_array_equal(arrays["xx"], sums.xx[np.triu_indices(dim)])
    upper = np.triu(sums.xx)
    np.testing.assert_array_equal(RidgeSums.from_arrays(arrays).xx, upper + np.triu(upper, 1).T)


def test_sums_of_shifted_and_scaled_inputs_are_those_of_their_rows() -> None:
    X, Y = _rows(3)
    shift, by = X.mean(axis=0) + 0.3, np.linspace(0.0, 2.0, DIM)
    found, wanted = (
        RidgeSums.from_rows(X, Y).mapped(shift, by),
        RidgeSums.from_rows((X - shift) * by, Y),
    )
    for name, array in found.arrays().items():
        np.testing.assert_allclose(array, wanted.arrays()[name], rtol=1e-9, atol=1e-8)


def test_a_path_has_each_output_with_its_own_penalty() -> None:
    X, Y = _rows(4)
    solver = RidgeSolver.from_sums(RidgeSums.from_rows(X, Y))
    mixed = [np.array([0.1, 3.0, 0.1]), np.array([3.0, 3.0, 50.0])]
    for fit, penalties in zip(solver.path(mixed), mixed, strict=True):
        for output, penalty in enumerate(penalties.tolist()):
            alone = solver.solve(penalty)
            np.testing.assert_allclose(fit.weight[:, output], alone.weight[:, output], rtol=1e-10)
            np.testing.assert_allclose(fit.offset[output], alone.offset[output], rtol=1e-10)


@pytest.mark.parametrize("n", [1, 95, 96, 97, 300])
def test_a_shifted_solution_is_that_of_lapack(n: int) -> None:
    rng = np.random.default_rng(n)
    rows, right = rng.standard_normal((n + 5, n)), rng.standard_normal((n, 4))
    matrix = rows.T @ rows
    before = matrix.copy()
    found = shifted_solve(matrix, 0.3, right)
    np.testing.assert_allclose(found, np.linalg.solve(matrix + 0.3 * np.eye(n), right), rtol=1e-8, atol=1e-10)
    np.testing.assert_array_equal(matrix, before)


def test_a_shift_below_the_rounding_of_a_matrix_still_gives_a_solution() -> None:
    vector = np.linspace(1, 2, 7)
    matrix = np.outer(vector, vector)
    # Rounding has left a value below 0, where a matrix of products cannot have one.
    matrix -= 1e-13 * np.eye(7)
    found = shifted_solve(matrix, 1e-14, vector[:, None])
    np.testing.assert_allclose(matrix @ found, vector[:, None], rtol=1e-6)
    # Along a direction that only rounding fills, it has the sign of a positive definite matrix.
    across = np.eye(7)[0] - vector[0] * vector / (vector @ vector)
    assert across @ shifted_solve(matrix, 1e-14, across[:, None])[:, 0] > 0


def test_one_group_or_constant_inputs_give_a_finite_fit() -> None:
    X, Y = _rows(1)
    chosen = choose_penalties([RidgeSums.from_rows(X, Y)], [slice(0, OUTPUTS)])
    assert chosen.without == []
    assert np.isfinite(chosen.penalties).all()
    flat = RidgeSolver.from_sums(RidgeSums.from_rows(np.full_like(X, 3.0), Y)).solve(1.0)
    np.testing.assert_allclose(flat(X), np.broadcast_to(Y.mean(axis=0), Y.shape), atol=0.01)
