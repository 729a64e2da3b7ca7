import numpy as np
import pytest
from scipy import sparse

from histosge.data.alignment_check import TissueMap, check_alignment
from histosge.data.sections import Spots

WIDTH, HEIGHT, STEP = 5000.0, 4100.0, 50.0
Y, X = np.arange(STEP / 2, HEIGHT, STEP), np.arange(STEP / 2, WIDTH, STEP)
# An L: no symmetry that a swap or a flip could hide behind.
L_SHAPE = ((X[None] > 2300) & (X[None] < 4500) & (Y[:, None] > 1500) & (Y[:, None] < 2100)) | (
    (X[None] > 3700) & (X[None] < 4500) & (Y[:, None] > 1500) & (Y[:, None] < 3900)
)
TISSUE = TissueMap(L_SHAPE, Y, X, (WIDTH, HEIGHT))


def _spots(xy_um: np.ndarray) -> Spots:
    n = len(xy_um)
    return Spots("S", "D", np.array(["b"] * n), xy_um, 55.0, sparse.csr_matrix((n, 3)), ("a", "b", "c"))


def _true() -> np.ndarray:
    grid = np.stack(np.meshgrid(np.arange(0, WIDTH, 90), np.arange(0, HEIGHT, 90)), axis=-1).reshape(-1, 2)
    keep = TISSUE.is_tissue[(grid[:, 1] / STEP).astype(int), (grid[:, 0] / STEP).astype(int)]
    return grid[keep]


def test_spots_on_their_own_tissue_are_ok() -> None:
    report = check_alignment(_spots(_true()), TISSUE)
    assert report.verdict == "ok"
    assert report.share_on_tissue > 0.95
    assert report.message == ""


def test_hires_coordinates_on_a_full_resolution_slide_are_refused_with_the_scale() -> None:
    report = check_alignment(_spots(_true() * 0.17), TISSUE)
    assert report.verdict == "refuse"
    scale = float(report.message.split(" by ")[1].split()[0])
    assert scale == pytest.approx(1 / 0.17, rel=0.05)


def test_swapped_axes_are_named() -> None:
    report = check_alignment(_spots(_true()[:, ::-1]), TISSUE)
    assert report.verdict == "refuse"
    assert "swapping the columns of obsm['spatial'] would put 100%" in report.message


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.6])
def test_another_mpp_is_found_with_its_factor(factor: float) -> None:
    report = check_alignment(_spots(_true() * factor), TISSUE)
    assert report.verdict in ("refuse", "warn")
    scale = float(report.message.split(" by ")[1].split()[0])
    assert scale == pytest.approx(1 / factor, rel=0.05)


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
