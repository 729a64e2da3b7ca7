import numpy as np
import pytest
from scipy import ndimage

from histosge.heldout.spatial_metrics import CUT_SIGMAS, NEIGHBOURS, SIGMA_PITCHES, SpotLattice

N_ROWS, N_COLS, N_GENES = 19, 23, 5
PITCH_UM = 101.0


def lattice_xy(n_rows: int = N_ROWS, n_cols: int = N_COLS) -> np.ndarray:
    rows, cols = (index.ravel() for index in np.indices((n_rows, n_cols)))
    return np.stack([cols, rows], axis=1) * PITCH_UM


def one_section(n: int = N_ROWS * N_COLS) -> np.ndarray:
    return np.full(n, "A")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def smooth(rng: np.random.Generator) -> np.ndarray:
    maps = ndimage.gaussian_filter(rng.standard_normal((N_GENES, N_ROWS, N_COLS)), (0, 3, 3))
    return maps.reshape(N_GENES, -1).T


def test_ssim_is_that_of_the_rasterised_map(rng: np.random.Generator) -> None:
    truth, guess = (rng.random((N_ROWS * N_COLS, N_GENES)) for _ in range(2))
    found = SpotLattice.from_spots(lattice_xy(), one_section()).ssim(truth, guess)
    reach = int(CUT_SIGMAS * SIGMA_PITCHES)
    step = np.arange(-reach, reach + 1)
    square = step[:, None] ** 2 + step**2
    kernel = np.exp(-square / 2 / SIGMA_PITCHES**2) * (square <= (CUT_SIGMAS * SIGMA_PITCHES) ** 2)

    def average(image: np.ndarray) -> np.ndarray:
        there = ndimage.correlate(np.ones_like(image), kernel, mode="constant")
        return ndimage.correlate(image, kernel, mode="constant") / there

    for gene in range(N_GENES):
        a, b = (v[:, gene].reshape(N_ROWS, N_COLS) for v in (truth, guess))
        c1, c2 = (0.01 * np.ptp(a)) ** 2, (0.03 * np.ptp(a)) ** 2
        mean_a, mean_b = average(a), average(b)
        var_a, var_b = average(a**2) - mean_a**2, average(b**2) - mean_b**2
        both = average(a * b) - mean_a * mean_b
        image = (
            (2 * mean_a * mean_b + c1)
            * (2 * both + c2)
            / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
        )
        assert found[gene] == pytest.approx(image.mean())


def test_ssim_is_one_for_the_truth_and_falls_with_noise(rng: np.random.Generator) -> None:
    truth, lattice = smooth(rng), SpotLattice.from_spots(lattice_xy(), one_section())
    np.testing.assert_allclose(lattice.ssim(truth, truth), 1)
    noisy = [lattice.ssim(truth, truth + rng.standard_normal(truth.shape) * s).mean() for s in (0.05, 0.3, 2)]
    assert 1 > noisy[0] > noisy[1] > noisy[2]


def test_a_gene_that_varies_nowhere_has_neither_ssim_nor_moran(rng: np.random.Generator) -> None:
    truth, lattice = smooth(rng), SpotLattice.from_spots(lattice_xy(), one_section())
    truth[:, 3] = 0.7
    assert lattice.ssim(truth, truth)[3] == 0
    assert lattice.moran(truth)[3] == 0
    assert lattice.moran(truth.astype(np.float32).astype(float))[3] == 0


def test_moran_agrees_with_its_definition(rng: np.random.Generator) -> None:
    xy_um, values = rng.uniform(0, 997, (61, 2)), rng.random((61, N_GENES))
    near = np.argsort(((xy_um[:, None] - xy_um) ** 2).sum(axis=2), axis=1)[:, 1 : NEIGHBOURS + 1]
    weight = np.zeros((61, 61))
    np.put_along_axis(weight, near, 1 / NEIGHBOURS, axis=1)
    found = SpotLattice.from_spots(xy_um, one_section(61)).moran(values)
    for gene in range(N_GENES):
        z = values[:, gene] - values[:, gene].mean()
        assert found[gene] == pytest.approx(61 / weight.sum() * (z @ weight @ z) / (z @ z))


def test_moran_is_high_for_smooth_maps_and_near_zero_for_shuffled_ones(rng: np.random.Generator) -> None:
    values, lattice = smooth(rng), SpotLattice.from_spots(lattice_xy(), one_section())
    assert lattice.moran(values).min() > 0.7
    assert np.abs(lattice.moran(values[rng.permutation(len(values))])).max() < 0.15


def test_sections_do_not_see_each_other(rng: np.random.Generator) -> None:
    a, b = smooth(rng), smooth(rng)
    guess_a, guess_b = a + 0.1, b * 0.5
    n = len(a)
    order = rng.permutation(2 * n)
    both = SpotLattice.from_spots(
        np.concatenate([lattice_xy(), lattice_xy()])[order], np.repeat(["A", "B"], n)[order]
    )
    alone = SpotLattice.from_spots(lattice_xy(), one_section())
    together = both.ssim(np.concatenate([a, b])[order], np.concatenate([guess_a, guess_b])[order])
    np.testing.assert_allclose(together, (alone.ssim(a, guess_a) + alone.ssim(b, guess_b)) / 2)
    # A difference between sections is no pattern in space.
    shuffled = [v[rng.permutation(n)] for v in (a, b + 100)]
    assert np.abs(both.moran(np.concatenate(shuffled)[order])).max() < 0.15


def test_a_lone_spot_is_no_error() -> None:
    xy_um = np.array([[0.0, 0.0], [101.0, 0.0], [211.0, 0.0], [0.0, 0.0]])
    lattice = SpotLattice.from_spots(xy_um, np.array(["A", "A", "A", "B"]))
    values = np.array([[1.0], [2.0], [4.0], [7.0]])
    assert np.isfinite([lattice.ssim(values, values), lattice.moran(values)]).all()
