"""Raw blocks equal what zarr reads, and damaged ones are refused."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from _stores import SPEC, Made, write_store
from zarr.codecs import Crc32cCodec, ZstdCodec

from featurestore.blocks import Block, plan_blocks
from featurestore.errors import StoreError
from featurestore.location import Location
from featurestore.storage.block_array import BlockArray
from featurestore.storage.block_cache import BlockCache
from featurestore.storage.float16 import nan_rows, to_float32
from featurestore.storage.raw_read import RawBlocks
from featurestore.storage.store import Store

MADE = Made((17, 23), 5, (7, 11), frame=3)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return write_store(tmp_path / "store", 1, MADE)


def _array(store: Store) -> BlockArray:
    return store.embedding("S00", SPEC.key, "random")


def _blocks() -> list[Block]:
    return list(plan_blocks(MADE.shape, MADE.block))


def test_raw_blocks_equal_what_zarr_reads_bit_by_bit(store: Store) -> None:
    array = _array(store)
    assert array.is_raw
    for block in _blocks():
        expected = array.read(block.rows, block.cols)
        got = array.read_block(block)
        assert got.shape == expected.shape == (*block.shape, 5)
        assert np.array_equal(got.view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("how", ["compressed", "sharded", "big-endian"])
def test_other_layouts_are_read_by_zarr_with_the_same_values(tmp_path: Path, how: str) -> None:
    options = {
        "compressed": {"compressors": [ZstdCodec(), Crc32cCodec()]},
        "sharded": {"compressors": [Crc32cCodec()], "shards": (14, 22, 5)},
        "big-endian": {"compressors": [Crc32cCodec()], "serializer": zarr.codecs.BytesCodec(endian="big")},
    }[how]
    values = np.random.default_rng(1).standard_normal((14, 22, 5)).astype(np.float16)
    location = Location(str(tmp_path))
    written = zarr.create_array(
        location.zarr(), name="a", shape=values.shape, chunks=(7, 11, 5), dtype="float16", **options
    )
    written[...] = values
    array = BlockArray.open(location, "a")
    assert not array.is_raw
    for block in plan_blocks((14, 22), (7, 11)):
        assert np.array_equal(array.read_block(block), values[block.slices])


@pytest.mark.parametrize("compressors", [[Crc32cCodec()], [ZstdCodec(), Crc32cCodec()]], ids=["raw", "zarr"])
def test_channels_in_groups_are_joined_or_read_one_object_at_a_time(
    tmp_path: Path, compressors: list[Any]
) -> None:
    values = np.random.default_rng(2).standard_normal((9, 13, 5)).astype(np.float16)
    location = Location(str(tmp_path))
    options: dict[str, Any] = {"chunks": (7, 11, 2), "dtype": "float16", "compressors": compressors}
    zarr.create_array(location.zarr(), name="a", shape=values.shape, **options)[...] = values
    array = BlockArray.open(location, "a")
    for block in plan_blocks((9, 13), (7, 11)):
        assert np.array_equal(array.read_block(block), values[block.slices])
        for group, channels in enumerate([slice(0, 2), slice(2, 4), slice(4, 5)]):
            got = array.read_block(block, group=group)
            assert np.array_equal(got, values[(*block.slices, channels)])
    with pytest.raises(StoreError, match="keeps a block in 3 objects"):
        array.reader()


def test_a_block_is_read_into_memory_that_is_there(store: Store) -> None:
    array, memory = _array(store), np.zeros((7, 11, 5), np.float16)
    for block in _blocks():
        got = array.read_block(block, memory)
        assert np.shares_memory(got, memory)
        assert np.array_equal(got, array.read(block.rows, block.cols), equal_nan=True)
    with pytest.raises(ValueError, match=r"contiguous float16 \(7, 11, 5\)"):
        array.read_block(_blocks()[0], memory[:, ::-1])


def test_a_flipped_bit_and_a_lost_end_are_refused_with_the_object_named(store: Store) -> None:
    array, block = _array(store), _blocks()[4]
    file = Path(store.location.path(array.object_path(block.index)))
    whole = bytearray(file.read_bytes())
    whole[41] ^= 8
    file.write_bytes(whole)
    with pytest.raises(StoreError, match=r"c/1/1/0 is damaged: its checksum is"):
        array.read_block(block)
    file.write_bytes(whole[:-3])
    with pytest.raises(StoreError, match=r"c/1/1/0 is damaged: it has 771 bytes, not 774"):
        array.read_block(block)


def test_a_block_that_was_never_written_reads_as_nan(store: Store) -> None:
    array, block = _array(store), _blocks()[4]
    array.remove_block(block)
    assert np.isnan(array.read_block(block)).all()
    assert array.reader().load(block, np.empty((7, 11, 5), np.float16)) is None


def test_remote_blocks_come_from_the_disk_the_second_time_and_never_stale_or_damaged(
    store: Store, tmp_path: Path
) -> None:
    import fsspec

    remote = fsspec.filesystem("memory")
    remote.put(str(store.location.path("")), "/cached", recursive=True)
    try:
        array = Store.open("memory://cached").embedding("S00", SPEC.key, "random")
        cache, block = BlockCache(tmp_path / "cache", 10_000), _blocks()[4]
        expected = array.read_block(block)
        memory = np.empty((7, 11, 5), np.float16)

        def load(reader: RawBlocks) -> np.ndarray | None:
            loaded = reader.load(block, memory)
            return None if loaded is None else loaded.values

        assert np.array_equal(load(array.reader(cache)), expected)
        (kept,) = (tmp_path / "cache").iterdir()
        reader = array.reader(cache)
        load(reader)  # the version is known from here on
        remote.rm(f"/cached/{array.object_path(block.index)}")
        assert np.array_equal(load(reader), expected)
        kept.write_bytes(b"\0" * kept.stat().st_size)  # damaged on the disk: fetched again
        assert load(reader) is None
    finally:
        remote.rm("/cached", recursive=True)


def test_the_cache_keeps_to_its_cap_and_drops_what_was_used_longest_ago(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 1000)
    for number in range(7):
        cache.write(f"k{number}", bytes([number]) * 130)
        os.utime(cache._path(f"k{number}"), (number, number))
    assert cache.read("k0") == bytes(130)  # used now: it stays
    cache.write("k7", bytes(130))
    cache.write("k8", bytes(2000))  # larger than the cap: never kept
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 1000
    assert [cache.read(f"k{n}") is not None for n in (0, 1, 7, 8)] == [True, False, True, False]


SHARED_FOLDER = """
import random, sys
from pathlib import Path
from featurestore.storage.block_cache import BlockCache

cache, order = BlockCache(Path(sys.argv[1]), 20_000), random.Random(int(sys.argv[2]))
for _ in range(400):
    number = order.randrange(60)
    data = bytes([number]) * 1000
    found = cache.read(str(number))
    assert found in (None, data)
    if found is None:
        cache.write(str(number), data)
"""


def test_processes_that_share_the_disk_cache_keep_to_its_limit_together(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SHARED_FOLDER, str(tmp_path / "blocks")]
    processes = [subprocess.Popen([*command, str(seed)]) for seed in range(2)]
    assert [process.wait(180) for process in processes] == [0, 0]
    assert 0 < sum(file.stat().st_size for file in (tmp_path / "blocks").iterdir()) <= 20_000 * 1.1


def test_what_other_processes_write_counts_before_this_one_has_filled_the_cache(tmp_path: Path) -> None:
    one, other = (BlockCache(tmp_path, 10_000) for _ in range(2))
    one.write("a", bytes(10))
    other.write("b", bytes(10))
    for number in range(9):
        one.write(f"one {number}", bytes(1000))
        other.write(f"other {number}", bytes(1000))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 10_000


def test_a_cache_whose_folder_is_removed_goes_on(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "blocks", 10_000)
    cache.write("a", bytes(10))
    shutil.rmtree(tmp_path / "blocks")
    assert cache.read("a") is None
    assert cache._evict() == 0, "another process removed the folder since the block was written to it"
    cache.write("a", bytes(10))
    assert cache.read("a") == bytes(10)


def test_an_object_that_is_cut_while_it_is_read_is_refused_and_not_waited_for(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    array, block = _array(store), _blocks()[4]
    path = Path(store.location.path(array.object_path(block.index)))
    readv = os.readv

    def cut(file: int, buffers: list[Any]) -> int:
        done = readv(file, [buffers[0][:100]])
        os.truncate(path, 100)
        return done

    monkeypatch.setattr(os, "readv", cut)
    with pytest.raises(StoreError, match="is damaged: it has 100 bytes, not"):
        array.read_block(block)


def test_float16_becomes_the_float32_that_numpy_makes_of_it() -> None:
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    assert np.array_equal(to_float32(finite).view(np.uint32), finite.astype(np.float32).view(np.uint32))
    rows = every.reshape(-1, 2)
    assert np.array_equal(nan_rows(rows), np.isnan(rows).any(axis=1))
    with pytest.raises(ValueError, match="not finite"):
        to_float32(np.array([1, np.inf], np.float16))
    with pytest.raises(ValueError, match="not finite"):
        to_float32(np.array([1, -np.inf], np.float16))
