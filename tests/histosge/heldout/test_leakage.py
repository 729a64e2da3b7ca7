from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from featurestore.grid import PatchGrid, TokenGridSpec
from histosge.data.sections import Patches, Section, Spots
from histosge.data.spot_overlap import disc_overlap, spot_overlap
from histosge.errors import SplitError
from histosge.evaluation.tasks import Plan
from histosge.heldout.leakage import (
    PatchSplit,
    check_windows_apart,
    select_patches,
    select_spots,
    window_buffer_um,
)
from histosge.heldout.splits import make_folds

STRIDE_UM, PATCH_UM, SPOT_UM, PITCH_UM = 31.0, 83.0, 53.0, 101.0


def make_section(slide_id: str = "A", seed: int = 1) -> Section:
    """Overlapping patches, with holes in the tissue; spots off the patches' lattice."""
    rng = np.random.default_rng(seed)
    rows, cols = (index.ravel() for index in np.indices((67, 53)))
    tissue = rng.random(rows.size) < 0.97
    rows, cols = rows[tissue], cols[tissue]
    patches = Patches(
        slide_id, rows, cols, rng.standard_normal((len(rows), 3), dtype=np.float32), STRIDE_UM, PATCH_UM
    )
    down, across = (index.ravel() for index in np.indices((17, 13)))
    xy_um = np.stack([across, down], axis=1) * PITCH_UM + 211.0 + rng.uniform(-7, 7, (17 * 13, 2))
    counts = rng.poisson(3, (len(xy_um), 5)) + 1
    barcodes = np.array([f"b{i}" for i in range(len(xy_um))])
    spots = Spots(
        slide_id,
        "d",
        barcodes,
        xy_um,
        SPOT_UM,
        sparse.csr_matrix(counts.astype(np.float32)),
        tuple("abcde"),
    )
    return Section(
        patches, spots, disc_overlap(xy_um, SPOT_UM, patches), np.zeros((67, 53, 3), dtype=np.uint8)
    )


SECTION = make_section()
BUFFER_UM = window_buffer_um(SPOT_UM, PATCH_UM, STRIDE_UM)


def pixels(patches: Patches) -> np.ndarray:
    """Paint every micron that patches cover, one row and column at a time."""
    canvas = np.zeros((67 * 31 + 83, 53 * 31 + 83), dtype=bool)
    for row, col in zip(patches.rows, patches.cols, strict=True):
        y, x = int(row * STRIDE_UM), int(col * STRIDE_UM)
        canvas[y : y + 83, x : x + 83] = True
    return canvas


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_pixel_is_seen_by_training_and_by_held_out_spots(seed: int) -> None:
    for task in Plan.from_sections([SECTION], "block", 3).tasks([seed]):
        (trained,) = task.training()
        ((held_out, _),) = task.held_out()
        assert not (pixels(trained.patches) & pixels(held_out.patches)).any()


def test_every_spot_keeps_all_the_patches_under_its_disc() -> None:
    for task in Plan.from_sections([SECTION], "block", 3).tasks([5]):
        (trained,) = task.training()
        ((held_out, target),) = task.held_out()
        np.testing.assert_allclose(np.asarray(trained.overlap.sum(axis=1)), 1, rtol=1e-5)
        np.testing.assert_allclose(np.asarray(held_out.overlap.sum(axis=1)), 1, rtol=1e-5)
        assert len(target) == len(held_out.spots) == task.fold.n_test
        np.testing.assert_array_equal(
            held_out.spots.barcodes, SECTION.spots.barcodes[task.fold.test[SECTION.slide_id]]
        )


def test_the_check_refuses_windows_that_overlap() -> None:
    (fold, *_) = make_folds("block", [SECTION.spots], buffer_um=BUFFER_UM)
    train, test = fold.train["A"], fold.test["A"]
    everything = np.ones(len(SECTION.patches), dtype=bool)
    with pytest.raises(SplitError, match=r"training sees overlap patches of held-out spots"):
        check_windows_apart(SECTION, PatchSplit(everything, everything), train, test, "block0")
    check_windows_apart(SECTION, PatchSplit.from_spots(SECTION, train, test), train, test, "block0")


def test_a_buffer_that_is_too_small_is_refused_not_papered_over() -> None:
    (fold, *_) = make_folds("block", [SECTION.spots], buffer_um=SPOT_UM)
    train, test = fold.train["A"], fold.test["A"]
    with pytest.raises(SplitError, match=rf"widen the buffer to at least {BUFFER_UM:.0f} um"):
        check_windows_apart(SECTION, PatchSplit.from_spots(SECTION, train, test), train, test, "block0")


SQUARE_GEOMETRIES = [
    (bin_um, patch_um, stride_um, offset_um)
    for bin_um in (16.0, 55.0, 100.0, 137.0)
    for patch_um, stride_um in (
        (28.0, 28.0),
        (56.0, 14.0),
        (56.0, 28.0),
        (83.0, 31.0),
        (112.0, 28.0),
        (112.0, 112.0),
    )
    for offset_um in (0.0, 13.7)
    if bin_um > 0.5 * stride_um  # smaller bins are pooled to squares of a stride
]


@pytest.mark.parametrize("geometry", SQUARE_GEOMETRIES)
def test_square_bins_are_split_whatever_their_side_patch_and_step(
    geometry: tuple[float, float, float, float],
) -> None:
    bin_um, patch_um, stride_um, offset_um = geometry
    # Enough for a spot to be trained on beyond the widest buffer.
    side_um = max(10 * (bin_um + patch_um), 900.0)
    rows, cols = (i.ravel() for i in np.indices((int((side_um - patch_um) // stride_um) + 1,) * 2))
    patches = Patches("A", rows, cols, np.zeros((len(rows), 1), np.float32), stride_um, patch_um)
    down, across = (i.ravel() for i in np.indices((int((side_um - patch_um - offset_um) // bin_um),) * 2))
    xy_um = np.stack([across, down], axis=1) * bin_um + patch_um / 2 + bin_um / 2 + offset_um
    counts = np.random.default_rng(1).poisson(3, (len(xy_um), 2)).astype(np.float32)
    barcodes = np.array([f"b{i}" for i in range(len(xy_um))])
    spots = Spots("A", "d", barcodes, xy_um, bin_um, sparse.csr_matrix(counts), ("a", "b"), "square")
    section = Section(patches, spots, spot_overlap(spots, patches), np.zeros((1, 1, 3), np.uint8))
    n_tasks = 0
    for task in Plan.from_sections([section], "block", 2).tasks([0, 1]):
        ((held_out, _),) = task.held_out()
        assert len(held_out.spots) == task.fold.n_test > 0
        n_tasks += 1
    assert n_tasks == 2 * 4


def test_the_buffer_of_squares_reaches_over_their_corners() -> None:
    assert window_buffer_um(16, 56, 28, "square") == pytest.approx(np.sqrt(2) * (16 + 56 + 28))
    assert window_buffer_um(16, 56, 28) == pytest.approx(16 + np.sqrt(2) * (56 + 28))


@pytest.mark.parametrize("split", ["section", "random", "donor"])
def test_other_splits_hide_no_patch(split: str) -> None:
    other = make_section("B", 2)
    other = replace(other, spots=replace(other.spots, donor="e"))
    for task in Plan.from_sections([SECTION, other], split, 3).tasks([0]):
        assert all(
            len(part.patches) in (len(SECTION.patches), len(other.patches)) for part in task.training()
        )


def test_taking_patches_and_spots_keeps_rows_and_columns_together() -> None:
    keep = np.arange(len(SECTION.patches)) % 3 == 1
    some = select_patches(SECTION, keep)
    np.testing.assert_array_equal(some.overlap.toarray(), SECTION.overlap.toarray()[:, keep])
    np.testing.assert_array_equal(some.patches.embedding, SECTION.patches.embedding[keep])
    spots = np.arange(len(SECTION.spots)) % 5 == 2
    few = select_spots(SECTION, spots)
    np.testing.assert_array_equal(few.overlap.toarray(), SECTION.overlap.toarray()[spots])
    np.testing.assert_array_equal(few.spots.xy_um, SECTION.spots.xy_um[spots])
    assert select_patches(SECTION, np.ones(len(SECTION.patches), dtype=bool)) is SECTION


@pytest.mark.parametrize("overlap_px", [0, 20])
def test_no_patch_gives_tokens_to_training_and_to_held_out_spots(overlap_px: int) -> None:
    """A token sees all of its patch, so positions that share no pixel of their own may still share one."""
    spec = TokenGridSpec.from_patches(1.0, 120 + overlap_px, 4, overlap_px=overlap_px)
    grid = PatchGrid.for_slide((1900, 2100), 1.0, (1.0,), spec)
    rows, cols = (index.ravel() for index in np.indices(grid.shape))
    patches = Patches.on_grid("A", grid, rows, cols, np.zeros((len(rows), 3), np.float32))
    assert (patches.patch_um, patches.receptive_um) == (30.0, 240.0 if overlap_px else 120.0)
    spots = SECTION.spots
    section = replace(SECTION, patches=patches, overlap=disc_overlap(spots.xy_um, SPOT_UM, patches))

    def encoded(seen: Patches) -> np.ndarray:
        canvas = np.zeros((2200, 2200), dtype=bool)
        for row, col in {
            (r // 4, c // 4) for r, c in zip(seen.rows.tolist(), seen.cols.tolist(), strict=True)
        }:
            y, x = row * spec.encoded.stride_px, col * spec.encoded.stride_px
            canvas[y : y + spec.encoded.patch_px, x : x + spec.encoded.patch_px] = True
        return canvas

    n_tasks = 0
    for task in Plan.from_sections([section], "block", 3).tasks([0]):
        (trained,) = task.training()
        ((held_out, _),) = task.held_out()
        assert len(held_out.patches) > 0
        assert not (encoded(trained.patches) & encoded(held_out.patches)).any()
        n_tasks += 1
    assert n_tasks == 4
