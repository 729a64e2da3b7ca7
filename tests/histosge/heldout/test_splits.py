from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse
from scipy.spatial.distance import cdist

from histosge.data.sections import Spots
from histosge.errors import SplitError
from histosge.heldout.lattice import lattice_parity
from histosge.heldout.splits import (
    SPLITS,
    Fold,
    block_folds,
    check_apart,
    check_no_leak,
    default_buffer_um,
    make_folds,
)

STEP_UM = 101.0


def make_spots(slide_id: str, n_rows: int = 17, n_cols: int = 13, donor: str = "d1") -> Spots:
    row, col = np.divmod(np.arange(n_rows * n_cols), n_cols)
    return Spots(
        slide_id,
        donor,
        np.array([f"b{i}" for i in range(n_rows * n_cols)]),
        np.stack([col, row], axis=1) * STEP_UM,
        53.0,
        sparse.csr_matrix(np.ones((n_rows * n_cols, 2))),
        ("g0", "g1"),
    )


TWO = [make_spots("A"), make_spots("B", 11, 7, "d2")]


def nearest_um(fold: Fold, spots: Spots) -> float:
    train, test = fold.train[spots.slide_id], fold.test[spots.slide_id]
    return float(cdist(spots.xy_um[train], spots.xy_um[test]).min())


@pytest.mark.parametrize("split", SPLITS)
def test_no_spot_is_trained_on_and_held_out(split: str) -> None:
    for fold in make_folds(split, TWO, seed=3, buffer_um=211):
        for part in TWO:
            assert not (fold.train[part.slide_id] & fold.test[part.slide_id]).any()
        assert fold.n_train > 0
        assert fold.n_test > 0


@pytest.mark.parametrize("split", ["block", "section", "donor", "checkerboard"])
def test_every_spot_is_held_out_exactly_once(split: str) -> None:
    folds = make_folds(split, TWO, buffer_um=211)
    for part in TWO:
        assert (sum(fold.test[part.slide_id].astype(int) for fold in folds) == 1).all()


@pytest.mark.parametrize("buffer_um", [0.0, 149.0, 307.0])
@pytest.mark.parametrize("seed", [0, 5])
def test_no_training_spot_lies_within_the_buffer_and_no_other_is_dropped(buffer_um: float, seed: int) -> None:
    for fold in block_folds(TWO, buffer_um=buffer_um, seed=seed):
        for part in TWO:
            train, test = fold.train[part.slide_id], fold.test[part.slide_id]
            assert nearest_um(fold, part) >= buffer_um
            dropped = ~train & ~test
            if dropped.any():
                assert cdist(part.xy_um[dropped], part.xy_um[test]).min(axis=1).max() < buffer_um


def test_blocks_are_connected_and_of_nearly_equal_size() -> None:
    part = TWO[0]
    for fold in block_folds(TWO, buffer_um=0, seed=2):
        xy = part.xy_um[fold.test["A"]]
        assert abs(len(xy) - len(part) / 4) <= 2
        touching = sparse.csr_matrix(cdist(xy, xy) < 1.5 * STEP_UM)
        assert sparse.csgraph.connected_components(touching)[0] == 1


def test_the_default_buffer_keeps_training_patches_off_the_held_out_discs() -> None:
    spot_um, patch_um = 55.0, 112.0
    # Worst case: a patch that just touches the training disc with one corner reaches towards the other.
    reach = spot_um / 2 + np.sqrt(2) * patch_um
    assert default_buffer_um(spot_um, patch_um) - reach >= spot_um / 2


@pytest.mark.parametrize("split", ["block", "random"])
def test_a_seed_repeats_its_folds_and_another_seed_moves_them(split: str) -> None:
    first, again, other = (make_folds(split, TWO, seed=seed, buffer_um=211) for seed in (1, 1, 2))
    assert all((a.test["A"] == b.test["A"]).all() for a, b in zip(first, again, strict=True))
    assert any((a.test["A"] != b.test["A"]).any() for a, b in zip(first, other, strict=True))


def test_half_of_every_section_is_held_out_at_random() -> None:
    (fold,) = make_folds("random", TWO, seed=0)
    assert [int(fold.test[part.slide_id].sum()) for part in TWO] == [17 * 13 // 2, 11 * 7 // 2]
    assert fold.n_dropped == 0


def test_sections_of_one_donor_are_held_out_together() -> None:
    folds = make_folds("donor", [*TWO, make_spots("C", 5, 3, "d1")])
    assert [fold.name for fold in folds] == ["d1", "d2"]
    assert folds[0].test["A"].all()
    assert folds[0].test["C"].all()
    assert not folds[0].test["B"].any()


def test_one_section_cannot_be_split_by_section_and_the_fix_is_named() -> None:
    with pytest.raises(SplitError, match=r"at least 2 sections, not 1.*--split block"):
        make_folds("section", TWO[:1])


def test_one_donor_cannot_be_split_by_donor_and_the_fix_is_named() -> None:
    with pytest.raises(SplitError, match=r"at least 2 donors, not 1.*--split section"):
        make_folds("donor", [TWO[0], make_spots("B")])


def test_sections_whose_donors_are_not_named_cannot_be_split_by_donor() -> None:
    unnamed = [make_spots(name, donor=name) for name in "ABC"]
    with pytest.raises(SplitError, match=r"names none of its 3 sections'.*--split section"):
        make_folds("donor", unnamed)
    # A sheet that names some says that the others are of other donors.
    assert len(make_folds("donor", [*unnamed, make_spots("D", donor="d1")])) == 4


def test_a_buffer_that_leaves_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(SplitError, match="5000 um leaves no spot"):
        make_folds("block", TWO, buffer_um=5000)


def test_too_few_spots_for_the_blocks_are_refused() -> None:
    with pytest.raises(SplitError, match="has 3 spots, too few for 4 blocks"):
        make_folds("block", [make_spots("A", 3, 1)])
    with pytest.raises(SplitError, match="too few to halve"):
        make_folds("random", [make_spots("A", 1, 1)])


def test_no_section_an_unknown_split_and_a_repeated_slide_are_refused() -> None:
    with pytest.raises(SplitError, match="nothing to split"):
        make_folds("block", [])
    with pytest.raises(SplitError, match=r"'blocks': choose one of block, section"):
        make_folds("blocks", TWO)
    with pytest.raises(SplitError, match="'A' appears 2 times"):
        make_folds("block", [TWO[0], TWO[0]])


def test_the_leak_check_refuses_a_spot_on_both_sides() -> None:
    (fold,) = make_folds("random", TWO)
    leaking = replace(fold, train={**fold.train, "A": fold.train["A"] | (np.arange(17 * 13) == 19)})
    one_of_them = replace(leaking, test={**fold.test, "A": fold.test["A"] | (np.arange(17 * 13) == 19)})
    with pytest.raises(SplitError, match="trains on 1 of its own held-out spots of 'A'"):
        check_no_leak([one_of_them], TWO)


def test_the_leak_check_refuses_a_training_spot_inside_the_buffer() -> None:
    folds = block_folds(TWO, buffer_um=149)
    check_no_leak(folds, TWO, buffer_um=149)
    with pytest.raises(SplitError, match="inside the buffer of 350 um"):
        check_no_leak(folds, TWO, buffer_um=350)


def test_the_leak_check_refuses_folds_that_hold_nothing_out() -> None:
    (fold,) = make_folds("random", TWO)
    none = {slide_id: np.zeros_like(mask) for slide_id, mask in fold.test.items()}
    with pytest.raises(SplitError, match="0 held-out spots"):
        check_no_leak([replace(fold, test=none)], TWO)
    with pytest.raises(SplitError, match="0 training and"):
        check_no_leak([replace(fold, train=none)], TWO)
    with pytest.raises(SplitError, match="there is no fold"):
        check_no_leak([], TWO)


def test_the_leak_check_refuses_masks_of_another_section() -> None:
    (fold,) = make_folds("random", TWO)
    with pytest.raises(SplitError, match="do not fit the 77 spots"):
        check_no_leak([replace(fold, test={**fold.test, "B": fold.test["A"]})], TWO)


def test_a_donor_on_both_sides_is_refused() -> None:
    sections = [make_spots("A"), make_spots("B"), make_spots("C", donor="d2")]
    with pytest.raises(SplitError, match="trains on and holds out donor d1"):
        check_apart(make_folds("section", sections), sections, "donor")


def lattice(kind: str, n_rows: int = 23, n_cols: int = 19) -> tuple[np.ndarray, np.ndarray]:
    """Return positions on a turned and warped lattice of 101 um with a tenth missing, and each one's (row, col)."""
    row, col = np.divmod(np.arange(n_rows * n_cols), n_cols)
    if kind == "hexagonal":
        plane = np.stack([col + 0.5 * (row % 2), row * np.sqrt(3) / 2], axis=1)
    else:
        plane = np.stack([col, row], axis=1).astype(float)
    turn = np.array([[np.cos(0.4), -np.sin(0.4)], [np.sin(0.4), np.cos(0.4)]])
    rng = np.random.default_rng(5)
    # A stretch of 12 % from one end to the other moves the far end by two spots.
    xy = (plane * (1 + 0.06 * plane / plane.max())) @ turn + rng.uniform(-0.05, 0.05, plane.shape)
    keep = rng.random(len(xy)) > 0.1
    return xy[keep] * 101.0, np.stack([row, col], axis=1)[keep]


def test_a_checkerboard_alternates_on_a_turned_and_warped_lattice() -> None:
    xy_um, place = lattice("square")
    found = lattice_parity(xy_um)
    assert found is not None
    expected = place.sum(axis=1) % 2 != place[0].sum() % 2
    np.testing.assert_array_equal(found, expected)


def test_on_a_hexagonal_lattice_four_of_six_neighbours_are_trained_on() -> None:
    xy_um, _ = lattice("hexagonal")
    found = lattice_parity(xy_um)
    assert found is not None
    assert 0.45 < found.mean() < 0.55
    near = (cdist(xy_um, xy_um) < 1.3 * 101) & ~np.eye(len(xy_um), dtype=bool)
    other = near & (found[:, None] != found)
    inner = near.sum(axis=1) == 6
    assert inner.sum() > 100
    assert (other.sum(axis=1)[inner] == 4).all()


def test_parts_that_do_not_touch_each_have_a_checkerboard_of_their_own() -> None:
    xy_um, place = lattice("square")
    away = place[:, 0] > 11
    keep = (place[:, 0] != 11) & (place[:, 0] != 12)
    xy_um = np.where(away[:, None], xy_um + 37.0, xy_um)[keep]
    found, parity = lattice_parity(xy_um), place[keep].sum(axis=1) % 2
    assert found is not None
    for part in (away[keep], ~away[keep]):
        assert len({*(found[part] ^ (parity[part] == 1))}) == 1


def test_spots_on_no_lattice_have_no_checkerboard() -> None:
    spots = make_spots("A")
    scattered = replace(spots, xy_um=np.random.default_rng(3).uniform(0, 1500, spots.xy_um.shape))
    with pytest.raises(
        SplitError, match=r"section 'A' lie on no square or hexagonal lattice.*--split random"
    ):
        make_folds("checkerboard", [scattered])
