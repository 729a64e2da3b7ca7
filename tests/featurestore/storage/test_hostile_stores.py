"""A store that somebody else wrote: what is wrong in it is one line, and no memory is taken for what it claims."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featurestore.encoders.protocol import EncoderIdentity
from featurestore.errors import StoreError
from featurestore.grid import GridSpec, PatchGrid
from featurestore.storage.catalogue import catalogue
from featurestore.storage.removal import remove
from featurestore.storage.selection import open_slides
from featurestore.storage.store import SlideRecord, Store
from featurestore.storage.tree import open_store
from featurestore.storage.validation import validate
from featurestore.tissue.survey import Survey

DIM = 5
GRID = PatchGrid.for_slide((211, 117), 0.5, (0.5,), GridSpec(0.5, 16, 16))  # 7 x 13 patches
KEY = GRID.spec.key
IDENTITY = EncoderIdentity("toy", DIM, {"version": 1})
ARRAY = f"S/{KEY}/toy/embedding"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "store"
    store = Store.open_or_create(str(folder))
    for name in ("S", "T"):
        store.add_slide(SlideRecord(name, "s.tif", (211, 117), 0.5, f"7-{name}"))
        tissue = np.full(GRID.shape, 255, np.uint8)
        store.add_grid(name, GRID, Survey(tissue, np.zeros((*GRID.shape, 3), np.uint8), {"name": "toy"}), {})
        array = store.add_embedding(name, GRID, IDENTITY, (3, 4))
        for block in store.grid(name, KEY).planned((3, 4)):
            array.write(block, np.ones((*block.shape, DIM), np.float16))
        store.consolidate(name)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy of a small store, which a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "store"))


def read_all(url: str) -> None:
    """Everything that reads a store."""
    store = Store.open(url)
    open_slides(store, None, None, None)[0][0].read_tissue()
    stored = store.grid("S", KEY)
    array = store.embedding("S", KEY, "toy")
    store.identity("S", KEY, "toy")
    store.slide("S")
    for block in stored.planned(array.block_shape):
        array.read_block(block)
    open_store(url)


def change(folder: Path, path: str, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change a document where it lies, and drop the slide's consolidated copy."""
    for file, change_it in ((folder / "S" / "zarr.json", False), (folder / path / "zarr.json", True)):
        document = json.loads(file.read_text())
        document.pop("consolidated_metadata", None)
        if change_it:
            edit(document)
        file.write_text(json.dumps(document))


def set_at(*keys: str | int, to: object) -> Callable[[dict[str, Any]], None]:
    def edit(document: Any) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = to

    return edit


@pytest.mark.parametrize(
    ("path", "keys", "value", "message"),
    [
        (f"S/{KEY}", ("attributes", "grid", "mpp"), float("nan"), "attributes.grid.mpp is NaN"),
        (f"S/{KEY}", ("attributes", "grid", "effective_mpp"), 1e-9, "attributes.grid.effective_mpp is 1e-09"),
        (f"S/{KEY}", ("attributes", "grid", "effective_mpp"), 0.6, "effective_mpp is 0.6, more than 5% off"),
        (f"S/{KEY}", ("attributes", "grid", "patch_px"), 0, "attributes.grid.patch_px is 0"),
        (f"S/{KEY}", ("attributes", "grid", "stride_px"), "7", 'attributes.grid.stride_px is "7"'),
        (f"S/{KEY}", ("attributes", "grid", "shape"), [7], "attributes.grid.shape is a list of 1"),
        (f"S/{KEY}", ("attributes", "grid", "shape"), [10**9, 10**9], "1000000000 x 1000000000 patches"),
        (f"S/{KEY}", ("attributes",), [], "attributes is"),
        ("S", ("attributes", "slide", "mpp"), None, "attributes.slide.mpp is null"),
        (f"S/{KEY}/tissue", ("codecs", 0), {"name": "pickle"}, "codec 'pickle' is not opened"),
        (f"S/{KEY}/tissue", ("data_type",), "object", "dtype 'object' is not opened"),
        (ARRAY, ("shape",), [7, 13, 10**9], "10000000"),
        (ARRAY, ("shape",), [10**9, 10**9, 5], "patches"),
        (ARRAY, ("shape",), [8, 13, 5], "8, 13, 5"),
        (ARRAY, ("chunk_grid", "configuration", "chunk_shape"), [3, 4, 0], r"chunk_shape\[2\] is 0"),
        (ARRAY, ("chunk_grid", "configuration", "chunk_shape"), [10**4, 10**4, 5], "bytes an object"),
        (ARRAY, ("attributes", "encoder", "dim"), -1, "attributes.encoder.dim is -1"),
    ],
)
def test_a_wrong_value_is_named_with_its_field(
    folder: Path, path: str, keys: tuple[str | int, ...], value: object, message: str
) -> None:
    change(folder, path, set_at(*keys, to=value))
    with pytest.raises(StoreError, match=rf"^[^\n]*{message}[^\n]*$"):
        read_all(str(folder))


def test_the_other_slides_are_listed_beside_a_damaged_one(folder: Path) -> None:
    change(folder, f"S/{KEY}", set_at("attributes", "grid", "effective_mpp", to=1e-9))
    rows = catalogue(str(folder)).to_dicts()
    assert [(row["slide"], row["state"]) for row in rows] == [("S", "failed"), ("T", "done")]
    assert "effective_mpp is 1e-09" in rows[0]["reason"]
    assert [p.path for p in validate(str(folder))] == [f"{folder}/S/{KEY}/zarr.json"]


def test_a_grid_of_any_size_is_refused_before_memory_is_taken(folder: Path) -> None:
    change(folder, f"S/{KEY}", set_at("attributes", "grid", "shape", to=[10**9, 10**9]))
    with pytest.raises(StoreError, match=r"shape is 1000000000 x 1000000000 patches; a grid has"):
        Store.open(str(folder)).grid("S", KEY)


def test_an_array_of_another_shape_than_its_grid_is_refused(folder: Path) -> None:
    # The last first: each change stays.
    for name, shape in (("rgb", [7, 13, 4]), ("tissue", [9, 13])):
        change(folder, f"S/{KEY}/{name}", set_at("shape", to=shape))
        with pytest.raises(StoreError, match=rf"{name} is damaged: it is uint8 .*should be \(7, 13"):
            Store.open(str(folder)).grid("S", KEY)


def test_objects_without_a_checksum_are_a_problem(folder: Path) -> None:
    change(folder, ARRAY, lambda document: document["codecs"].pop())
    assert any("no checksum" in problem.what for problem in validate(str(folder)))


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "__MACOSX", "notes", "a folder", "@eaDir"])
@pytest.mark.parametrize("below", ["", "S", f"S/{KEY}"])
def test_a_folder_of_another_program_is_left_alone(folder: Path, name: str, below: str) -> None:
    (folder / below / name).mkdir()
    (folder / below / name / "note.txt").write_text("x")
    read_all(str(folder))
    assert [row["state"] for row in catalogue(str(folder)).to_dicts()] == ["done", "done"]
    assert Store.open(str(folder)).slide_ids() == ["S", "T"]
    (problem,) = validate(str(folder))
    assert problem.path == f"{below}/{name}".lstrip("/")
    assert "no part of the store" in problem.what


@pytest.mark.parametrize("keep", [0, 10, -1])
def test_a_damaged_object_of_an_open_store_is_one_line(folder: Path, keep: int) -> None:
    tree = open_store(folder)
    object_file = folder / "S" / KEY / "tissue" / "c" / "0" / "0"
    object_file.write_bytes(object_file.read_bytes()[:keep] if keep >= 0 else b"<html>" * 20)
    with pytest.raises(StoreError, match=f"{folder}/S/{KEY}/tissue is damaged: ") as refused:
        np.asarray(tree[f"S/{KEY}"].tissue)
    assert "\n" not in str(refused.value)
    np.testing.assert_array_equal(tree[f"T/{KEY}"].tissue, 255)
    assert tree[f"S/{KEY}/toy"].embedding.chunks == ((3, 3, 1), (4, 4, 4, 1), (DIM,))


def test_a_fill_value_out_of_its_type_is_refused(folder: Path) -> None:
    change(folder, ARRAY, lambda document: document.update(fill_value=2147483648))
    with pytest.raises(StoreError, match=r"fill_value 2\.1475e\+09 is no float16"):
        read_all(str(folder))


def test_a_fifo_is_no_document(folder: Path) -> None:
    (folder / "S" / "zarr.json").unlink()
    os.mkfifo(folder / "S" / "zarr.json")
    with pytest.raises(StoreError, match="is no file"):
        Store.open(str(folder)).slide("S")


def test_a_fifo_is_no_block(folder: Path) -> None:
    file = folder / ARRAY / "c" / "0" / "0" / "0"
    file.unlink()
    os.mkfifo(file)
    array = Store.open(str(folder)).embedding("S", KEY, "toy")
    with pytest.raises(StoreError, match="0 bytes"):
        array.read_block(Store.open(str(folder)).grid("S", KEY).planned((3, 4))[0])


def test_a_fifo_is_no_chunk_that_zarr_reads(folder: Path) -> None:
    file = folder / "S" / KEY / "tissue" / "c" / "0" / "0"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(StoreError, match="is no file"):
        Store.open(str(folder)).grid("S", KEY)


def test_a_document_of_gigabytes_is_not_read(folder: Path) -> None:
    for path in ("S/zarr.json", f"S/{KEY}/tissue/zarr.json"):
        os.truncate(folder / path, 10 * 2**30)  # of holes
        with pytest.raises(StoreError, match=r"10737418240 bytes, more than"):
            read_all(str(folder))


def test_texts_that_a_terminal_would_obey_are_not_shown(folder: Path) -> None:
    (folder / "_failures").mkdir()
    record = {"reason": "first\n\x1b[31msecond" + "x" * 10**5}
    (folder / "_failures" / "U.json").write_text(json.dumps(record))
    (row,) = (row for row in catalogue(str(folder)).to_dicts() if row["slide"] == "U")
    assert row["reason"].startswith("first [31msecond")
    assert len(row["reason"]) <= 2000
    change(folder, ARRAY, set_at("attributes", "encoder", "key", to="a\nb"))
    with pytest.raises(StoreError, match=r'^[^\n]*attributes.encoder.key is "a\\nb"[^\n]*$'):
        read_all(str(folder))


HOSTILE_NAMES = ("..", ".", "", "a/b", "../up", "/etc", "a\0b", "_failures", "é")


@pytest.mark.parametrize("name", [*HOSTILE_NAMES, "tissue", "x", "zarr.json", "s" * 245])
def test_no_slide_is_written_under_a_name_that_is_no_slide_s(folder: Path, name: str) -> None:
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(StoreError, match=r"^slide id [^\n]*$"):
        Store.open(str(folder)).add_slide(SlideRecord(name, "s.tif", (211, 117), 0.5, "7-a"))
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize("key", ["..", ".", "", "tissue", "rgb", "y", "zarr.json", "_x", "s" * 245])
def test_no_encoder_is_written_under_a_name_of_the_store_s_own(folder: Path, key: str) -> None:
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(StoreError, match=r"^encoder [^\n]*$"):
        Store.open(str(folder)).add_embedding("S", GRID, EncoderIdentity(key, DIM, {}))
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_no_name_leads_out_of_the_store(folder: Path, name: str) -> None:
    store = Store.open(str(folder))
    for call in (
        lambda: store.slide(name),
        lambda: store.grid(name, KEY),
        lambda: store.grid("S", name),
        lambda: store.select(None, None, name),
        lambda: store.remove(name),
        lambda: remove(str(folder), name, None, None),
    ):
        with pytest.raises(StoreError):
            call()
    assert (folder / "S" / "zarr.json").exists()
