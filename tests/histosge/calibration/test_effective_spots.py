"""Limits count effective spots: against the formula written out, against simulated nulls, and on smooth fields."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from histosge.calibration.conformal import calibrate
from histosge.calibration.effective_spots import SpotPairs, effective_spots, lower_limit, pearson_lower_limit
from histosge.calibration.neighbour_prediction import predict_from_neighbours, remove_explained
from histosge.calibration.trust import OutOfFold, measure_trust
from histosge.data.sections import Patches, TrainingSection
from histosge.data.spot_overlap import disc_overlap
from histosge.heldout.metrics import correlate
from histosge.heldout.smooth_fields import smooth_fields_on_grid
from histosge.models.registry import load_preset

SIDE = 13
ROWS, COLS = (at.ravel() for at in np.mgrid[:SIDE, :SIDE])
XY_UM = np.stack([COLS, ROWS], axis=1) * 100.0
ONE = np.zeros(len(XY_UM), np.int64)


def fields(length: float, n: int, seed: int) -> np.ndarray:
    return smooth_fields_on_grid(ROWS, COLS, length, n, np.random.default_rng(seed)).astype(np.float64)


def written_out(x: np.ndarray, y: np.ndarray, xy_um: np.ndarray) -> float:
    """Equations 2.3 and 2.4 of Clifford, Richardson and Hemon (1989), one pair at a time."""
    n, x, y = len(x), x - x.mean(), y - y.mean()
    strata: dict[int, list[tuple[float, float]]] = {}
    for i in range(n):
        for j in range(n):
            k = 0 if i == j else max(round(float(np.hypot(*(xy_um[i] - xy_um[j]))) / 100), 1)
            strata.setdefault(k, []).append((x[i] * x[j], y[i] * y[j]))
    total = 0.0
    for pairs in strata.values():
        c_x, c_y = np.mean(pairs, axis=0)
        total += len(pairs) * c_x * c_y
    return 1 + (n * x.var() * n * y.var()) / total


def test_the_number_is_that_of_the_formula_written_out() -> None:
    a, b = (
        fields(2.0, 3, 1),
        fields(1.0, 3, 2) + 0.5 * np.random.default_rng(3).standard_normal((len(XY_UM), 3)),
    )
    found = effective_spots(a, b, SpotPairs.from_positions(XY_UM, ONE))
    assert found == pytest.approx([written_out(a[:, i], b[:, i], XY_UM) for i in range(3)], rel=1e-9)
    assert (found < 100).all()


@pytest.mark.parametrize("length", [0.5, 1.5, 3.0])
def test_simulated_independent_fields_have_the_variance_that_the_number_says(length: float) -> None:
    a, b = fields(length, 3000, 11), fields(length, 3000, 12)
    pearson, _ = correlate(a, b, ONE)
    found = effective_spots(a, b, SpotPairs.from_positions(XY_UM, ONE))
    # Removing the mean hides part of a long correlation, so the number is somewhat too large there.
    assert 0.75 * np.var(pearson) < np.median(1 / (found - 1)) < 1.25 * np.var(pearson)


def test_white_values_are_worth_as_many_spots_as_there_are_and_constant_ones_nothing_more() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((2, len(XY_UM), 200))
    pairs = SpotPairs.from_positions(XY_UM, ONE)
    assert np.median(effective_spots(a, b, pairs)) == pytest.approx(len(XY_UM), rel=0.1)
    assert np.isfinite(effective_spots(np.ones_like(a), b, pairs)).all()
    assert lower_limit(np.array([0.99]), np.array([3.0])) == 0


def test_sections_are_independent_of_each_other() -> None:
    a, b = fields(2.0, 50, 21), fields(2.0, 50, 22)
    one = effective_spots(a, b, SpotPairs.from_positions(XY_UM, ONE))
    twice = (np.concatenate([each, each]) for each in (a, b))
    # The same place: only labels keep the pairs of the two apart.
    both = SpotPairs.from_positions(np.tile(XY_UM, (2, 1)), np.repeat([0, 1], len(XY_UM)))
    two = effective_spots(*twice, both)
    np.testing.assert_allclose(two - 1, 2 * (one - 1), rtol=1e-9)


def test_of_many_spots_some_pairs_give_about_the_same_number() -> None:
    rows, cols = (at.ravel() for at in np.mgrid[:60, :60])
    a, b = (
        smooth_fields_on_grid(rows, cols, 2.0, 20, np.random.default_rng(seed)).astype(np.float64)
        for seed in (1, 2)
    )
    xy_um, label = np.stack([cols, rows], axis=1) * 100.0, np.zeros(len(rows), np.int64)
    # As if 30 further sections shared the budget of pairs.
    labels = np.concatenate([label, np.arange(1, 31).repeat(2)])
    more = np.random.default_rng(3).standard_normal((60, 20)) * 1e-9
    few = SpotPairs.from_positions(np.concatenate([xy_um, np.zeros((60, 2))]), labels)
    assert len(few.classes[0][0]) < len(rows) / 5
    found = effective_spots(np.concatenate([a, more]), np.concatenate([b, more]), few)
    every = effective_spots(a, b, SpotPairs.from_positions(xy_um, label))
    assert np.median(found / every) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("length", [1.5, 3.0, 5.0])
def test_smooth_fields_that_have_nothing_in_common_rarely_pass(length: float) -> None:
    a, b = fields(length, 2000, 31), fields(length, 2000, 32)
    passed = (pearson_lower_limit(a, b, XY_UM, ONE) >= 0.1).mean()
    assert passed <= 0.02
    pearson, _ = correlate(a, b, ONE)
    # What independent spots would let pass.
    assert (np.tanh(np.arctanh(pearson) - 2.33 / np.sqrt(len(XY_UM) - 3)) >= 0.1).mean() > 0.05


def test_what_neighbours_tell_is_removed_from_a_field_that_continues_across_a_border() -> None:
    field = fields(4.0, 300, 41)
    training, held_out = COLS < 7, COLS >= 9
    told = predict_from_neighbours(XY_UM[training], field[training], XY_UM[held_out])
    label = ONE[held_out]
    # A model of position: its prediction of held-out spots is a smoothed copy of the training spots.
    guess = sum(told) / len(told)
    assert np.median(correlate(field[held_out], guess, label)[0]) > 0.5
    rest, of_guess = (remove_explained(values, told, label) for values in (field[held_out], guess))
    assert np.abs(of_guess).max() < 1e-6
    for part in told:
        assert np.abs((rest * (part - part.mean(axis=0))).sum(axis=0)).max() < 1e-6 * len(rest)


def test_a_prediction_from_position_alone_earns_no_trust() -> None:
    """Alternate columns are held out, so that every held-out spot has neighbours that were trained on."""
    field = fields(1.0, 200, 43)
    training, held_out = COLS % 2 == 0, COLS % 2 == 1
    told = predict_from_neighbours(XY_UM[training], field[training], XY_UM[held_out])
    guess = told[0] + 0.3 * np.random.default_rng(5).standard_normal(told[0].shape)
    label, truth = ONE[held_out], field[held_out].astype(np.float32)
    spots = OutOfFold(truth, guess.astype(np.float32), XY_UM[held_out], label, label, label)
    assert (measure_trust(spots) >= 0.1).mean() > 0.9
    assert (measure_trust(replace(spots, from_neighbours=told)) >= 0.1).mean() <= 0.02


def smooth_section(seed: int, length: float, n_fields: int) -> TrainingSection:
    """Smooth embeddings, ten smooth genes that follow them, and fields that have nothing to do with them."""
    rng = np.random.default_rng(seed)
    embedding = smooth_fields_on_grid(ROWS, COLS, 1.0, 8, rng)
    patches = Patches(f"S{seed}", ROWS, COLS, embedding, 100.0, 100.0)
    own = embedding @ np.random.default_rng(99).standard_normal((8, 10)) / 3
    noise = 0.3 * rng.standard_normal((len(XY_UM), 10 + n_fields))
    target = 4 + np.hstack([own, smooth_fields_on_grid(ROWS, COLS, length, n_fields, rng)]) + noise
    overlap = disc_overlap(patches.xy_um, 55.0, patches)
    assert isinstance(overlap, sparse.csr_matrix)
    return TrainingSection(patches, overlap, patches.xy_um, target.astype(np.float32))


@pytest.mark.parametrize("n_sections", [1, 3])
@pytest.mark.parametrize("preset", ["ridge", "dense"])
def test_smooth_genes_that_the_picture_does_not_show_are_not_trusted(preset: str, n_sections: int) -> None:
    sections = [smooth_section(seed, 3.0, 100) for seed in range(n_sections)]
    intervals = calibrate(load_preset(preset).fit, sections, 55.0)
    assert intervals is not None
    assert intervals.trusted[10:].mean() <= 0.03
    if preset == "ridge":
        assert intervals.trusted[:10].mean() >= 0.9
