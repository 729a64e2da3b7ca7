"""Half widths by predicted depth: chosen only where they score better, and the same in a model, a map and an export."""

import numpy as np
import pytest

from featurestore.grid import GridSpec, PatchGrid
from featurestore.storage.store import StoredGrid
from histosge.calibration.conformal import Intervals, calibrate, coverage, predict_spots
from histosge.calibration.depth_strata import (
    N_STRATA,
    DepthStrata,
    choose_strata,
    interval_score,
    to_stored_precision,
)
from histosge.data.sections import Patches, TrainingSection
from histosge.data.spot_overlap import disc_overlap
from histosge.exporting.open_tables import table_of_map
from histosge.models.registry import load_preset
from histosge.prediction.expression_store import ExpressionStore
from histosge.training.saved_model import SavedModel

LEVEL, GENES = 0.9, 20


def _spots(n: int, spread: float, seed: int) -> tuple[np.ndarray, ...]:
    """Errors whose size falls from shallow to deep by exp(-spread * depth), in four folds."""
    rng = np.random.default_rng(seed)
    depth = rng.normal(8, 1, n)
    guess = np.full((n, GENES), 50, np.float32)
    truth = guess + (rng.standard_normal((n, GENES)) * np.exp(-spread * (depth - 8))[:, None]).astype(
        np.float32
    )
    return truth, guess, depth, np.arange(n) % 4


def test_strata_are_chosen_where_shallow_spots_are_noisier_and_each_third_is_then_covered() -> None:
    truth, guess, depth, fold = _spots(1200, 0.6, 1)
    strata = choose_strata(truth, guess, depth, fold, LEVEL)
    assert strata is not None
    assert strata.half_width.shape == (N_STRATA, GENES)
    assert (np.diff(strata.half_width.mean(axis=1)) < 0).all()
    one = np.full(GENES, np.quantile(np.abs(truth - guess), LEVEL), np.float32)
    chosen = Intervals(one, one, LEVEL, 1200, "section", strata)
    truth, guess, depth, _ = _spots(3000, 0.6, 2)
    third = np.searchsorted(np.quantile(depth, [1 / 3, 2 / 3]), depth)
    for k in range(3):
        here = third == k
        assert coverage(chosen, truth[here], guess[here], depth[here]).mean() == pytest.approx(0.9, abs=0.02)
    # With one width for all, the same spots are covered too rarely where they are shallow.
    assert coverage(chosen, truth[third == 0], guess[third == 0]).mean() < 0.83


def test_one_width_stays_where_noise_does_not_follow_depth_or_spots_are_few() -> None:
    assert all(choose_strata(*_spots(1200, 0.0, seed), LEVEL) is None for seed in range(5))
    assert choose_strata(*_spots(80, 0.6, 1), LEVEL) is None
    truth, guess, depth, fold = _spots(1200, 0.6, 1)
    assert choose_strata(truth, guess, np.full_like(depth, 7.0), fold, LEVEL) is None


def test_depths_that_tie_end_in_one_width_not_in_an_error() -> None:
    for seed in range(4):
        truth, guess, depth, fold = _spots(600, 0.6, seed)
        for alike in (
            8 + 0.004 * np.sign(depth - 8),
            np.where(depth > 9.5, 9.0, 8.0),
            8 + 0.002 * (depth - 8),
        ):
            choose_strata(truth, guess, alike, fold, LEVEL)
        assert choose_strata(truth, guess, np.where(depth > 9.5, 9.0, 8.0), fold, LEVEL) is None


def test_a_stratum_is_the_same_for_a_prediction_and_for_its_map() -> None:
    strata = DepthStrata(np.float32([7.0, 8.0]), np.float32([[3], [2], [1]]))
    depth = np.float32([6.9, 7.0001, 7.01, 8.5])
    np.testing.assert_array_equal(strata.half_width_at(depth), strata.half_width_at(depth.astype(np.float16)))
    assert strata.half_width_at(depth)[:, 0].tolist() == [3, 3, 2, 1]
    assert to_stored_precision(depth)[1] == 7


def test_the_interval_score_is_least_at_the_right_width() -> None:
    error = np.random.default_rng(4).standard_normal((20000, 1)).astype(np.float32) + 50
    guess = np.full_like(error, 50)
    score = {w: float(interval_score(error, guess, np.float32([w]), LEVEL).mean()) for w in (1.2, 1.645, 2.2)}
    assert min(score, key=score.__getitem__) == 1.645


@pytest.mark.parametrize("n_strata", [1, N_STRATA])
def test_intervals_come_back_from_what_is_saved(n_strata: int) -> None:
    one = np.float32([1, 2])
    strata = DepthStrata(np.float32([7, 8]), np.float32([[3, 4], [2, 3], [1, 2]])) if n_strata > 1 else None
    found = Intervals(one, one / 2, LEVEL, 100, "block", strata)
    assert found.config()["depth_strata"] == n_strata
    again = Intervals.from_state(found.config(), found.state())
    depth, values = np.array([6.0, 9.0]), np.full((2, 2), 5, np.float32)
    for bound, expected in zip(again.bounds(values, depth), found.bounds(values, depth), strict=True):
        np.testing.assert_array_equal(bound, expected)
    width = again.take([1]).bounds(values[:, 1:], depth)[1] - values[:, 1:]
    assert width.tolist() == ([[4], [2]] if n_strata > 1 else [[2], [2]])
    before = {key: value for key, value in found.config().items() if key != "depth_strata"}
    assert Intervals.from_state(before, found.state()).strata is None


def _section(seed: int, side: int = 14) -> TrainingSection:
    """Depth follows the first number of the embedding; noise falls with it."""
    rng = np.random.default_rng(seed)
    rows, cols = (a.ravel() for a in np.mgrid[:side, :side])
    embedding = rng.standard_normal((side * side, 4)).astype(np.float32)
    patches = Patches(f"S{seed}", rows, cols, embedding, 100.0, 100.0)
    noise = rng.standard_normal((side * side, GENES)) * np.exp(-0.7 * embedding[:, :1])
    # Small beside the mean: far from 0 and from the largest value that a gene can have.
    target = (5 + 0.1 * (embedding[:, 1:2] + noise)).astype(np.float32)
    overlap = disc_overlap(patches.xy_um, 55.0, patches)
    return TrainingSection(patches, overlap, patches.xy_um, target, np.exp(8 + embedding[:, 0].astype(float)))


def test_calibration_finds_strata_by_the_depth_that_the_model_predicts() -> None:
    fit, sections = load_preset("dense").fit, [_section(seed) for seed in range(4)]
    intervals, model, unseen = calibrate(fit, sections, 55.0), fit(sections), _section(9)
    assert intervals is not None
    assert intervals.strata is not None
    values, depth = predict_spots(model, unseen)
    assert depth is not None
    low = depth < np.quantile(depth, 1 / 3)
    by_depth = coverage(intervals, unseen.target[low], values[low], depth[low]).mean()
    assert by_depth > coverage(intervals, unseen.target[low], values[low]).mean() + 0.03
    found = SavedModel(model, None, "", intervals).predict(unseen.patches)  # type: ignore[arg-type]
    assert found.upper is not None
    width = (found.upper - found.values).mean(axis=1)
    shallow = unseen.patches.embedding[:, 0] < -1
    assert width[shallow].mean() > 1.5 * width[~shallow].mean()
    # A model that predicts no depth has one width.
    ridge = calibrate(load_preset("ridge").fit, sections, 55.0)
    assert ridge is not None
    assert ridge.strata is None


def test_a_map_keeps_strata_reads_bounds_by_its_depth_and_exports_both(tmp_path: object) -> None:
    grid = PatchGrid(GridSpec(0.5, 112, 112), 0.5, 0.5, 2, 2)
    tissue, rgb = np.full((2, 2), 255, np.uint8), np.zeros((2, 2, 3), np.uint8)
    strata = DepthStrata(np.float32([7, 8]), np.float32([[3, 4], [2, 3], [1, 2]]))
    one = np.float32([2, 2.5])
    store = ExpressionStore.open_or_create(f"{tmp_path}/out")
    made = store.add_map(
        StoredGrid("S", grid, tissue, rgb),
        ("A", "B"),
        (2, 2),
        {"model": "m"},
        intervals=Intervals(one, one, LEVEL, 100, "block", strata),
        depth=True,
    )
    (block,) = made.planned()
    assert made.depth is not None
    made.depth.write(block, np.array([[[6.5], [7.5]], [[8.5], [np.nan]]], np.float32))
    made.array.write(block, np.full((2, 2, 2), 10, np.float16))
    stored = ExpressionStore.open(f"{tmp_path}/out").map("S", grid.spec.key)
    values, lower, upper = stored.read_with_bounds((0, 2), (0, 2))
    np.testing.assert_array_equal((upper - values)[..., 0], [[3, 2], [1, 1]])
    np.testing.assert_array_equal((values - lower)[..., 1], [[4, 3], [2, 2]])
    table = table_of_map(stored, ["B"])
    assert [table.per_column[f"half_width_depth_{k}"].tolist() for k in (1, 2, 3)] == [[4], [3], [2]]
    assert table.made_by["half_width_depth_edges"] == "7 8"
