from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from make_slides import tissue_like, write_pyramid
from scipy import ndimage
from scipy.spatial import ConvexHull

from featurestore.grid import GridSpec, PatchGrid
from featurestore.slides.open_slide import open_slide
from featurestore.tissue.methods.texture import SETTINGS, texture_mask
from featurestore.tissue.overview import read_overview
from featurestore.tissue.survey import patch_means, survey
from featurestore.tissue.threshold import is_tissue

MPP = 2.0


def test_tissue_is_found_on_a_pale_background_with_a_halo(tmp_path: Path) -> None:
    image = tissue_like(1031, 811, MPP)
    overview = read_overview(open_slide(str(write_pyramid(tmp_path / "a.tif", image, MPP))))
    mask = texture_mask(overview.rgb, overview.mpp)
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]] * overview.mpp / MPP
    truth = ((x / 1031 - 0.45) / 0.3) ** 2 + ((y / 811 - 0.55) / 0.3) ** 2 < 1
    assert (mask & truth).sum() / truth.sum() > 0.98
    assert mask.sum() / truth.sum() < 1.2


@pytest.mark.parametrize("side", [40, 700])
def test_a_slide_of_glass_has_no_tissue_and_a_slide_of_tissue_nothing_else(side: int) -> None:
    rng = np.random.default_rng(0)
    glass = np.clip(rng.normal((241, 225, 238), 2, (side, side + 9, 3)), 0, 255).astype(np.uint8)
    tissue = rng.choice([70, 215], (side, side + 9, 1), p=[0.4, 0.6]) * np.array([1.0, 0.75, 0.95])
    assert not texture_mask(glass, 8.0).any()
    assert texture_mask(tissue.astype(np.uint8), 8.0).all()


EARLIER = replace(SETTINGS, cut_ratio=0.0, least_od=1.0)
"""Without a threshold for faint slides: version 1."""


def _painted(strength: float, haze: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Return an overview of 8 microns per pixel with an ellipse of tissue, and where that is."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:307, :401]
    truth = ((x - 190) / 120) ** 2 + ((y - 150) / 90) ** 2 < 1
    # Log-normal, as the local spread of real sections: the faint part of it is what a threshold cuts off.
    density = (
        ndimage.gaussian_filter(rng.normal(size=truth.shape), 1.3)
        * 1.5
        * np.exp(ndimage.gaussian_filter(rng.normal(size=truth.shape), 13) * 14)
    )
    density = (truth * strength * (0.5 + density))[..., None] * np.array([0.6, 1.0, 0.5])
    density += haze * ndimage.gaussian_filter(rng.normal(size=truth.shape), 2.5)[..., None]
    rgb = 240 * np.exp(-density) + rng.normal(0, 0.5, density.shape)
    return np.clip(np.round(rgb), 0, 255).astype(np.uint8), truth


@pytest.mark.parametrize("strength", [0.2, 0.1])
def test_faint_tissue_is_found_whole_where_one_threshold_keeps_its_densest_part(strength: float) -> None:
    rgb, truth = _painted(strength)
    earlier, mask = texture_mask(rgb, 8.0, EARLIER), texture_mask(rgb, 8.0)
    assert (earlier & truth).sum() / truth.sum() < 0.9
    assert (mask & truth).sum() / truth.sum() > 0.95
    assert mask.sum() / truth.sum() < 1.2


def test_usual_tissue_has_the_mask_of_the_earlier_version() -> None:
    rgb, truth = _painted(1.0)
    mask = texture_mask(rgb, 8.0)
    np.testing.assert_array_equal(mask, texture_mask(rgb, 8.0, EARLIER))
    assert (mask & truth).sum() / truth.sum() > 0.95


@pytest.mark.parametrize("haze", [0.02, 0.12, 0.3])
def test_haze_on_glass_is_no_faint_tissue(haze: float) -> None:
    rgb, _ = _painted(0.0, haze)
    assert not texture_mask(rgb, 8.0).any()


def test_means_of_patches_count_fractions_of_pixels() -> None:
    rng = np.random.default_rng(1)
    values = rng.random((41, 53))
    grid = PatchGrid.for_slide((530, 410), 1.0, (1.0,), GridSpec(1.0, 97, 31))
    found = patch_means(values, grid, 0.1)
    fine = np.kron(values, np.ones((10, 10)))
    for row, col in ((0, 0), (grid.n_rows - 1, grid.n_cols - 1), (3, 7)):
        x, y, width, height = grid.region_px((row, row + 1), (col, col + 1))
        assert found[row, col] == pytest.approx(fine[y : y + height, x : x + width].mean())


@pytest.mark.data
@pytest.mark.parametrize("name", ["C2", "C3", "C4"])
def test_measured_spots_are_on_tissue_and_little_else_is(data_dir: Path, name: str) -> None:
    import anndata

    slide = open_slide(str(data_dir / "her2st" / f"{name}.tif"))
    overview = read_overview(slide)
    mask = texture_mask(overview.rgb, overview.mpp)
    xy = anndata.read_h5ad(data_dir / "her2st" / f"{name}.h5ad").obsm["spatial"] * slide.mpp / overview.mpp
    on = mask[xy[:, 1].astype(int), xy[:, 0].astype(int)]
    assert on.mean() >= 0.97
    assert mask.sum() <= 1.4 * ConvexHull(xy[on]).volume
    grid = PatchGrid.for_slide(slide.size_px, slide.mpp, slide.level_mpps, GridSpec(0.7, 320, 80))
    assert 0.15 < is_tissue(survey(slide, grid).tissue).mean() < 0.3


def test_a_survey_in_strips_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_pyramid(tmp_path / "a.tif", tissue_like(700, 600, 0.7), 0.7)
    slide = open_slide(path)
    grid = PatchGrid.for_slide(slide.size_px, slide.mpp, slide.level_mpps, GridSpec(0.9, 53, 3))
    whole = survey(slide, grid)
    monkeypatch.setattr("featurestore.tissue.survey._STRIP_PATCHES", 7 * grid.n_cols + 5)
    strips = survey(slide, grid)
    slide.close()
    assert len(np.unique(whole.tissue)) > 10
    np.testing.assert_array_equal(strips.tissue, whole.tissue)
    np.testing.assert_array_equal(strips.rgb, whole.rgb)
