import numpy as np
import pytest

from featurestore.blocks import plan_blocks, planned_blocks

GRID = (7, 13)
BLOCK = (3, 5)


def test_every_patch_is_in_exactly_one_block() -> None:
    writes = np.zeros(GRID, dtype=int)
    for block in plan_blocks(GRID, BLOCK):
        writes[block.slices] += 1
    assert (writes == 1).all()


def test_no_two_blocks_share_an_object() -> None:
    indices = [block.index for block in plan_blocks(GRID, BLOCK)]
    assert len(set(indices)) == len(indices) == 9
    for block in plan_blocks(GRID, BLOCK):
        assert block.index == (block.rows[0] // BLOCK[0], block.cols[0] // BLOCK[1])


def test_a_block_never_reaches_into_its_neighbours_object() -> None:
    for block in plan_blocks(GRID, BLOCK):
        assert block.rows[1] <= (block.index[0] + 1) * BLOCK[0]
        assert block.cols[1] <= (block.index[1] + 1) * BLOCK[1]


def test_blocks_at_the_far_edges_are_smaller() -> None:
    last = list(plan_blocks(GRID, BLOCK))[-1]
    assert last.shape == (1, 3)


def test_a_block_of_no_patches_is_refused() -> None:
    with pytest.raises(ValueError, match="0 x 5"):
        list(plan_blocks(GRID, (0, 5)))


def test_blocks_with_a_single_tissue_patch_are_planned_and_those_without_are_not() -> None:
    is_tissue = np.zeros(GRID, dtype=bool)
    is_tissue[2, 4] = is_tissue[6, 12] = True  # the last patch of the first block, and the grid's last one
    assert [block.index for block in planned_blocks(is_tissue, BLOCK)] == [(0, 0), (2, 2)]
    assert planned_blocks(np.zeros(GRID, dtype=bool), BLOCK) == []
