"""Synthetic sections: what the tests, the demo and the benchmarks trust must itself be true."""

from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest

from featurestore.slides.open_slide import open_slide
from featurestore.slides.sample_sheet import read_samples
from histosge.data.expression.find_expression import read_expression
from histosge.data.sections import Spots
from histosge.errors import ExpressionError
from histosge.synthetic import (
    GeneCounts,
    SyntheticSection,
    SyntheticSpec,
    Truth,
    load_truth,
    make_cohort,
    make_section,
    truth_at,
)

STEP_UM = 8
SPEC = SyntheticSpec(
    size_px=(1607, 1531),
    mpp=0.5,
    genes=GeneCounts(morphology=7, gradient=5, noise=3, housekeeping=2),
    spot_diameter_um=29.0,
    spot_pitch_um=53.0,
)


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> SyntheticSection:
    return make_section(tmp_path_factory.mktemp("section"), SPEC, slide_id="demo")


@pytest.fixture(scope="module")
def truth(section: SyntheticSection) -> Truth:
    return load_truth(section.truth)


@pytest.fixture(scope="module")
def spots(section: SyntheticSection) -> Spots:
    return read_expression(str(section.expression), "demo", "D1", SPEC.mpp)


@pytest.fixture(scope="module")
def pixels(section: SyntheticSection) -> np.ndarray:
    slide = open_slide(str(section.slide))
    try:
        return slide.read_region(0, 0, *slide.size_px, slide.mpp)
    finally:
        slide.close()


def _files(section: SyntheticSection) -> tuple[Path, Path, Path]:
    return section.slide, section.expression, section.truth


def _mtimes(section: SyntheticSection) -> list[int]:
    return [path.stat().st_mtime_ns for path in _files(section)]


def _log_rates(truth: Truth, family: str) -> np.ndarray:
    """log1p of the rates of a family, ``(gene, y, x)``."""
    return np.log1p(truth.rates[[truth.genes.index(gene) for gene in truth.families[family]]])


def _explained_by_tissue(values: np.ndarray, labels: np.ndarray) -> float:
    """Share of the variance that lies between tissue types (eta squared)."""
    means = np.zeros(7)
    for kind in np.unique(labels):
        means[kind] = values[labels == kind].mean()
    return float(np.var(means[labels]) / np.var(values))


def _neighbours_correlation(image: np.ndarray, tissue: np.ndarray) -> float:
    """Pearson between a position and its right and lower neighbour, over pairs on tissue."""
    across, down = tissue[:, 1:] & tissue[:, :-1], tissue[1:] & tissue[:-1]
    first = np.concatenate([image[:, :-1][across], image[:-1][down]])
    second = np.concatenate([image[:, 1:][across], image[1:][down]])
    return float(np.corrcoef(first, second)[0, 1])


def _lattice_colours(pixels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Mean colour of the pixels of every whole lattice position, ``(n_y, n_x, 3)``."""
    side = round(STEP_UM / SPEC.mpp)
    n_y, n_x = pixels.shape[0] // side, pixels.shape[1] // side
    assert shape[0] - n_y in (0, 1)
    assert shape[1] - n_x in (0, 1)
    return pixels[: n_y * side, : n_x * side].reshape(n_y, side, n_x, side, 3).mean(axis=(1, 3))


def test_the_same_spec_gives_the_same_files(section: SyntheticSection, tmp_path: Path) -> None:
    again = make_section(tmp_path, SPEC, slide_id="demo")
    for first, second in zip(_files(section), _files(again), strict=True):
        assert first.read_bytes() == second.read_bytes(), first.name


def test_another_seed_gives_another_slide_truth_and_counts(
    section: SyntheticSection, truth: Truth, spots: Spots, tmp_path: Path
) -> None:
    other = make_section(tmp_path, replace(SPEC, seed=1), slide_id="demo")
    assert section.slide.read_bytes() != other.slide.read_bytes()
    other_truth = load_truth(other.truth)
    assert other_truth.genes == truth.genes
    assert (other_truth.label != truth.label).mean() > 0.2
    other_spots = read_expression(str(other.expression), "demo", "D1", SPEC.mpp)
    assert not np.array_equal(np.asarray(other_spots.counts.sum(0)), np.asarray(spots.counts.sum(0)))


def test_sections_share_a_programme_by_its_seed_alone(truth: Truth, tmp_path: Path) -> None:
    """Housekeeping genes stand in fixed proportions, which only the programme decides."""

    def proportion(known: Truth) -> float:
        first, second = (known.rates[known.genes.index(g)] for g in known.families["housekeeping"])
        ratio = (first / second)[known.label > 0]
        assert np.ptp(ratio) < 1e-3 * ratio.mean()
        return float(ratio.mean())

    small = replace(SPEC, size_px=(809, 787))
    other_seed = load_truth(make_section(tmp_path / "a", replace(small, seed=5)).truth)
    other_programme = load_truth(make_section(tmp_path / "b", replace(small, programme_seed=5)).truth)
    assert proportion(other_seed) == pytest.approx(proportion(truth), rel=1e-3)
    assert proportion(other_programme) != pytest.approx(proportion(truth), rel=1e-2)


def test_rates_sum_to_ten_thousand_on_tissue_and_are_nan_off_it(truth: Truth) -> None:
    tissue = truth.label > 0
    assert truth.rates.shape == (SPEC.genes.total, *truth.label.shape)
    assert 0.2 < tissue.mean() < 0.9
    np.testing.assert_allclose(truth.rates[:, tissue].sum(axis=0), 10_000, rtol=1e-5)
    assert (truth.rates[:, tissue] >= 0).all()
    assert np.isnan(truth.rates[:, ~tissue]).all()
    assert np.isfinite(truth.depth[tissue]).all()
    assert np.isnan(truth.depth[~tissue]).all()


def test_the_lattice_covers_the_slide(truth: Truth) -> None:
    for centres, side_px in ((truth.y_um, SPEC.size_px[1]), (truth.x_um, SPEC.size_px[0])):
        np.testing.assert_allclose(np.diff(centres), STEP_UM)
        assert centres[0] == STEP_UM / 2
        assert 0 <= centres[-1] + STEP_UM / 2 - side_px * SPEC.mpp < STEP_UM
    assert truth.label.shape == (len(truth.y_um), len(truth.x_um))


def test_every_gene_belongs_to_one_family_of_the_asked_size(truth: Truth, section: SyntheticSection) -> None:
    sizes = {family: len(genes) for family, genes in truth.families.items()}
    assert sizes == {"morphology": 7, "gradient": 5, "noise": 3, "housekeeping": 2}
    assert truth.families == section.families
    assert sorted(gene for genes in truth.families.values() for gene in genes) == sorted(truth.genes)
    assert len(set(truth.genes)) == 17


def test_morphology_genes_follow_the_tissue_and_noise_genes_do_not(truth: Truth) -> None:
    tissue = truth.label > 0
    labels = truth.label[tissue]
    assert len(np.unique(labels)) == 6
    explained = {
        family: [_explained_by_tissue(image[tissue], labels) for image in _log_rates(truth, family)]
        for family in ("morphology", "gradient", "noise")
    }
    assert min(explained["morphology"]) > 0.6
    assert max(explained["gradient"]) < 0.3
    # 5 degrees of freedom over some 5,000 positions: 0.001 by chance.
    assert max(explained["noise"]) < 0.006


def test_noise_genes_have_no_spatial_autocorrelation_and_the_others_have(truth: Truth) -> None:
    tissue = truth.label > 0
    chance = 4 / np.sqrt(2 * tissue.sum())
    for image in _log_rates(truth, "noise"):
        assert abs(_neighbours_correlation(image, tissue)) < chance
    for family in ("morphology", "gradient"):
        for image in _log_rates(truth, family):
            assert _neighbours_correlation(image, tissue) > 0.9


def test_noise_genes_are_independent_of_each_other(truth: Truth) -> None:
    tissue = truth.label > 0
    between = np.corrcoef(_log_rates(truth, "noise")[:, tissue])[np.triu_indices(3, 1)]
    assert np.abs(between).max() < 4 / np.sqrt(tissue.sum())


def test_the_picture_tells_morphology_genes_and_no_noise_gene(truth: Truth, pixels: np.ndarray) -> None:
    colours = _lattice_colours(pixels, truth.label.shape)
    tissue = truth.label[: colours.shape[0], : colours.shape[1]] > 0
    design = np.column_stack([np.ones(tissue.sum()), colours[tissue]])

    def explained(image: np.ndarray) -> float:
        wanted = image[: tissue.shape[0], : tissue.shape[1]][tissue]
        fitted = design @ np.linalg.lstsq(design, wanted, rcond=None)[0]
        return float(np.var(fitted) / np.var(wanted))

    assert np.mean([explained(image) for image in _log_rates(truth, "morphology")]) > 0.2
    assert max(explained(image) for image in _log_rates(truth, "noise")) < 0.006


def test_the_slide_opens_with_its_scale_and_size(section: SyntheticSection) -> None:
    slide = open_slide(str(section.slide))
    try:
        assert slide.size_px == SPEC.size_px
        assert slide.mpp == pytest.approx(SPEC.mpp, rel=1e-4)
        np.testing.assert_allclose(slide.level_mpps[:2], (SPEC.mpp, 2 * SPEC.mpp), rtol=1e-2)
    finally:
        slide.close()


def test_tissue_is_darker_than_the_background_where_the_truth_says_tissue(
    truth: Truth, pixels: np.ndarray
) -> None:
    darkness = 255 - _lattice_colours(pixels, truth.label.shape).mean(axis=2)
    tissue = truth.label[: darkness.shape[0], : darkness.shape[1]] > 0
    assert darkness[tissue].mean() > darkness[~tissue].mean() + 30
    level = (darkness[tissue].mean() + darkness[~tissue].mean()) / 2

    def agreement(mask: np.ndarray) -> float:
        return float(((darkness > level) == mask).mean())

    assert agreement(tissue) > 0.8
    assert agreement(tissue) > max(agreement(tissue[::-1]), agreement(tissue[:, ::-1])) + 0.05


def test_the_pyramid_shows_the_same_picture_at_every_level(
    section: SyntheticSection, pixels: np.ndarray
) -> None:
    slide = open_slide(str(section.slide))
    try:
        half = slide.read_region(0, 0, 803, 765, slide.level_mpps[1]).astype(float)
    finally:
        slide.close()
    means = pixels[:1530, :1606].reshape(765, 2, 803, 2, 3).mean(axis=(1, 3))
    assert np.abs(half - means).mean() < 4


def test_the_expression_reads_with_the_package_s_own_reader(spots: Spots, truth: Truth) -> None:
    assert spots.genes == truth.genes
    assert spots.diameter_um == pytest.approx(29.0)
    assert len(spots) > 100
    assert len(set(spots.barcodes.tolist())) == len(spots)
    pairs = np.linalg.norm(spots.xy_um[:, None] - spots.xy_um[None], axis=2) + 1e9 * np.eye(len(spots))
    np.testing.assert_allclose(np.median(pairs.min(axis=1)), 53.0)
    totals = np.asarray(spots.counts.sum(axis=1)).ravel()
    assert 0.8 < np.median(totals) / SPEC.median_counts < 1.25


def test_spots_lie_on_tissue(spots: Spots, truth: Truth) -> None:
    radius = spots.diameter_um / 2
    offset = np.mgrid[-1:1:41j, -1:1:41j].reshape(2, -1).T
    disc = offset[np.hypot(*offset.T) <= 1] * radius
    places = (spots.xy_um[:, None] + disc[None]) / STEP_UM
    cols, rows = (np.floor(places[..., axis]).astype(int) for axis in (0, 1))
    share = (truth.label[rows, cols] > 0).mean(axis=1)
    assert share.min() > 0.47
    assert share.mean() > 0.9


def test_counts_follow_the_truth_under_the_spots(spots: Spots, truth: Truth) -> None:
    """Fails where x and y are swapped, or where pixels are taken for microns."""
    counts = spots.counts.toarray().astype(float)
    measured = counts / counts.sum(axis=1, keepdims=True) * 10_000
    # A square of the disc's area.
    expected = truth_at(truth, spots.xy_um, spots.diameter_um * np.sqrt(np.pi) / 2)
    for gene in truth.families["morphology"]:
        i = truth.genes.index(gene)
        assert np.corrcoef(np.log1p(measured[:, i]), np.log1p(expected[:, i]))[0, 1] > 0.9
    np.testing.assert_allclose(measured.mean(axis=0), expected.mean(axis=0), rtol=0.1)


def test_the_h5ad_holds_what_scanpy_needs_to_plot_it(section: SyntheticSection, spots: Spots) -> None:
    data = anndata.read_h5ad(section.expression)
    np.testing.assert_allclose(data.obsm["spatial"] * SPEC.mpp, spots.xy_um)
    (library,) = data.uns["spatial"].values()
    hires, factors = library["images"]["hires"], library["scalefactors"]
    assert factors["spot_diameter_fullres"] == pytest.approx(58.0)
    assert hires.shape[1] / factors["tissue_hires_scalef"] == pytest.approx(SPEC.size_px[0])
    assert hires.shape[0] / hires.shape[1] == pytest.approx(SPEC.size_px[1] / SPEC.size_px[0], abs=0.02)
    assert set(data.var["family"]) == {"morphology", "gradient", "noise", "housekeeping"}


def test_truth_at_averages_by_area_over_the_tissue_in_each_square(truth: Truth) -> None:
    """Against brute force on squares of one micron."""
    rng = np.random.default_rng(0)
    fine_label = np.kron(truth.label, np.ones((STEP_UM, STEP_UM), np.uint8))
    gene = 3
    fine = np.kron(np.nan_to_num(truth.rates[gene]), np.ones((STEP_UM, STEP_UM), np.float32)).astype(float)
    corner = rng.integers(0, (len(truth.x_um) * STEP_UM - 46, len(truth.y_um) * STEP_UM - 46), (97, 2))
    found = truth_at(truth, corner + 23.0, 46.0)
    assert found.shape == (97, len(truth.genes))
    seen = 0
    for (x, y), rate in zip(corner, found[:, gene], strict=True):
        square = slice(y, y + 46), slice(x, x + 46)
        tissue = fine_label[square] > 0
        if not tissue.any():
            assert np.isnan(rate)
            continue
        seen += 0 < tissue.mean() < 1
        assert rate == pytest.approx(fine[square][tissue].mean(), rel=1e-4)
    assert seen > 3, "some squares must lie across the edge of the tissue"


def test_truth_at_is_nan_beyond_the_slide(truth: Truth) -> None:
    beyond = np.array([[-500.0, 300.0], [300.0, 5000.0]])
    assert np.isnan(truth_at(truth, beyond, 40.0)).all()


def test_what_is_made_is_not_made_again(tmp_path: Path) -> None:
    small = replace(SPEC, size_px=(809, 787))
    first = make_section(tmp_path, small)
    before = _mtimes(first)
    assert make_section(tmp_path, small) == first
    assert _mtimes(first) == before


@pytest.mark.parametrize("lost", [0, 1, 2], ids=["slide", "expression", "truth"])
def test_what_is_lost_is_made_again_as_it_was(tmp_path: Path, lost: int) -> None:
    small = replace(SPEC, size_px=(809, 787))
    path = _files(make_section(tmp_path, small))[lost]
    whole = path.read_bytes()
    path.unlink()
    make_section(tmp_path, small)
    assert path.read_bytes() == whole


def test_another_spec_under_the_same_name_replaces_the_section(tmp_path: Path) -> None:
    small = replace(SPEC, size_px=(809, 787))
    first = make_section(tmp_path, small)
    before = [path.read_bytes() for path in _files(first)]
    make_section(tmp_path, replace(small, seed=3))
    assert all(path.read_bytes() != old for path, old in zip(_files(first), before, strict=True))


def test_a_cohort_s_sheet_reads_as_a_sample_sheet(tmp_path: Path) -> None:
    small = replace(SPEC, size_px=(809, 787), seed=4)
    cohort = make_cohort(tmp_path, small, 3, sections_per_donor=2)
    rows = read_samples(str(cohort.sheet))
    assert [row.slide_id for row in rows] == ["S1", "S2", "S3"]
    assert [row.donor for row in rows] == ["D1", "D1", "D2"]
    assert {row.mpp for row in rows} == {SPEC.mpp}
    for row, section in zip(rows, cohort.sections, strict=True):
        assert Path(row.slide) == section.slide.resolve()
        assert row.expression == str(section.expression.resolve())
        assert section.families == small.genes.names()
    assert len({section.slide.read_bytes() for section in cohort.sections}) == 3

    before = [_mtimes(section) for section in cohort.sections]
    assert make_cohort(tmp_path, small, 3, sections_per_donor=2) == cohort
    assert [_mtimes(section) for section in cohort.sections] == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"size_px": (101, 1531)}, "101 x 1531 px"),
        ({"size_px": (-7, 1531)}, "-7 x 1531 px"),
        ({"mpp": 0.0}, "0.0 microns per pixel"),
        ({"mpp": 23.0}, "23.0 microns per pixel"),
        ({"mpp": float("nan")}, "nan microns per pixel"),
        ({"spot_diameter_um": 59.0}, "spots of 59 microns every 53"),
        ({"spot_diameter_um": 0.0}, "spots of 0 microns"),
        ({"median_counts": 0.0}, "with 0 counts"),
        ({"region_um": -3.0}, "regions of -3 microns"),
    ],
)
def test_an_absurd_spec_is_refused_in_one_line_with_its_numbers(
    change: dict[str, object], named: str
) -> None:
    with pytest.raises(ExpressionError) as refused:
        replace(SPEC, **change)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "give" in str(refused.value)


@pytest.mark.parametrize("counts", [(-1, 1, 1, 1), (3, 1, -2, 1), (5, 3, 2, 0)])
def test_gene_counts_that_cannot_be_made_are_refused_in_one_line(counts: tuple[int, int, int, int]) -> None:
    with pytest.raises(ExpressionError, match="housekeeping") as refused:
        GeneCounts(*counts)
    assert "\n" not in str(refused.value)


def test_a_slide_on_which_no_spot_finds_tissue_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExpressionError, match="none of 1 spots lies on tissue: give a slide larger than 809"):
        make_section(tmp_path, replace(SPEC, size_px=(809, 787), spot_pitch_um=1009.0))
    assert not list(tmp_path.glob("*.truth.npz"))


def test_a_truth_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExpressionError, match="there is no truth at"):
        load_truth(tmp_path / "demo.truth.npz")
    (tmp_path / "demo.truth.npz").write_text("no truth\n" * 7)
    with pytest.raises(ExpressionError, match="is no truth of a synthetic section"):
        load_truth(tmp_path / "demo.truth.npz")
