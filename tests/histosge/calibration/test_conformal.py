"""Intervals have their nominal coverage on sections that took no part, and trust separates signal from noise."""

from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest

from histosge.calibration.conformal import Intervals, calibrate, coverage
from histosge.calibration.effective_spots import pearson_lower_limit
from histosge.calibration.held_out_parts import held_out_parts
from histosge.calibration.widths import (
    conformal_width,
    coverage_by_donor,
    donor_weighted_width,
    half_width,
    hierarchical_width,
    least_donors,
    width_method,
)
from histosge.data.sections import Patches, TrainingSection
from histosge.data.spot_overlap import disc_overlap, spots_from_patches
from histosge.heldout.leakage import window_buffer_um
from histosge.models.registry import load_preset

GENES, NOISE = 30, 11
NORMAL = NormalDist()


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
    what = "held-out blocks of one section" if n_sections == 1 else "held-out sections"
    assert intervals.scope == f"{what}, within the training data's donors only (donors not named)"


def test_a_lone_section_is_held_out_in_blocks_and_training_sees_no_pixel_of_their_patches() -> None:
    section = _section(1)
    patches = section.patches
    buffer_um = window_buffer_um(55.0, patches.patch_um, patches.stride_um)
    parts = list(held_out_parts([section], 55.0, ["C"]))
    assert len(parts) == 4
    for part in parts:
        (training,), (testing,) = part.training, part.held_out
        gap = np.linalg.norm(training.spot_xy_um[:, None] - testing.spot_xy_um[None], axis=2).min()
        assert gap >= buffer_um
        apart = np.abs(training.patches.xy_um[:, None] - testing.patches.xy_um[None]).max(axis=2)
        assert apart.min() >= patches.patch_um
        # No spot lost a patch under its disc.
        for some in (training, testing):
            np.testing.assert_allclose(some.overlap.sum(axis=1), 1, atol=1e-6)
    assert sum(len(part.held_out[0].target) for part in parts) == len(section.target)


def test_each_section_is_held_out_once_and_never_trained_on_then() -> None:
    sections = [_section(i, 5) for i in range(6)]
    seen: list[str] = []
    for part in held_out_parts(sections, 55.0, ["C"] * 6):
        names = [s.patches.slide_id for s in part.held_out]
        assert not set(names) & {s.patches.slide_id for s in part.training}
        seen += names
    assert sorted(seen) == [s.patches.slide_id for s in sections]


@pytest.mark.parametrize("donors", ["AABBCC", "ABABAB", "ABCDEA"])
def test_no_donor_is_split_between_training_and_held_out_sections(donors: str) -> None:
    sections = [_section(i, 5) for i in range(6)]
    donor_of = {s.patches.slide_id: donor for s, donor in zip(sections, donors, strict=True)}
    seen: list[str] = []
    for part in held_out_parts(sections, 55.0, list(donors)):
        held_out = [donor_of[s.patches.slide_id] for s in part.held_out]
        assert not set(held_out) & {donor_of[s.patches.slide_id] for s in part.training}
        assert [sorted(set(donors))[number] for number in part.donors] == held_out
        seen += held_out
    assert sorted(seen) == sorted(donors)


def test_the_width_is_the_conformal_rank() -> None:
    error = np.random.default_rng(3).permutation(np.arange(1, 100, dtype=np.float32))[:, None]
    assert conformal_width(error, 0.9)[0] == 90  # ceil(100 x 0.9) of 99
    assert conformal_width(error[:5], 0.9)[0] == error[:5].max()
    # Widths of a cohort's genes are gathered part after part: a view would keep the errors of all its spots.
    assert conformal_width(error, 0.9).base is None


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


def test_nine_donors_are_the_least_of_which_one_in_ten_can_be_told() -> None:
    assert (least_donors(0.9), least_donors(0.8), least_donors(0.95)) == (9, 4, 19)
    methods = [width_method(n, 0.9) for n in (1, 2, 8, 9, 30)]
    assert methods == ["cross-conformal", "donor-weighted", "donor-weighted", "hierarchical", "hierarchical"]


def test_donors_weigh_the_same_however_many_spots_they_have() -> None:
    """One donor has 1,000 spots of small errors, the other 10 of large ones: half of all weight lies on those."""
    error = np.concatenate([np.linspace(0, 1, 1000), np.linspace(10, 19, 10)]).astype(np.float32)[:, None]
    donor = np.repeat([0, 1], [1000, 10])
    assert donor_weighted_width(error, donor, 0.9)[0] == 17  # 0.5 and 8 of 10 of the other half
    assert conformal_width(error, 0.9)[0] < 1
    assert half_width(error, donor, 0.9)[0] == 17
    assert half_width(error, np.zeros(1010, np.int64), 0.9)[0] == conformal_width(error, 0.9)[0]


def test_hierarchical_widths_cover_nine_in_ten_spots_of_nine_in_ten_new_donors() -> None:
    """Donors differ in the size of their errors, so one quantile of all errors covers too few donors."""
    rng = np.random.default_rng(101)
    held, pooled = [], []
    for _ in range(200):
        sizes = np.exp(0.7 * rng.standard_normal(20))
        error = np.abs(rng.standard_normal((19, 50)) * sizes[:19, None]).astype(np.float32).reshape(-1, 1)
        donor = np.repeat(np.arange(19), 50)
        covered = 2 * NORMAL.cdf(hierarchical_width(error, donor, 0.9)[0] / sizes[19]) - 1
        held.append(covered >= 0.9)
        pooled.append(2 * NORMAL.cdf(conformal_width(error, 0.9)[0] / sizes[19]) - 1 >= 0.9)
    # The standard error of 200 draws is 0.02.
    assert np.mean(held) >= 0.86
    assert np.mean(pooled) < 0.8


def test_the_coverage_of_a_donor_is_by_widths_of_the_others() -> None:
    error = np.concatenate([np.full(50, 1.0), np.full(50, 2.0), np.full(50, 3.0)]).astype(np.float32)[:, None]
    found = coverage_by_donor(error, np.repeat([0, 1, 2], 50), 0.9)
    assert found == {0: 1.0, 1: 1.0, 2: 0.0}
    assert coverage_by_donor(error, np.zeros(150, np.int64), 0.9) == {}


@pytest.mark.parametrize(
    ("donors", "method", "scope"),
    [
        ("CCC", "cross-conformal", "held-out sections, within donor C only"),
        ("ABB", "donor-weighted", "held-out donors, empirical, 2 donors"),
        ("ABCDEFGHI", "hierarchical", "held-out donors, 9 donors"),
    ],
)
def test_intervals_say_for_whom_they_hold_also_after_they_were_saved(
    donors: str, method: str, scope: str
) -> None:
    sections = [_section(i, 8) for i in range(len(donors))]
    intervals = calibrate(load_preset("ridge").fit, sections, 55.0, donors=list(donors))
    assert intervals is not None
    assert (intervals.method, intervals.scope) == (method, scope)
    assert sorted(intervals.donor_coverage) == (sorted(set(donors)) if len(set(donors)) > 1 else [])
    again = Intervals.from_state(intervals.config(), intervals.state())
    assert (again.scope, again.claim, again.donor_coverage) == (
        scope,
        intervals.claim,
        intervals.donor_coverage,
    )


def test_intervals_of_earlier_versions_make_no_claim_on_donors_or_smooth_genes() -> None:
    config = {"level": 0.9, "n_spots": 100, "held_out": "section"}
    one = np.ones(3, np.float32)
    old = Intervals.from_state(config, {"calibration.half_width": one, "calibration.trust": one})
    assert "earlier version" in old.scope
    assert "spots as independent" in old.scope
    assert old.claim == "donors not considered"


def test_a_gene_that_fails_in_one_of_eight_donors_is_not_trusted() -> None:
    """In the third donor the first gene goes against the embedding, as it does in no other."""
    sections = [_section(i) for i in range(8)]
    target = sections[2].target.copy()
    target[:, 0] = 8 - target[:, 0]
    sections[2] = replace(sections[2], target=target)
    fit = load_preset("ridge").fit
    one, several = (
        calibrate(fit, sections, 55.0, donors=list(donors)) for donors in ("AAAAAAAA", "ABCDEFGH")
    )
    assert one is not None
    assert several is not None
    # Over all spots it still correlates.
    assert one.trusted[0]
    assert several.trust[0] == 0
    assert several.trusted[1 : GENES - NOISE].mean() >= 0.9


def test_trust_grows_with_the_number_of_spots() -> None:
    rng = np.random.default_rng(5)
    truth = rng.standard_normal((2000, 1)).astype(np.float32)
    guess = truth + 2 * rng.standard_normal((2000, 1)).astype(np.float32)
    xy_um = rng.uniform(0, 4000, (2000, 2))
    few, many = (
        pearson_lower_limit(truth[:n], guess[:n], xy_um[:n], np.zeros(n, np.int64))[0] for n in (40, 2000)
    )
    assert few < many < np.corrcoef(truth[:, 0], guess[:, 0])[0, 1]


def test_too_few_spots_give_no_intervals() -> None:
    section = _section(1, 3)
    few = replace(section.subset(np.arange(9) < 4))
    assert calibrate(load_preset("mean").fit, [few], 55.0) is None
