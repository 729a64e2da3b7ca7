"""Windows of a slide: every stored block is read once, however many windows it is in."""

from pathlib import Path

import numpy as np
import pytest
from _stores import Made, write_store

from featurestore.blocks import Block
from featurestore.errors import StoreError
from featurestore.storage.block_array import BlockArray
from histosge.data.embedded_slide import Reduce, load_patches, open_embedded, stream_windows

MADE = Made((23, 29), 13, (5, 7), frame=1)


def _first_three(embedding: np.ndarray) -> np.ndarray:
    return embedding[:, :3] + np.float32(1)


@pytest.mark.parametrize("reduce", [None, _first_three], ids=["whole", "reduced"])
def test_each_block_is_read_once_for_all_windows_that_it_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reduce: Reduce | None
) -> None:
    slide = open_embedded(write_store(tmp_path / "store", 1, MADE), "S00", None, None)
    whole = load_patches(slide)
    expected = whole.embedding if reduce is None else reduce(whole.embedding)
    read: list[Block] = []
    real = BlockArray.read_block

    def read_block(self: BlockArray, block: Block) -> np.ndarray:
        read.append(block)
        return real(self, block)

    monkeypatch.setattr(BlockArray, "read_block", read_block)
    planned = slide.stored.planned(slide.array.block_shape)
    seen = 0
    for window in stream_windows(slide, planned, 6 * slide.stored.grid.stride_um, reduce):
        (rows, cols), patches = window.block.slices, window.patches
        near = (whole.rows >= rows.start - 6) & (whole.rows < rows.stop + 6)
        near &= (whole.cols >= cols.start - 6) & (whole.cols < cols.stop + 6)
        order = np.lexsort((patches.cols, patches.rows))
        at = np.flatnonzero(near)[np.lexsort((whole.cols[near], whole.rows[near]))]
        assert np.array_equal(patches.embedding[order], expected[at])
        seen += int(window.own.sum())
    assert seen == len(whole.rows)
    assert sorted(read) == sorted(planned)


def test_a_block_that_is_removed_while_a_slide_is_read_is_no_block_without_readable_patches(
    tmp_path: Path,
) -> None:
    store = write_store(tmp_path / "store", 1, MADE)
    slide = open_embedded(store, "S00", None, None)
    planned = slide.stored.planned(slide.array.block_shape)
    unreadable = store.embedding("S00", slide.stored.grid.spec.key, slide.identity.key, read_only=False)
    unreadable.write(planned[1], np.full((*planned[1].shape, 13), np.nan, np.float16))
    windows = stream_windows(slide, planned, 0.0)
    assert next(windows).own.any()
    assert not next(windows).own.any(), "stored, and no patch of it could be read"
    unreadable.remove_block(planned[2])
    with pytest.raises(
        StoreError, match=r"block \(0, 2\) of slide 'S00' was removed while the slide was read"
    ):
        next(windows)
