"""Spots on a slide, right or misplaced: by their tissue alone, and by tissue and stain."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from scipy import sparse
from scipy.ndimage import gaussian_filter

from histosge.data.alignment_check import AlignmentReport, check_alignment
from histosge.data.placement import AS_GIVEN, MAX_PROFILES, ORIENTATIONS, PlacedSpots, Placement
from histosge.data.sections import Spots
from histosge.data.tissue_map import TissueMap

WIDTH, HEIGHT, STEP, MPP = 5000.0, 4100.0, 50.0, 0.5
Y, X = np.arange(STEP / 2, HEIGHT, STEP), np.arange(STEP / 2, WIDTH, STEP)
SIZE = (WIDTH, HEIGHT)
# An L: no symmetry that a swap or a flip could hide behind.
L_SHAPE = ((X[None] > 2300) & (X[None] < 4500) & (Y[:, None] > 1500) & (Y[:, None] < 2100)) | (
    (X[None] > 3700) & (X[None] < 4500) & (Y[:, None] > 1500) & (Y[:, None] < 3900)
)
TISSUE = TissueMap(L_SHAPE, Y, X, SIZE)
MISPLACED = [o for o in ORIENTATIONS if o != AS_GIVEN]


def _spots(xy_um: np.ndarray, counts: np.ndarray | None = None) -> Spots:
    n = len(xy_um)
    counts = np.zeros((n, 3)) if counts is None else counts
    genes = tuple(f"G{i}" for i in range(counts.shape[1]))
    return Spots("S", "D", np.array(["b"] * n), xy_um, 55.0, sparse.csr_matrix(counts), genes)


def _lattice(tissue: TissueMap, pitch_um: float = 90) -> np.ndarray:
    axes = np.arange(0, WIDTH, pitch_um), np.arange(0, HEIGHT, pitch_um)
    grid = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2)
    return grid[tissue.on_tissue(grid)]


def _true() -> np.ndarray:
    return _lattice(TISSUE)


# A section whose outline hardly changes under a mirror or a turn: only the stain tells how it lies.


def _smooth(seed: int, um: float = 170) -> np.ndarray:
    field = gaussian_filter(np.random.default_rng(seed).standard_normal((len(Y), len(X))), um / STEP)
    return np.asarray(field / field.std())


@cache
def _disc(seed: int = 0) -> tuple[TissueMap, np.ndarray]:
    """Return an almost round section, and its density of nuclei, ``(n_rows, n_cols)``."""
    tissue = np.hypot((X[None] - 2410) / 1570, (Y[:, None] - 2110) / 1490) + 0.02 * _smooth(seed) < 1
    nuclei, eosin = _smooth(seed + 100), _smooth(seed + 200)
    density = np.stack(
        [0.35 + 0.08 * nuclei, 0.45 + 0.08 * nuclei + 0.05 * eosin, 0.2 + 0.05 * eosin], axis=-1
    )
    rgb = np.where(tissue[..., None], 255 * 10 ** -np.clip(density, 0.02, 1), 245)
    return TissueMap(tissue, Y, X, SIZE, rgb.astype(np.uint8)), nuclei


def _section(seed: int = 0, *, follows: bool = True, pitch_um: float = 100, depth: float = 3000) -> Spots:
    """Return spots on the disc whose library size and first genes follow the nuclei, or another field."""
    tissue, nuclei = _disc(seed)
    xy_um = _lattice(tissue, pitch_um)
    rng, field = np.random.default_rng(seed), nuclei if follows else _smooth(seed + 300)
    level = field[tissue.nearest(xy_um)]
    library = depth * np.exp(0.3 * level + 0.25 * rng.standard_normal(len(xy_um)))
    share = np.exp(
        0.4 * level[:, None] * rng.choice((-1, 1), 30) + 0.1 * rng.standard_normal((len(xy_um), 30))
    )
    return _spots(xy_um, rng.poisson(library[:, None] * share / share.sum(axis=1, keepdims=True)))


def _check(spots: Spots, seed: int = 0) -> AlignmentReport:
    return check_alignment(spots, _disc(seed)[0], MPP)


def _placed(spots: Spots, placement: Placement) -> Spots:
    return replace(spots, xy_um=placement.apply(spots.xy_um, SIZE))


def _undone_by(correction: Placement, spots: Spots) -> Spots:
    """Return spots of a slide that was mirrored or turned as a whole: `correction` puts them right."""
    xy_um = spots.xy_um - correction.shift_um
    for axis, mirror in enumerate((correction.mirror_x, correction.mirror_y)):
        if mirror:
            xy_um[:, axis] = SIZE[axis] - xy_um[:, axis]
    return replace(spots, xy_um=xy_um[:, ::-1].copy() if correction.swap else xy_um)


def test_spots_on_their_own_tissue_are_ok() -> None:
    report = check_alignment(_spots(_true()), TISSUE)
    assert report.verdict == "ok"
    assert report.share_on_tissue > 0.95
    assert report.message == ""


def test_hires_coordinates_on_a_full_resolution_slide_are_refused_with_the_scale() -> None:
    report = check_alignment(_spots(_true() * 0.17), TISSUE)
    assert report.verdict == "refuse"
    assert report.better is not None
    assert report.better.scale == pytest.approx(1 / 0.17, rel=0.02)
    assert "they fill a corner of the slide" in report.message


def test_swapped_axes_are_named() -> None:
    report = check_alignment(_spots(_true()[:, ::-1]), TISSUE)
    assert report.verdict == "refuse"
    assert "swapping x and y, (x, y) -> (y, x) in pixels, would put 100% on tissue" in report.message


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.6])
def test_another_mpp_is_found_with_its_factor(factor: float) -> None:
    report = check_alignment(_spots(_true() * factor), TISSUE)
    assert report.verdict == "refuse"
    assert report.better is not None
    assert report.better.scale == pytest.approx(1 / factor, rel=0.02)


def test_spots_off_the_slide_are_refused() -> None:
    report = check_alignment(_spots(_true() + 9000), TISSUE)
    assert report.verdict == "refuse"
    assert "0% on the slide" in report.message


def test_many_spots_beside_the_tissue_get_a_warning_with_their_share() -> None:
    everywhere = np.random.default_rng(0).uniform((0, 0), (WIDTH, HEIGHT), (997, 2))
    mixed = np.concatenate([_true(), everywhere])
    report = check_alignment(_spots(mixed), TISSUE)
    assert report.verdict == "warn"
    assert f"{report.share_on_tissue:.0%} of {len(mixed)} spots lie on tissue" in report.message


@pytest.mark.parametrize("seed", range(3))
def test_spots_whose_counts_follow_the_stain_are_ok(seed: int) -> None:
    report = _check(_section(seed), seed)
    assert (report.verdict, report.message) == ("ok", "")
    assert report.explained > 0.2


@pytest.mark.parametrize("correction", MISPLACED, ids=lambda p: p.describe(1))
def test_an_orientation_that_the_stain_tells_is_refused_and_named(correction: Placement) -> None:
    report = _check(_undone_by(correction, _section()))
    assert report.share_on_tissue > 0.7
    assert report.verdict == "refuse"
    assert report.better == correction


@pytest.mark.parametrize("correction", MISPLACED, ids=lambda p: p.describe(1))
def test_the_formula_of_the_message_gives_the_right_pixels(correction: Placement) -> None:
    right = _section()
    spots = _undone_by(replace(correction, shift_um=(370.0, -410.0)), right)
    formula = _check(spots).message.split(" -> ")[1].split(" in pixels")[0]
    x, y = spots.xy_um.T / MPP
    corrected = np.stack(eval(formula, {"x": x, "y": y}), axis=1)
    assert np.abs(corrected * MPP - right.xy_um).max() < 60


@pytest.mark.parametrize("shift", [(410.0, 370.0), (-350.0, 530.0), (0.0, -670.0)])
def test_a_shift_is_refused_and_named(shift: tuple[float, float]) -> None:
    report = _check(_placed(_section(), Placement(shift_um=shift)))
    assert report.verdict == "refuse"
    assert report.better is not None
    # Scaling about a far corner moves spots by as much; which of both is named does not matter.
    moved = report.better.apply(_section().xy_um + shift, SIZE)
    assert np.abs(moved - _section().xy_um).mean() < 100


def test_a_small_shift_is_a_warning_with_both_scores() -> None:
    report = _check(_placed(_section(), Placement(shift_um=(150.0, -130.0))))
    assert report.verdict == "warn"
    assert report.better_fit is not None
    assert report.better_fit.explained > report.explained + 0.1


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.25])
def test_a_scale_that_leaves_spots_on_tissue_is_refused_with_its_factor(factor: float) -> None:
    spots = _section()
    report = _check(replace(spots, xy_um=spots.xy_um * factor))
    assert report.verdict == "refuse"
    assert report.better is not None
    assert report.better.scale == pytest.approx(1 / factor, rel=0.02)


@pytest.mark.parametrize("seed", range(4))
def test_counts_that_do_not_follow_the_stain_are_not_refused_where_they_lie_on_tissue(seed: int) -> None:
    report = _check(_section(seed, follows=False), seed)
    assert report.verdict in ("ok", "warn")


def test_counts_that_the_stain_says_nothing_about_are_a_warning_with_the_evidence() -> None:
    spots = _section()
    shuffled = np.random.default_rng(3).permutation(len(spots))
    report = _check(replace(spots, counts=spots.counts[shuffled]))
    assert report.verdict == "warn"
    assert "the stain explains 0% of their counts" in report.message


def test_spots_of_another_slide_are_refused_where_few_lie_on_tissue() -> None:
    report = check_alignment(_section(), TissueMap(L_SHAPE, Y, X, SIZE, _disc(1)[0].rgb), MPP)
    assert report.share_on_tissue < 0.5
    assert report.verdict == "refuse"
    assert "they may belong to another slide" in report.message


@pytest.mark.parametrize("seed", range(3))
def test_a_window_of_a_section_is_ok(seed: int) -> None:
    spots = _section(seed)
    keep = (np.abs(spots.xy_um - (2000, 2300)) < 700).all(axis=1)
    part = replace(spots, xy_um=spots.xy_um[keep], counts=spots.counts[keep], barcodes=spots.barcodes[keep])
    assert _check(part, seed).verdict == "ok"


@pytest.mark.parametrize("seed", range(3))
def test_a_mask_that_misses_the_palest_tissue_is_no_reason_to_refuse(seed: int) -> None:
    tissue, nuclei = _disc(seed)
    assert tissue.rgb is not None
    mask = tissue.is_tissue & (nuclei > np.quantile(nuclei[tissue.is_tissue], 0.35))
    report = check_alignment(_section(seed), replace(tissue, is_tissue=mask), MPP)
    assert report.share_on_tissue < 0.75
    assert report.verdict == "warn"
    assert report.better is None


def test_without_a_mask_the_stain_still_tells_a_mirror() -> None:
    tissue = replace(_disc()[0], is_tissue=np.ones_like(L_SHAPE))
    assert check_alignment(_section(), tissue, MPP).verdict == "ok"
    assert check_alignment(_placed(_section(), Placement(mirror_x=True)), tissue, MPP).verdict == "refuse"


def test_bins_of_few_counts_are_added_up() -> None:
    bins = _section(pitch_um=24, depth=40)
    assert len(bins) > MAX_PROFILES
    assert _check(bins).verdict == "ok"
    assert _check(_placed(bins, Placement(mirror_y=True))).verdict == "refuse"


def test_array_rows_and_columns_are_told_from_pixels() -> None:
    spots = _section()
    report = _check(replace(spots, xy_um=np.floor(spots.xy_um / 100) * MPP))
    assert report.verdict == "refuse"
    assert "as array rows and columns would; give positions in pixels" in report.message


def test_a_forced_refusal_is_a_warning_with_the_same_evidence() -> None:
    refused = _check(_placed(_section(), Placement(swap=True)))
    forced = refused.forced()
    assert refused.message.endswith("; correct the positions, or take them as they are with --force")
    assert forced.verdict == "warn"
    assert forced.message.startswith(refused.message.split("; correct")[0])
    assert forced.message.endswith("taken all the same")
    assert forced.forced() is forced


@pytest.mark.parametrize(
    "tissue",
    [
        replace(_disc()[0], rgb=np.zeros((len(Y), len(X), 3), np.uint8)),
        replace(_disc()[0], is_tissue=np.zeros_like(L_SHAPE)),
        TissueMap(np.ones((1, 1), bool), Y[:1], X[:1], SIZE, np.zeros((1, 1, 3), np.uint8)),
    ],
    ids=["one colour", "no tissue", "one patch"],
)
@pytest.mark.parametrize("n", [1, 3, 200])
def test_a_slide_or_spots_without_evidence_get_a_verdict(tissue: TissueMap, n: int) -> None:
    spots = _section()
    few = replace(spots, xy_um=spots.xy_um[:n], counts=spots.counts[:n], barcodes=spots.barcodes[:n])
    assert check_alignment(few, tissue, MPP).verdict in ("ok", "warn", "refuse")
    same = replace(few, xy_um=np.full_like(few.xy_um, 77.0))
    assert check_alignment(same, tissue, MPP).verdict in ("ok", "warn", "refuse")


def test_the_search_and_the_exact_fit_agree() -> None:
    """The search works on a raster, by FFT; what it returns is measured on the patches."""
    spots = _placed(_section(), Placement(swap=True, mirror_y=True, shift_um=(210.0, 130.0)))
    placed = PlacedSpots.from_spots(spots, _disc()[0])
    _, best = placed.candidates()[0]
    right = PlacedSpots.from_spots(_section(), _disc()[0]).fit(AS_GIVEN)
    assert best.on_tissue == pytest.approx(right.on_tissue, abs=0.02)
    assert best.explained == pytest.approx(right.explained, abs=0.04)
