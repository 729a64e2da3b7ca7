"""Rounded and compressed embeddings: what plain zarr reads, what resumes, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import zarr
from make_slides import tissue_like, write_pyramid
from numcodecs import BitRound
from typer.testing import CliRunner

from featurestore.analysis.patch_stream import open_stream
from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.errors import StoreError
from featurestore.grid import GridSpec
from featurestore.location import Location
from featurestore.storage.block_array import BlockArray
from featurestore.storage.block_cache import BlockCache
from featurestore.storage.coding import Coding, parse_coding
from featurestore.storage.raw_read import RawBlocks
from featurestore.storage.store import Store
from featurestore.storage.tree import open_store
from featurestore.storage.validation import validate
from histosge_cli.main import app

SPEC = GridSpec(0.5, 64, 64)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "S1.tif"
    write_pyramid(path, tissue_like(1400, 1300, 0.5, 3), 0.5)
    return path


def _settings(store_as: str | None) -> EmbedSettings:
    return EmbedSettings(("morphology",), SPEC, block_shape=(7, 5), store_as=store_as)


@pytest.fixture(scope="module")
def plain(slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("plain") / "store"
    embed(str(slide), str(store), _settings(None))
    return store


@pytest.fixture(scope="module")
def rounded(slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("rounded") / "store"
    embed(str(slide), str(store), _settings("bitround:6+zstd"))
    return store


def _path(store: Path) -> str:
    return f"{store}/S1/{SPEC.key}/morphology/embedding"


def _objects(store: Path) -> list[Path]:
    return sorted(Path(_path(store)).rglob("c/*/*/0"))


def test_plain_zarr_reads_what_an_independent_codec_rounds(plain: Path, rounded: Path) -> None:
    values = zarr.open_array(_path(plain), mode="r")[...]
    expected = BitRound(6).encode(values.copy()).view(np.float16)
    array = zarr.open_array(_path(rounded), mode="r")
    np.testing.assert_array_equal(array[...], expected)
    assert array.attrs["coding"] == "bitround:6+zstd"
    assert [type(codec).__name__ for codec in array.metadata.codecs] == [
        "BytesCodec",
        "BloscCodec",
        "Crc32cCodec",
    ]
    read = open_store(str(rounded))[f"S1/{SPEC.key}/morphology"]["embedding"]
    np.testing.assert_array_equal(read.to_numpy(), expected)
    difference = np.abs(expected.astype(float) - values)
    assert np.nanmax(difference / np.maximum(np.abs(values.astype(float)), 6.2e-5)) <= 2**-7


def test_one_object_a_block_with_a_checksum_and_fewer_bytes(plain: Path, rounded: Path) -> None:
    assert [p.relative_to(plain) for p in _objects(plain)] == [
        p.relative_to(rounded) for p in _objects(rounded)
    ]
    sizes = [sum(p.stat().st_size for p in _objects(store)) for store in (plain, rounded)]
    assert sizes[1] < 0.75 * sizes[0]
    assert validate(str(rounded), deep=True) == []
    assert "coding" not in zarr.open_array(_path(plain), mode="r").attrs
    for store in (plain, rounded):
        stream = open_stream(str(store))
        assert sum(len(block.rows) for block in stream.blocks()) == stream.counts.patches > 150


def test_the_fast_reader_reads_and_checks_compressed_objects(rounded: Path, tmp_path: Path) -> None:
    store = Store.open(str(rounded))
    array = store.embedding("S1", SPEC.key, "morphology")
    assert (array.is_raw, array.is_blosc) == (False, True)
    planned = store.grid("S1", SPEC.key).planned(array.block_shape)
    for block in planned:
        expected = array.read(block.rows, block.cols)
        np.testing.assert_array_equal(array.read_block(block), expected)
    path = _objects(rounded)[2]
    whole = path.read_bytes()
    block = next(b for b in planned if array.object_path(b.index) == str(path.relative_to(rounded)))
    try:
        for damage in (whole[:-9], whole[:50] + b"\0" + whole[51:], whole[:3], b""):
            path.write_bytes(damage)
            with pytest.raises(StoreError, match="damaged"):
                array.read_block(block)
            assert len(validate(str(rounded), deep=True)) == 1
        path.unlink()
        assert np.isnan(array.read_block(block)).all()
    finally:
        path.write_bytes(whole)


def test_a_size_that_an_object_states_is_not_believed_when_it_is_read(tmp_path: Path) -> None:
    import google_crc32c
    from numcodecs import blosc

    location = Location(str(tmp_path))
    array = BlockArray.create(
        location,
        "a",
        shape=(4, 4, 8),
        chunks=(4, 4, 8),
        dtype="float16",
        dims=("y", "x", "feature"),
        attrs={},
        coding=Coding(5, compressed=True),
    )
    for n in (2, 10_000):
        packed = blosc.compress(np.zeros(n, np.float16), b"zstd", 1)
        folder = tmp_path / "a" / "c" / "0" / "0"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "0").write_bytes(packed + int(google_crc32c.value(packed)).to_bytes(4, "little"))
        from featurestore.blocks import Block

        with pytest.raises(StoreError, match=f"it states {2 * n} bytes of values, not 256"):
            array.read_block(Block((0, 0), (0, 4), (0, 4)))


def test_a_cache_keeps_compressed_objects(tmp_path: Path) -> None:
    import uuid

    from featurestore.blocks import Block

    location = Location(f"memory://{uuid.uuid4().hex}")
    options = {"shape": (4, 4, 8), "chunks": (4, 4, 8), "dtype": "float16", "dims": ("y", "x", "feature")}
    array = BlockArray.create(location, "a", **options, attrs={}, coding=Coding(5, compressed=True))
    block = Block((0, 0), (0, 4), (0, 4))
    values = np.random.default_rng(1).standard_normal((4, 4, 8)).astype(np.float16)
    array.write(block, values)
    reader = RawBlocks(array, BlockCache(tmp_path / "cache", 10**6))
    slot = np.empty((4, 4, 8), np.float16)
    for _ in range(2):
        loaded = reader.load(block, slot)
        assert loaded is not None
        np.testing.assert_array_equal(loaded.values, array.read((0, 4), (0, 4)))


def test_a_run_goes_on_as_it_was_begun_and_no_other_way(slide: Path, rounded: Path, tmp_path: Path) -> None:
    objects = {p: p.read_bytes() for p in _objects(rounded)}
    first = next(iter(objects))
    first.unlink()
    (result,) = embed(str(slide), str(rounded), _settings(None))
    assert (result.state, result.computed) == ("done", 1)
    assert first.read_bytes() == objects[first]
    (result,) = embed(str(slide), str(rounded), _settings("bitround:6+zstd"))
    assert (result.state, result.computed) == ("done", 0)
    ran = CliRunner().invoke(
        app,
        [
            "embed",
            str(slide),
            str(rounded),
            "--encoder",
            "morphology",
            "--patch",
            "64",
            "--store-as",
            "float16",
        ],
    )
    assert "is stored as bitround:6+zstd, now it is to be float16" in str(ran.exception)


@pytest.mark.parametrize(
    "name", ["bitround:0", "bitround:11+", "bitround:11", "int8", "bitround:", "bitround:7+lz4", ""]
)
def test_a_coding_that_is_none_is_refused_with_what_is_possible(
    slide: Path, tmp_path: Path, name: str
) -> None:
    command = ["embed", str(slide), str(tmp_path / "store"), "--encoder", "colour", "--store-as", name]
    ran = CliRunner().invoke(app, command)
    assert isinstance(ran.exception, StoreError)
    assert "give float16, bitround:N or bitround:N+zstd, where N is 1 to 10" in str(ran.exception)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("bits", range(1, 11))
def test_no_value_becomes_infinite_and_nan_stays_nan(bits: int) -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    coding = Coding(bits)
    found = coding.round(every.copy())
    np.testing.assert_array_equal(np.isnan(found), np.isnan(every))
    np.testing.assert_array_equal(np.isinf(found), np.isinf(every))
    assert coding.is_rounded(found[np.isfinite(found)])
    assert bits == 10 or not coding.is_rounded(every[np.isfinite(every)])
    numbers = every[np.isfinite(every)].astype(float)
    step = np.exp2(np.floor(np.log2(np.maximum(np.abs(numbers), 2.0**-14))) - bits)
    error = np.abs(found[np.isfinite(every)].astype(float) - numbers)
    largest = np.abs(numbers) > 65504 - 2.0 ** (15 - bits)
    assert (error[~largest] <= step[~largest] / 2).all()
    assert (error[largest] <= step[largest]).all()


def test_names_of_codings_are_those_that_they_were_made_from() -> None:
    for name in ("float16", "bitround:3", "bitround:7+zstd", "bitround:10+zstd"):
        assert parse_coding(name).name == name


def test_validate_finds_values_and_codecs_that_are_not_as_the_attribute_says(
    rounded: Path, tmp_path: Path
) -> None:
    import json
    import shutil

    copy = tmp_path / "store"
    shutil.copytree(rounded, copy)
    document = Path(_path(copy)) / "zarr.json"
    node = json.loads(document.read_text())
    node["attributes"]["coding"] = "bitround:5"
    document.write_text(json.dumps(node))
    what = [problem.what for problem in validate(str(copy), deep=True)]
    assert any("coding is bitround:5, and objects are compressed" in line for line in what)
    assert any("values of more than the 5 bits" in line for line in what)
    node["attributes"]["coding"] = "int4"
    document.write_text(json.dumps(node))
    assert any("int4" in problem.what for problem in validate(str(copy)))
