"""Products of matrices run on one thread, unless one is so large that all cores pay; threads know the run's choices."""

from contextvars import ContextVar

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from histosge.models.ridge_sums import RidgeSums
from histosge.threads import blas_threads_for, one_blas_thread, prefetch, side_by_side

LARGE, SMALL = 10**10, 10**6


def blas_threads(_: object = None) -> set[int]:
    return {info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas"}


@pytest.fixture(autouse=True)
def three_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("histosge.threads.usable_cores", lambda: 3)


def test_a_large_product_gets_the_cores_and_a_small_one_keeps_one_thread() -> None:
    with threadpool_limits(2, user_api="blas"):
        with one_blas_thread():
            with blas_threads_for(SMALL):
                assert blas_threads() == {1}
            with blas_threads_for(LARGE):
                assert blas_threads() == {3}
            assert blas_threads() == {1}
        assert blas_threads() == {2}


def test_on_one_core_a_large_product_keeps_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("histosge.threads.usable_cores", lambda: 1)
    with one_blas_thread(), blas_threads_for(LARGE):
        assert blas_threads() == {1}


def test_threads_side_by_side_have_one_thread_each() -> None:
    with threadpool_limits(2, user_api="blas"):
        assert set(map(frozenset, side_by_side(blas_threads, range(5), 2))) == {frozenset({1})}


def test_sums_of_many_wide_rows_are_a_large_product(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def seen(multiplications: int) -> object:
        asked.append(multiplications)
        return blas_threads_for(multiplications)

    monkeypatch.setattr("histosge.models.ridge_sums.blas_threads_for", seen)
    X = np.random.default_rng(0).standard_normal((70, 11))
    sums = RidgeSums.from_rows(X, X[:, :3])
    np.testing.assert_allclose(sums.xx, X.T @ X)
    assert asked == [70 * 11**2]


def test_threads_know_what_was_chosen_for_the_run() -> None:
    chosen = ContextVar("chosen", default="nothing")
    token = chosen.set("cuda")
    try:
        assert list(prefetch(lambda _: chosen.get(), range(5), 2)) == ["cuda"] * 5
    finally:
        chosen.reset(token)
