"""Intervals have their nominal coverage on sections that took no part, and trust separates signal from noise."""

from dataclasses import replace

import numpy as np
import pytest

from histosge.calibration.conformal import (
    Intervals,
    calibrate,
    conformal_width,
    coverage,
    held_out_parts,
    pearson_lower_limit,
)
from histosge.data.sections import Patches, TrainingSection
from histosge.data.spot_overlap import disc_overlap, spots_from_patches
from histosge.heldout.splits import default_buffer_um
from histosge.models.registry import load_preset

GENES, NOISE = 30, 11


def _section(seed: int, n_side: int = 14) -> TrainingSection:
    """The first 19 genes follow the embedding, with noise of their own; the last 11 are noise alone."""
    rng, shared = np.random.default_rng(seed), np.random.default_rng(99)
    rows, cols = (a.ravel() for a in np.mgrid[:n_side, :n_side])
    embedding = rng.standard_normal((len(rows), 5))
    patches = Patches(f"S{seed}", rows, cols, embedding.astype(np.float32), 100.0, 100.0)
    xy_um = patches.xy_um
    overlap = disc_overlap(xy_um, 55.0, patches)
    signal = 0.5 * embedding @ shared.standard_normal((5, GENES)) * (np.arange(GENES) < GENES - NOISE)
    target = np.maximum(4 + signal + 0.5 * rng.standard_normal((len(rows), GENES)), 0)
    return TrainingSection(patches, overlap, xy_um, target.astype(np.float32))


def _guess(model: object, section: TrainingSection) -> np.ndarray:
    return spots_from_patches(section.overlap, model.predict(section.patches))  # type: ignore[attr-defined]


@pytest.mark.parametrize("preset", ["ridge", "dense"])
def test_ninety_percent_intervals_cover_ninety_percent_of_sections_that_took_no_part(preset: str) -> None:
    training, fit = [_section(i) for i in range(4)], load_preset(preset).fit
    intervals, model = calibrate(fit, training, 55.0), fit(training)
    assert intervals is not None
    assert (intervals.held_out, intervals.n_spots) == ("section", 4 * 196)
    unseen = [_section(i) for i in (11, 12, 13)]
    truth = np.concatenate([s.target for s in unseen])
    guess = np.concatenate([_guess(model, s) for s in unseen])
    scores = intervals.scores(truth, guess)
    assert scores["coverage_90"] == pytest.approx(0.9, abs=0.02)
    assert coverage(intervals, truth, guess).min() > 0.82


@pytest.mark.parametrize("n_sections", [1, 4])
def test_a_model_that_memorises_its_spots_is_calibrated_on_spots_that_it_was_not_fitted_to(
    n_sections: int,
) -> None:
    """`knn` returns a training spot's own counts, so on its own spots it has no error at all."""
    sections, fit = [_section(i) for i in range(n_sections)], load_preset("knn").fit
    intervals, unseen = calibrate(fit, sections, 55.0), _section(17)
    assert intervals is not None
    assert not intervals.trusted.any()
    guess = _guess(fit(sections), unseen)
    assert intervals.scores(unseen.target, guess)["coverage_90"] > 0.85


@pytest.mark.parametrize("n_sections", [1, 3])
def test_genes_that_are_noise_are_not_trusted_and_genes_that_follow_the_embedding_are(
    n_sections: int,
) -> None:
    intervals = calibrate(load_preset("ridge").fit, [_section(i) for i in range(n_sections)], 55.0)
    assert intervals is not None
    assert intervals.trusted[: GENES - NOISE].mean() >= 0.9
    assert intervals.trusted[GENES - NOISE :].mean() <= 0.1
    assert intervals.held_out == ("block" if n_sections == 1 else "section")
    assert intervals.scope == ("held-out blocks of one section" if n_sections == 1 else "held-out sections")


def test_a_lone_section_is_held_out_in_stripes_that_no_training_patch_touches() -> None:
    section = _section(1)
    buffer_um = default_buffer_um(55.0, section.patches.patch_um)
    parts = list(held_out_parts([section], 55.0))
    assert len(parts) == 4
    for (training,), (testing,) in parts:
        gap = np.linalg.norm(training.spot_xy_um[:, None] - testing.spot_xy_um[None], axis=2).min()
        assert gap >= buffer_um
    assert sum(len(testing.target) for _, (testing,) in parts) == len(section.target)


def test_each_section_is_held_out_once_and_never_trained_on_then() -> None:
    sections = [_section(i, 5) for i in range(6)]
    seen: list[str] = []
    for training, testing in held_out_parts(sections, 55.0):
        names = [s.patches.slide_id for s in testing]
        assert not set(names) & {s.patches.slide_id for s in training}
        seen += names
    assert sorted(seen) == [s.patches.slide_id for s in sections]


def test_the_width_is_the_conformal_rank() -> None:
    error = np.random.default_rng(3).permutation(np.arange(1, 100, dtype=np.float32))[:, None]
    assert conformal_width(error, 0.9)[0] == 90  # ceil(100 x 0.9) of 99
    assert conformal_width(error[:5], 0.9)[0] == error[:5].max()


@pytest.mark.parametrize("n", [10, 19, 20, 57, 100])
def test_a_new_spot_like_the_held_out_ones_is_covered_at_least_as_often_as_promised(n: int) -> None:
    """Each of n + 1 equals is the new one in turn: the share that is covered is exact, not an estimate."""
    errors = np.arange(1, n + 2, dtype=np.float32)
    covered = [errors[i] <= conformal_width(np.delete(errors, i)[:, None], 0.9)[0] for i in range(n + 1)]
    assert 0.9 <= np.mean(covered) <= 0.9 + 1 / (n + 1)


def test_bounds_hold_the_prediction_and_do_not_fall_below_zero() -> None:
    intervals = Intervals(np.array([1, 2], np.float32), np.array([0.5, 0.0], np.float32), 0.9, 100, "block")
    values = np.array([[0.4, 7.0], [np.nan, 1.0]], np.float32)
    lower, upper = intervals.bounds(values)
    np.testing.assert_allclose(lower, [[0, 5], [np.nan, 0]])
    np.testing.assert_allclose(upper, [[1.4, 9], [np.nan, 3]], rtol=1e-6)
    assert intervals.trusted.tolist() == [True, False]
    assert intervals.take([1]).half_width.tolist() == [2]


def test_trust_grows_with_the_number_of_spots() -> None:
    rng = np.random.default_rng(5)
    truth = rng.standard_normal((2000, 1)).astype(np.float32)
    guess = truth + 2 * rng.standard_normal((2000, 1)).astype(np.float32)
    few, many = (pearson_lower_limit(truth[:n], guess[:n], np.zeros(n, np.int64))[0] for n in (40, 2000))
    assert few < many < np.corrcoef(truth[:, 0], guess[:, 0])[0, 1]


def test_too_few_spots_give_no_intervals() -> None:
    section = _section(1, 3)
    few = replace(section.subset(np.arange(9) < 4))
    assert calibrate(load_preset("mean").fit, [few], 55.0) is None
