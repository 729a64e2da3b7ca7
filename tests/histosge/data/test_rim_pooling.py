"""Patches that are mostly background weigh as much as their tissue, and take the pooled value where their own is wanted."""

from dataclasses import replace

import numpy as np
import pytest

from histosge.data.gaussian_pooling import RIM_SHARE, TRUNCATE, gaussian_pool, sum_pooled
from histosge.data.sections import Patches

STRIDE_UM, SIGMA_UM = 31.0, 47.0


def patches(seed: int, shares: tuple[float, ...] = (0.2, 0.4, 0.7, 1.0)) -> Patches:
    rng = np.random.default_rng(seed)
    rows, cols = (at.ravel() for at in np.mgrid[:11, :13])
    keep = rng.random(len(rows)) < 0.8
    rows, cols = rows[keep], cols[keep]
    share = rng.choice(shares, len(rows)).astype(np.float32)
    embedding = rng.standard_normal((len(rows), 6)).astype(np.float32)
    return Patches("A", rows, cols, embedding, STRIDE_UM, 2 * STRIDE_UM, tissue_share=share)


def weighted(of: Patches, values: np.ndarray, power: int = 1) -> np.ndarray:
    """The weighted mean, pair by pair."""
    assert of.tissue_share is not None
    at = np.stack([of.rows, of.cols], axis=1) * STRIDE_UM
    away = np.abs(at[:, None] - at[None])
    near = np.rint(away / STRIDE_UM).max(axis=2) <= np.floor(TRUNCATE * SIGMA_UM / STRIDE_UM)
    weight = np.exp(-(away**2).sum(axis=2) / (2 * SIGMA_UM**2)) * near * of.tissue_share
    return weight @ values.astype(np.float64) ** power / weight.sum(axis=1, keepdims=True)


def test_means_and_deviations_are_weighted_by_the_share_of_tissue() -> None:
    some = patches(1)
    mean, square = weighted(some, some.embedding), weighted(some, some.embedding, 2)
    pooled = gaussian_pool(some, SIGMA_UM)
    np.testing.assert_allclose(pooled[:, :6], mean, atol=2e-5)
    np.testing.assert_allclose(pooled[:, 6:], np.sqrt(square - mean**2), atol=2e-4)


def test_a_patch_at_the_rim_takes_the_pooled_value_in_place_of_its_own() -> None:
    some = patches(2)
    assert some.tissue_share is not None
    rim = some.tissue_share < RIM_SHARE
    assert 0.2 < rim.mean() < 0.8
    found = sum_pooled(some, (0.0, SIGMA_UM))
    own, pooled = some.embedding[:, :3], weighted(some, some.embedding)
    wanted = np.where(rim[:, None], pooled[:, :3], own) + pooled[:, 3:]
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    # Of some patches the same, whatever window they are seen in.
    index = np.arange(17, 40)
    np.testing.assert_allclose(sum_pooled(some, (0.0, SIGMA_UM), index), found[index], atol=2e-6)


@pytest.mark.parametrize("known", [True, False])
def test_whole_patches_are_pooled_to_the_same_bits_whether_or_not_their_share_is_known(known: bool) -> None:
    some = patches(3, (1.0,))
    plain = replace(some, tissue_share=None)
    assert (gaussian_pool(some if known else plain, SIGMA_UM) == gaussian_pool(plain, SIGMA_UM)).all()
    assert (sum_pooled(some, (0.0, SIGMA_UM)) == sum_pooled(plain, (0.0, SIGMA_UM))).all()


def test_windows_of_one_shape_with_other_shares_are_not_mixed_up() -> None:
    """Lattices are kept by the positions of patches: shares are part of what they are kept by."""
    some = patches(4)
    other = replace(some, tissue_share=some.tissue_share[::-1].copy())  # type: ignore[index]
    for each in (some, other, some):
        np.testing.assert_allclose(
            gaussian_pool(each, SIGMA_UM, ("mean",)), weighted(each, each.embedding), atol=2e-5
        )


def test_taking_some_patches_takes_their_shares() -> None:
    some = patches(5)
    taken = some.take(np.array([7, 3, 11]))
    assert some.tissue_share is not None
    assert taken.tissue_share is not None
    assert taken.tissue_share.tolist() == some.tissue_share[[7, 3, 11]].tolist()
    assert (taken.embedding == some.embedding[[7, 3, 11]]).all()
