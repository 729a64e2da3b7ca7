"""Blocks of a folder are written without zarr: the same bytes under the same keys as zarr writes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from featurestore.blocks import plan_blocks
from featurestore.location import Location
from featurestore.storage.block_array import BlockArray

SHAPE = (7, 13, 11)


def make(folder: Path, chunks: tuple[int, int, int], dtype: str) -> BlockArray:
    dims = ("y", "x", "feature")
    return BlockArray.create(
        Location(str(folder)), "a", shape=SHAPE, chunks=chunks, dtype=dtype, dims=dims, attrs={}
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Blocks that fit and such that are padded at the edges; channels whole and in groups, the last of them padded.
@pytest.mark.parametrize("chunks", [(7, 13, 11), (3, 5, 11), (3, 5, 4)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_bytes_are_those_that_zarr_writes(
    tmp_path: Path, chunks: tuple[int, int, int], dtype: str
) -> None:
    values = np.random.default_rng(0).standard_normal(SHAPE).astype(dtype)
    values[2:5, 4:9] = np.nan
    ours = make(tmp_path / "ours", chunks, dtype)
    for block in plan_blocks(SHAPE[:2], chunks[:2]):
        ours.write(block, values[block.slices])
    make(tmp_path / "theirs", chunks, dtype)
    theirs: Any = zarr.open_array(str(tmp_path / "theirs" / "a")).with_config({"write_empty_chunks": True})
    theirs[:] = values
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")


def test_an_array_that_was_opened_for_reading_is_not_written(tmp_path: Path) -> None:
    make(tmp_path, (3, 5, 11), "float16")
    array = BlockArray.open(Location(str(tmp_path)), "a")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="read-only"):
        array.write(next(iter(plan_blocks(SHAPE[:2], (3, 5)))), np.zeros((3, 5, 11), np.float16))
    assert contents(tmp_path) == before
