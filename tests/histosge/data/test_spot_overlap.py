from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from histosge.data.gaussian_pooling import TRUNCATE, gaussian_pool
from histosge.data.sections import Patches
from histosge.data.spot_overlap import (
    disc_overlap,
    find_patches,
    neighbourhood,
    spots_from_patches,
)

STRIDE, PATCH = 50.0, 100.0


def _patches(shape: tuple[int, int] = (9, 11), drop: float = 0.2, dim: int = 3, seed: int = 0) -> Patches:
    rng = np.random.default_rng(seed)
    rows, cols = np.nonzero(rng.random(shape) >= drop)
    embedding = rng.standard_normal((len(rows), dim)).astype(np.float32)
    order = rng.permutation(len(rows))
    return Patches("S", rows[order], cols[order], embedding, STRIDE, PATCH)


def test_a_patch_is_found_at_its_position_and_nowhere_else() -> None:
    patches = _patches()
    rows, cols = (a.ravel() for a in np.meshgrid(np.arange(-2, 12), np.arange(-2, 14), indexing="ij"))
    found = find_patches(patches, rows, cols)
    where = {(r, c): i for i, (r, c) in enumerate(zip(patches.rows, patches.cols, strict=True))}
    assert found.tolist() == [where.get((r, c), -1) for r, c in zip(rows, cols, strict=True)]
    none = Patches("S", rows[:0], cols[:0], np.empty((0, 3), np.float32), STRIDE, PATCH)
    assert (find_patches(none, rows, cols) == -1).all()


@pytest.mark.parametrize("diameter", [20.0, 55.0, 130.0])
def test_weights_are_the_areas_that_a_disc_shares_with_stride_cells(diameter: float) -> None:
    patches = _patches(drop=0.0)
    xy = np.array([[233.0, 251.0], [300.0, 300.0], [270.4, 199.9]])
    weights = disc_overlap(xy, diameter, patches).toarray()
    fine = np.arange(0, 700, 0.5) + 0.25
    x, y = np.meshgrid(fine, fine)
    col = np.floor((x - PATCH / 2) / STRIDE + 0.5).astype(int)
    row = np.floor((y - PATCH / 2) / STRIDE + 0.5).astype(int)
    for spot, (cx, cy) in enumerate(xy):
        inside = (x - cx) ** 2 + (y - cy) ** 2 < (diameter / 2) ** 2
        for patch in range(len(patches)):
            area = (inside & (row == patches.rows[patch]) & (col == patches.cols[patch])).sum()
            assert weights[spot, patch] == pytest.approx(area / inside.sum(), abs=0.006)


def test_weights_are_normalised_over_the_patches_that_exist() -> None:
    patches = _patches(drop=0.5)
    rng = np.random.default_rng(1)
    weights = disc_overlap(rng.uniform(-100, 700, (200, 2)), 55.0, patches)
    sums = np.asarray(weights.sum(axis=1)).ravel()
    assert set(np.round(sums, 9)) == {0.0, 1.0}
    assert (weights.data > 0).all()


@pytest.mark.parametrize("diameter", [0.0, -5.0, float("nan")])
def test_a_disc_without_a_diameter_is_refused(diameter: float) -> None:
    with pytest.raises(ValueError, match="positive diameter"):
        disc_overlap(np.zeros((1, 2)), diameter, _patches())


def test_a_spot_is_the_mean_of_rates_not_of_logarithms() -> None:
    overlap = sparse.csr_matrix(np.array([[0.25, 0.75, 0.0], [0.0, 0.0, 1.0]]))
    logs = np.log1p(np.array([[0.0], [8.0], [3.0]]))
    np.testing.assert_allclose(spots_from_patches(overlap, logs), np.log1p([[6.0], [3.0]]), rtol=1e-6)


@pytest.mark.parametrize("sigma", [30.0, 80.0])
def test_pooling_is_the_gaussian_mean_and_spread_of_what_exists(sigma: float) -> None:
    patches = _patches()
    pooled = gaussian_pool(patches, sigma)
    delta = np.stack([patches.rows, patches.cols]).astype(float)
    delta = (delta[:, :, None] - delta[:, None, :]) * STRIDE
    weight = np.exp(-(delta**2).sum(axis=0) / (2 * sigma**2)) * (abs(delta) <= TRUNCATE * sigma + 1e-6).all(
        axis=0
    )
    weight /= weight.sum(axis=1, keepdims=True)
    mean = weight @ patches.embedding
    spread = np.sqrt(np.maximum(weight @ patches.embedding.astype(float) ** 2 - mean**2, 0))
    np.testing.assert_allclose(pooled, np.hstack([mean, spread]), atol=2e-6)


def test_pooling_a_constant_changes_nothing_at_edges_and_holes() -> None:
    patches = _patches(drop=0.4)
    constant = patches.with_embedding(np.full((len(patches), 2), 7.0, np.float32))
    pooled = gaussian_pool(constant, 80.0)
    np.testing.assert_allclose(pooled[:, :2], 7.0, rtol=1e-6)
    np.testing.assert_allclose(pooled[:, 2:], 0.0, atol=1e-3)


def test_moments_come_in_the_order_asked_for_and_unknown_ones_are_refused() -> None:
    patches = _patches()
    both = gaussian_pool(patches, 80.0)
    np.testing.assert_array_equal(gaussian_pool(patches, 80.0, ("sd", "mean")), np.roll(both, 3, axis=1))
    with pytest.raises(ValueError, match="kurtosis"):
        gaussian_pool(patches, 80.0, ("kurtosis",))
    with pytest.raises(ValueError, match="sigma"):
        gaussian_pool(patches, 0.0)


def test_a_window_spans_the_same_microns_on_any_grid() -> None:
    for stride, shape in ((50.0, (9, 11)), (25.0, (18, 22))):
        patches = Patches(
            "S", *np.nonzero(np.ones(shape)), np.zeros((shape[0] * shape[1], 1), np.float32), stride, 100
        )
        window = neighbourhood(patches, 150.0, 3)
        assert window.index.shape == (len(patches), 49)
        assert np.unique(window.offset_um[:, 0]).tolist() == [-150, -100, -50, 0, 50, 100, 150]
        xy = patches.xy_um
        seen = window.index >= 0
        offset = xy[window.index] - xy[:, None, :]
        np.testing.assert_allclose(offset[seen], np.broadcast_to(window.offset_um, offset.shape)[seen])
        middle = np.flatnonzero((window.offset_um == 0).all(axis=1))
        assert window.index[:, middle].ravel().tolist() == list(range(len(patches)))


def test_a_window_can_be_laid_around_some_patches_only() -> None:
    patches = _patches()
    some = np.array([5, 1, 7])
    np.testing.assert_array_equal(
        neighbourhood(patches, 100.0, 2, some).index, neighbourhood(patches, 100.0, 2).index[some]
    )


def test_a_spot_with_no_patch_under_its_disc_gets_an_empty_row_and_the_others_keep_theirs() -> None:
    patches = _patches()
    near, far = patches.xy_um[13], np.array([5003.0, -701.0])
    both = disc_overlap(np.stack([near, far]), 55.0, patches)
    assert both.shape == (2, len(patches))
    assert both[1].nnz == 0
    np.testing.assert_array_equal(
        both[0].toarray(), disc_overlap(near[None], 55.0, patches).toarray(), strict=True
    )


def test_a_cell_that_a_disc_only_touches_gets_nothing() -> None:
    stride = 56.3
    patches = replace(_patches(shape=(13, 17), drop=0.0), stride_um=stride)
    inner = (abs(patches.rows - 6) < 4) & (abs(patches.cols - 8) < 6)
    for steps in (1, 3, 5):
        weights = disc_overlap(patches.xy_um[inner], steps * stride, patches)
        away = abs(
            np.stack([patches.rows, patches.cols])[:, weights.indices]
            - np.repeat(np.stack([patches.rows, patches.cols])[:, inner], np.diff(weights.indptr), axis=1)
        )
        assert away.max() == steps // 2


def test_pooling_sees_the_patch_at_the_truncation_and_nothing_beyond() -> None:
    patches = _patches(shape=(13, 17), drop=0.0)
    sigma = STRIDE  # TRUNCATE sigmas are then a whole number of patches
    middle = int(find_patches(patches, np.array(6), np.array(8)))
    away = np.maximum(abs(patches.rows - 6), abs(patches.cols - 8))
    before = gaussian_pool(patches, sigma)[middle]
    for steps, seen in ((3, True), (4, False)):
        assert (steps * STRIDE <= TRUNCATE * sigma) is seen
        other = patches.embedding.copy()
        other[away == steps] += 1000
        after = gaussian_pool(patches.with_embedding(other), sigma)[middle]
        assert (after != before).all() if seen else (after == before).all()


def test_pooling_many_features_on_a_large_slide_is_pooling_each_alone() -> None:
    patches = _patches(shape=(7, 5), dim=31)
    # A patch far away makes the rectangle so large that features are pooled in several chunks.
    rows, cols = np.append(patches.rows, 400), np.append(patches.cols, 300)
    embedding = np.concatenate([patches.embedding, np.full((1, 31), 2.0, np.float32)])
    wide = Patches("S", rows, cols, embedding, STRIDE, PATCH)
    together, near = gaussian_pool(wide, 80.0), gaussian_pool(patches, 80.0)
    np.testing.assert_allclose(together[:-1], near, atol=1e-6)  # single precision, summed in another order
    np.testing.assert_allclose(together[-1], np.repeat([2.0, 0.0], 31), atol=1e-6)


def test_pooling_around_some_patches_is_a_part_of_pooling_around_all() -> None:
    rng = np.random.default_rng(5)
    rows, cols = np.nonzero(rng.random((61, 83)) < 0.8)
    embedding = rng.standard_normal((len(rows), 7)).astype(np.float32)
    patches = Patches("s", rows, cols, embedding, 56.0, 112.0)
    some = np.flatnonzero((rows >= 29) & (rows < 53) & (cols >= 40) & (cols < 51))[::-1]
    whole = gaussian_pool(patches, 80.0)
    np.testing.assert_allclose(gaussian_pool(patches, 80.0, of=some), whole[some], rtol=1e-5, atol=1e-6)
    # Each is the weighted mean that its definition says, beyond the edge of a tile too.
    for i in (some[0], 0, len(rows) - 1):
        d = np.stack([rows - rows[i], cols - cols[i]]) * 56.0
        near = (np.abs(d) <= 240.0 + 1e-6).all(axis=0)
        weight = np.exp(-(d[:, near] ** 2).sum(axis=0) / (2 * 80.0**2))
        expected = np.average(embedding[near].astype(float), axis=0, weights=weight)
        np.testing.assert_allclose(whole[i, :7], expected, rtol=1e-5, atol=1e-6)


def test_what_is_kept_of_one_window_serves_none_that_differs() -> None:
    full = _patches(drop=0.0)
    hole = np.flatnonzero((full.rows != 4) | (full.cols != 5))
    holed = replace(full, rows=full.rows[hole], cols=full.cols[hole], embedding=full.embedding[hole])
    twice = [gaussian_pool(patches, 80.0) for patches in (full, holed, full, holed)]
    np.testing.assert_array_equal(twice[0], twice[2])
    np.testing.assert_array_equal(twice[1], twice[3])
    short = replace(holed, rows=holed.rows.astype(np.int32), cols=holed.cols.astype(np.int32))
    np.testing.assert_array_equal(gaussian_pool(short, 80.0), twice[1])
    coarse = replace(holed, stride_um=2 * STRIDE)
    some = np.flatnonzero((holed.rows < 3) & (holed.cols < 3))
    np.testing.assert_allclose(gaussian_pool(holed, 80.0, of=some), twice[1][some], rtol=1e-5, atol=1e-6)
    assert np.abs(gaussian_pool(coarse, 80.0) - twice[1]).max() > 0.1
    # A hole has no weight: next to it the mean is of fewer patches.
    beside = (full.rows == 4) & (full.cols == 6)
    assert np.abs(twice[0][beside] - twice[1][beside[hole]]).max() > 0.01


def test_a_grid_with_an_origin_overlaps_spots_where_its_patches_are() -> None:
    patches = _patches()
    origin = np.array([18.5, 26.5])
    moved = replace(patches, origin_um=tuple(origin))
    np.testing.assert_allclose(moved.xy_um, patches.xy_um + origin)
    xy = np.array([[233.0, 251.0], [300.0, 300.0], [270.4, 199.9]])
    here, there = (disc_overlap(at, 55.0, p).toarray() for at, p in ((xy, patches), (xy + origin, moved)))
    np.testing.assert_allclose(there, here, atol=1e-12)
