import numpy as np
import polars as pl
import pytest

from histosge.differences import Bootstrap, Scored
from histosge.metrics import correlate

N, G = 211, 53


def scored(strength: float, seed: int) -> Scored:
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((N, G))
    noise = np.random.default_rng(seed).standard_normal((N, G))
    section = np.where(np.arange(N) < 97, "A", "B")
    spot = np.where(np.arange(N) < 97, np.arange(N), np.arange(N) - 97)
    genes = tuple(f"g{i}" for i in range(G))
    return Scored(genes, truth, strength * truth + noise, rng.uniform(300, 900, N), section, spot)


def compare(first: Scored, second: Scored) -> pl.DataFrame:
    bootstrap = Bootstrap({"A": 97, "B": N - 97})
    bootstrap.add("one", first)
    bootstrap.add("two", second)
    return bootstrap.table(("one", "two"), "section")


def row(table: pl.DataFrame, over: str, metric: str = "pearson_mean") -> dict[str, float]:
    (found,) = table.filter((pl.col("over") == over) & (pl.col("metric") == metric)).iter_rows(named=True)
    return found


def test_the_difference_is_that_of_the_scores_and_lies_in_its_interval() -> None:
    one, two = scored(0.3, 1), scored(0.6, 2)
    table = compare(one, two)
    wanted = [correlate(s.truth, s.predicted, s.section)[0].mean() for s in (one, two)]
    for over in ("genes", "spots", "both"):
        found = row(table, over)
        assert found["difference"] == pytest.approx(wanted[1] - wanted[0], abs=1e-5)
        assert 0 < found["low"] < found["difference"] < found["high"]
    both = row(table, "both")
    assert both["high"] - both["low"] > row(table, "genes")["high"] - row(table, "genes")["low"]


def test_equal_predictors_of_other_noise_differ_by_nothing_that_the_interval_excludes() -> None:
    found = row(compare(scored(0.4, 1), scored(0.4, 2)), "both")
    assert found["low"] < 0 < found["high"]


def test_a_preset_does_not_differ_from_itself() -> None:
    found = row(compare(scored(0.4, 1), scored(0.4, 1)), "both", "pearson_depth_adjusted")
    assert (found["low"], found["difference"], found["high"]) == (0, 0, 0)


def test_constant_predictions_count_as_zero() -> None:
    flat = Scored(
        *(getattr(scored(0.4, 1), name) for name in ("genes", "truth")),
        np.ones((N, G)),
        *(getattr(scored(0.4, 1), name) for name in ("depth", "section", "spot")),
    )
    found = row(compare(flat, scored(0.4, 1)), "both")
    assert found["difference"] == pytest.approx(
        correlate(scored(0.4, 1).truth, scored(0.4, 1).predicted, scored(0.4, 1).section)[0].mean(), abs=1e-5
    )
