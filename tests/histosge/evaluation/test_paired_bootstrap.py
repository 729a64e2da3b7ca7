import numpy as np
import pytest

from histosge.evaluation.paired_bootstrap import HeldOutSpots, PairedBootstrap, ordered_pairs
from histosge.heldout.metric_registry import ScoredSpots
from histosge.heldout.metrics import score_genes

N_SPOTS, N_GENES = 211, 23


def make_spots(
    seed: int = 1, n_spots: int = N_SPOTS, fold: str = "f"
) -> tuple[HeldOutSpots, np.random.Generator]:
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal((n_spots, N_GENES))
    section = np.repeat(["A", "B"], [n_spots // 3, n_spots - n_spots // 3])
    place = np.concatenate([np.arange((section == name).sum()) for name in "AB"])
    genes = tuple(f"G{i}" for i in range(N_GENES))
    depth = rng.integers(211, 997, n_spots).astype(float)
    return HeldOutSpots(fold, 0, genes, truth, depth, section, place), rng


def spots_of(some: HeldOutSpots) -> dict[str, int]:
    return {name: int((some.section == name).sum()) for name in "AB"}


def test_the_first_draw_is_the_score_itself() -> None:
    some, rng = make_spots()
    a, b = some.truth + rng.standard_normal(some.truth.shape), some.truth * 0.1 + rng.random(some.truth.shape)
    a[:, 3] = 0.5
    bootstrap = PairedBootstrap(spots_of(some), draws=17)
    bootstrap.add("a", some, a)
    bootstrap.add("b", some, b)
    spots = ScoredSpots(some.depth, some.section, np.zeros((N_SPOTS, 2)))
    scores = [score_genes(some.truth, guess, spots) for guess in (a, b)]
    rows = {row["metric"]: row for row in bootstrap.table([("a", "b")], "section").rows(named=True)}
    assert rows["pearson_mean"]["difference"] == pytest.approx(
        scores[0].pearson.mean() - scores[1].pearson.mean(), abs=1e-5
    )
    assert rows["pearson_depth_adjusted"]["difference"] == pytest.approx(
        scores[0].pearson_depth_adjusted.mean() - scores[1].pearson_depth_adjusted.mean(), abs=1e-5
    )


def test_a_preset_does_not_differ_from_itself() -> None:
    some, rng = make_spots()
    guess = some.truth + rng.standard_normal(some.truth.shape)
    bootstrap = PairedBootstrap(spots_of(some), draws=97)
    bootstrap.add("a", some, guess)
    bootstrap.add("b", some, guess)
    row = bootstrap.table([("a", "b")], "section").rows(named=True)[0]
    assert row["low"] == row["high"] == row["difference"] == 0


def test_intervals_hold_a_true_difference_about_as_often_as_they_say() -> None:
    held, wide = 0, []
    for seed in range(60):
        some, rng = make_spots(seed)
        bootstrap = PairedBootstrap(spots_of(some), draws=199, seed=seed)
        # Equally good: same signal, noise of its own.
        for name in "ab":
            bootstrap.add(name, some, some.truth + rng.standard_normal(some.truth.shape))
        row = bootstrap.table([("a", "b")], "section").rows(named=True)[0]
        held += row["low"] <= 0 <= row["high"]
        wide.append(row["high"] - row["low"])
    assert 51 <= held <= 60
    assert 0.005 < np.mean(wide) < 0.1


def test_a_real_difference_is_told_from_none() -> None:
    some, rng = make_spots()
    bootstrap = PairedBootstrap(spots_of(some), draws=199)
    bootstrap.add("good", some, some.truth + rng.standard_normal(some.truth.shape))
    bootstrap.add("bad", some, some.truth + 3 * rng.standard_normal(some.truth.shape))
    row = bootstrap.table([("good", "bad")], "section").rows(named=True)[0]
    assert 0 < row["low"] < row["difference"] < row["high"]


def test_pairing_makes_intervals_narrower_than_unpaired_ones() -> None:
    some, rng = make_spots()
    shared = some.truth + 2 * rng.standard_normal(some.truth.shape)
    guesses = {"a": shared, "b": shared + 0.1 * rng.standard_normal(some.truth.shape)}
    widths = []
    for seeds in ((0, 0), (0, 1)):
        parts = []
        for (name, guess), seed in zip(guesses.items(), seeds, strict=True):
            bootstrap = PairedBootstrap(spots_of(some), draws=199, seed=seed)
            bootstrap.add(name, some, guess)
            bootstrap.add("zero", some, np.zeros_like(guess))
            parts.append(bootstrap._values[name]["f", 0][0, 1:])
        widths.append(np.ptp(np.percentile(parts[0] - parts[1], [2.5, 97.5])))
    assert widths[0] < widths[1] / 2


def test_every_pair_comes_once_with_the_shown_preset_first() -> None:
    pairs = ordered_pairs(("dense", "mean", "ridge"), "dense")
    assert pairs == [("dense", "mean"), ("dense", "ridge"), ("ridge", "mean")]
    assert ordered_pairs(("ridge",), "ridge") == []
