"""Donors of a synthetic cohort: what they change, and what they leave as it was."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from featurestore.slides.open_slide import open_slide
from histosge.data.expression.find_expression import read_expression
from histosge.synthetic import GeneCounts, SyntheticCohort, SyntheticSpec, load_truth, make_cohort
from histosge.synthetic.anatomy import AREAS, MAX_AREA, TISSUES, draw_anatomy
from histosge.synthetic.donors import draw_donor, of_donor
from histosge.synthetic.painting import WHITE
from histosge.synthetic.programme import rates

SPEC = SyntheticSpec(
    size_px=(1301, 1409),
    genes=GeneCounts(morphology=7, gradient=5, noise=3, housekeeping=2),
    spot_diameter_um=29.0,
    spot_pitch_um=53.0,
)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> SyntheticCohort:
    return make_cohort(tmp_path_factory.mktemp("cohort"), SPEC, 4, sections_per_donor=2, donors_differ=True)


def _glass(slide_path: Path) -> np.ndarray:
    slide = open_slide(str(slide_path))
    try:
        return np.median(slide.read_region(0, 0, 40, 40, slide.mpp), axis=(0, 1))
    finally:
        slide.close()


def test_the_same_cohort_and_number_give_the_same_donor_and_others_another() -> None:
    assert draw_donor(SPEC, 1) == draw_donor(replace(SPEC, seed=9), 1)
    assert draw_donor(SPEC, 1) != draw_donor(SPEC, 2)
    assert draw_donor(SPEC, 1) != draw_donor(replace(SPEC, programme_seed=1), 1)


def test_sections_of_one_donor_share_scanner_and_programme(cohort: SyntheticCohort) -> None:
    with cohort.sheet.open() as file:
        donors = [row["donor"] for row in csv.DictReader(file)]
    assert donors == ["D1", "D1", "D2", "D2"]
    glass = [_glass(section.slide) for section in cohort.sections]
    # Eosin on the glass differs from slide to slide, and takes no red.
    assert abs(glass[0][0] - glass[1][0]) < 3
    assert abs(glass[0][0] - glass[2][0]) > 6
    assert abs(glass[0][0] - WHITE[0]) > 6


def test_rates_of_every_donor_sum_to_ten_thousand_and_none_is_negative(cohort: SyntheticCohort) -> None:
    for section in cohort.sections:
        truth = load_truth(section.truth)
        tissue = truth.rates[:, truth.label > 0]
        np.testing.assert_allclose(tissue.sum(axis=0), 10_000, rtol=1e-4)
        assert tissue.min() >= 0


def test_a_donor_s_levels_are_factors_of_the_shared_programme() -> None:
    levels = draw_donor(SPEC, 0)
    flat = replace(
        levels, shares=(1.0,) * 4, levels=tuple((0.5,) * 6 for _ in levels.levels), other_levels=(0.25,) * 8
    )
    anatomy = draw_anatomy(SPEC)
    nuclei = np.full(anatomy.label.shape, 5000, np.float32)
    without = rates(SPEC, anatomy, nuclei)
    found = rates(replace(SPEC, donor=flat), anatomy, nuclei)
    np.testing.assert_allclose(found[:7], 0.5 * without[:7], rtol=1e-5)
    np.testing.assert_allclose(found[7:15], 0.25 * without[7:15], rtol=1e-5)
    assert (found[15:] > without[15:]).all()  # housekeeping genes take what is left


def test_a_donor_s_shares_change_how_much_of_a_tissue_there_is() -> None:
    donor = draw_donor(SPEC, 0)
    share = []
    for factor in (0.4, 2.0):
        anatomy = draw_anatomy(replace(SPEC, donor=replace(donor, shares=(1.0, 1.0, factor, 1.0))))
        share.append((anatomy.label == TISSUES.index("gland")).sum() / anatomy.tissue.sum())
    assert share[1] > 2.5 * share[0] > 0
    assert sum(AREAS) < MAX_AREA < 1


def test_a_donor_s_depth_is_that_of_its_spots() -> None:
    donor = draw_donor(SPEC, 0)
    assert of_donor(SPEC, 0).median_counts == pytest.approx(SPEC.median_counts * donor.depth)


def test_without_donors_sections_are_what_they_were(tmp_path: Path) -> None:
    assert '"donor"' not in SPEC.to_json()
    names_only = make_cohort(tmp_path, SPEC, 1).sections[0]
    counts = read_expression(str(names_only.expression), "S1", "D1", SPEC.mpp).counts
    # As commit 6995a84 made them, which knew no donors: `make_cohort(folder, SPEC, 1)` there.
    assert counts.sum() == 570_567
