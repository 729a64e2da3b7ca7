"""A Zarr from elsewhere is data: at no place where one is read does an array that decodes by pickle act, or get so far.

What is refused is seen from our own message. Whether numcodecs refuses, too, depends on its release.
"""

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import zarr

from featurestore.checked_zarr import check_tree
from featurestore.documents import DocumentError
from featurestore.errors import StoreError
from featurestore.exchange.raw2features import read_raw2features
from featurestore.location import Location
from featurestore.slides.open_slide import open_slide
from featurestore.storage.store import Store
from featurestore.storage.tree import open_store
from featurestore.storage.validation import validate
from featurestore.zarr_documents import check_document
from histosge.data.expression.find_expression import find_expression
from histosge.data.expression.loaded_expression import SlideFrame
from histosge.exporting.open_tables import ExportSelection, open_tables
from histosge.prediction.expression_store import ExpressionStore

# Of anndata's and zarr's releases to come, when they write what is read here.
pytestmark = pytest.mark.filterwarnings("ignore")
ARCHIVE = Path(__file__).parent / "data" / "written_by_6995a84.zip"
GRID = "mpp1.0000_px48_stride24"
FRAME = SlideFrame("S", "D", 0.5, None)


class Acts:
    """Unpickling it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


def hostile_2(array: Path, mark: Path, shape: tuple[int, ...] = (2, 3)) -> dict[str, Any]:
    """Make a folder an array of format 2 whose only chunk runs code if it is decoded; return its metadata."""
    shutil.rmtree(array, ignore_errors=True)
    array.mkdir(parents=True)
    document = {
        "zarr_format": 2,
        "shape": list(shape),
        "chunks": list(shape),
        "dtype": "|O",
        "fill_value": None,
        "order": "C",
        "compressor": None,
        "filters": [{"id": "vlen-utf8"}, {"id": "pickle", "protocol": 5}],
    }
    (array / ".zarray").write_text(json.dumps(document))
    (array / ".zattrs").write_text("{}")
    (array / ".".join("0" * len(shape))).write_bytes(pickle.dumps(Acts(mark)))
    return document


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "ran"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(tmp_path / "old")
    return tmp_path / "old"


def refused(call: Callable[[], Any], mark: Path) -> str:
    """The one line with which a call refuses."""
    with pytest.raises(ValueError, match="array of Python objects") as caught:
        call()
    assert not mark.exists()
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_pickle_in_the_array_would_act(mark: Path) -> None:
    pickle.loads(pickle.dumps(Acts(mark)))
    assert mark.exists()


@pytest.mark.parametrize("consolidated", [False, True])
def test_a_slide(tmp_path: Path, mark: Path, consolidated: bool) -> None:
    path = tmp_path / "s.zarr"
    group = zarr.create_group(path, zarr_format=2)
    group.attrs["multiscales"] = [{"datasets": [{"path": "0"}], "axes": ["c", "y", "x"]}]
    document = hostile_2(path / "0", mark, (3, 5, 7))
    if consolidated:
        documents = {".zgroup": {"zarr_format": 2}, ".zattrs": dict(group.attrs), "0/.zarray": document}
        (path / ".zmetadata").write_text(json.dumps({"zarr_consolidated_format": 1, "metadata": documents}))
        shutil.move(path / "0" / ".zarray", tmp_path / "hidden")
    refused(lambda: open_slide(str(path), 0.5), mark)


@pytest.mark.parametrize("name", ["tissue", "rgb"])
def test_an_array_of_a_store(old: Path, mark: Path, name: str) -> None:
    url = str(old / "store.zarr")
    hostile_2(old / "store.zarr" / "S1" / GRID / name, mark)
    problems = [problem for problem in validate(url) if problem.path.endswith(name)]
    assert problems
    assert not mark.exists()
    # Of format 3 alone: an array of another format is as if it were not there.
    with pytest.raises((StoreError, FileNotFoundError)):
        Store.open(url).grid("S1", GRID)
    assert not mark.exists()


def test_raw2features(tmp_path: Path, mark: Path) -> None:
    path = tmp_path / "r.zarr"
    grid = zarr.create_group(path, zarr_format=2).create_group("grids/g")
    grid.attrs["raw2features"] = {"source": {}, "patching": {}}
    grid.create_group("features")
    hostile_2(path / "grids" / "g" / "features" / "uni", mark)
    refused(lambda: read_raw2features(path), mark)


@pytest.mark.parametrize("where", ["X", "obs/extra", "uns/later", "layers/counts"])
def test_anndata(tmp_path: Path, mark: Path, where: str) -> None:
    path = tmp_path / "a.zarr"
    data = anndata.AnnData(np.ones((5, 3), np.float32), obsm={"spatial": np.ones((5, 2))})
    data.write_zarr(path)
    hostile_2(path / where, mark)
    refused(lambda: find_expression(str(path), FRAME), mark)


@pytest.mark.spatialdata
def test_spatialdata(tmp_path: Path, mark: Path) -> None:
    path = tmp_path / "s.zarr"
    group = zarr.create_group(path)
    group.attrs["spatialdata_attrs"] = {"version": "0.1"}
    hostile_2(path / "tables" / "table" / "X", mark)
    refused(lambda: find_expression(str(path), FRAME), mark)


def test_consolidated_metadata_of_format_3_are_checked_as_each_node_is(old: Path) -> None:
    file = old / "store.zarr" / "S1" / "zarr.json"
    document = json.loads(file.read_text())
    node = document["consolidated_metadata"]["metadata"][f"{GRID}/tissue"]
    node["codecs"] = [{"name": "numcodecs.pickle", "configuration": {}}]
    file.write_text(json.dumps(document))
    with pytest.raises(StoreError, match=r"S1/zarr.json, .*/tissue: codec 'numcodecs.pickle' is not opened"):
        open_store(str(old / "store.zarr"))


def test_an_expression_store(old: Path, mark: Path) -> None:
    hostile_2(old / "maps.zarr" / "S1" / GRID / "gene", mark)
    with pytest.raises((StoreError, FileNotFoundError)):
        ExpressionStore.open(str(old / "maps.zarr")).map("S1", GRID)
    assert not mark.exists()


def test_an_array_that_a_user_added_to_a_map_is_read_only_in_the_map_s_shape(old: Path) -> None:
    extra = old / "maps.zarr" / "S1" / GRID / "extra"
    shutil.copytree(old / "maps.zarr" / "S1" / GRID / "tissue", extra)
    for name, values in (("shape", [10**9, 10**9]), ("data_type", "object")):
        document = json.loads((extra / "zarr.json").read_text())
        document[name] = values
        (extra / "zarr.json").write_text(json.dumps(document))
        with pytest.raises(StoreError, match=r"^[^\n]*extra[^\n]*$"):
            open_tables(str(old / "maps.zarr"), ExportSelection())


def test_a_linked_folder_is_part_of_the_tree_and_a_circle_ends(tmp_path: Path, mark: Path) -> None:
    hostile_2(tmp_path / "elsewhere" / "X", mark)
    (tmp_path / "a.zarr").mkdir()
    check_tree(tmp_path / "a.zarr")
    (tmp_path / "a.zarr" / "again").symlink_to(tmp_path / "a.zarr")
    check_tree(tmp_path / "a.zarr")
    (tmp_path / "a.zarr" / "linked").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DocumentError, match=r"linked/X/\.zarray"):
        check_tree(tmp_path / "a.zarr")


def test_a_group_named_c_is_no_chunk(tmp_path: Path, mark: Path) -> None:
    zarr.create_group(tmp_path / "a.zarr")
    hostile_2(tmp_path / "a.zarr" / "c" / "X", mark)
    with pytest.raises(DocumentError, match=r"c/X/\.zarray"):
        check_tree(tmp_path / "a.zarr")


# ---------------------------------------------------------------- the allow-list

ARRAY_2 = {
    "zarr_format": 2,
    "shape": [7, 5],
    "chunks": [7, 5],
    "dtype": "<f4",
    "fill_value": 0,
    "order": "C",
    "compressor": None,
    "filters": None,
}
ARRAY_3 = {
    "zarr_format": 3,
    "node_type": "array",
    "shape": [7, 5],
    "data_type": "float32",
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [7, 5]}},
    "chunk_key_encoding": {"name": "default"},
    "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    "fill_value": 0,
}


def _check(document: dict[str, Any], name: str) -> None:
    check_document(name, json.dumps(document).encode(), f"x/{name}")


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "|O", "filters": [{"id": "pickle"}]},
        {"dtype": "|O", "filters": [{"id": "vlen-utf8"}, {"id": "pickle"}]},
        {"dtype": "|O", "filters": [{"id": "pickle"}, {"id": "vlen-utf8"}]},
        {"dtype": "|O", "filters": None},
        {"dtype": "|O", "filters": [{"id": "json2"}]},
        {"dtype": "|O", "filters": [{"id": "msgpack2"}]},
        {"dtype": "|O", "filters": [{"id": "vlen-array", "dtype": "<f4"}]},
        {"dtype": "|O", "filters": [{"id": "categorize", "labels": ["a"], "dtype": "|O"}]},
        {"dtype": "|O", "filters": [{"id": "vlen-utf8"}], "compressor": {"id": "pickle"}},
        {"dtype": "<f4", "filters": [{"id": "pickle"}]},
        {"dtype": "<f4", "filters": [{"id": "vlen-utf8"}]},
        {"dtype": "<f4", "filters": [{"id": "delta", "dtype": "|O"}]},
        {"dtype": "<f4", "filters": [{"id": "delta", "dtype": "<f4", "astype": "O"}]},
        {"dtype": "<f4", "filters": [{"id": "astype", "encode_dtype": "O", "decode_dtype": "O"}]},
        {"dtype": "O"},
        {"dtype": "object"},
        {"dtype": [["a", "|O"]]},
        {"dtype": [["a", [["b", "|O"]]]]},
        {"dtype": "|U99999999"},
        {"dtype": ""},
        {"dtype": []},
        {"shape": [-7, 5]},
        {"shape": [7, None]},
        {"shape": [7]},
        {"shape": "7"},
        {"chunks": [0, 5]},
        {"chunks": [10**9, 10**9], "shape": [10**9, 10**9]},
        {"compressor": {"id": "made-up"}},
        {"compressor": {}},
        {"zarr_format": 3},
    ],
)
def test_of_format_2_nothing_but_numbers_and_text_is_opened(change: dict[str, Any]) -> None:
    with pytest.raises(DocumentError, match=r"^x/\.zarray[^\n]*$"):
        _check({**ARRAY_2, **change}, ".zarray")


@pytest.mark.parametrize(
    "change",
    [
        {"data_type": "object"},
        {"data_type": {"name": "pickle"}},
        {"data_type": {"name": "structured", "configuration": {"fields": [["a", "object"]]}}},
        {"data_type": {"name": "fixed_length_utf32", "configuration": {"length_bytes": 4 * 10**9}}},
        {"data_type": {"name": "fixed_length_utf32"}},
        {"data_type": None},
        {"codecs": [{"name": "numcodecs.pickle"}]},
        {"codecs": [{"name": "numcodecs.astype", "configuration": {"encode_dtype": "O"}}]},
        {"codecs": ["pickle"]},
        {"codecs": []},
        {
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {"chunk_shape": [1, 1], "codecs": [{"name": "numcodecs.pickle"}]},
                }
            ]
        },
        {"chunk_grid": {"name": "rectilinear", "configuration": {"chunk_shape": [7, 5]}}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [7, 0]}}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [10**9, 10**9]}}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [7, float("nan")]}}},
        {"shape": [7, -5]},
        {"shape": [7, 5, 1]},
        {"dimension_names": ["y"]},
        {"storage_transformers": [{"name": "x"}]},
        {"node_type": "table"},
        {"attributes": []},
    ],
)
def test_of_format_3_nothing_but_numbers_and_text_is_opened(change: dict[str, Any]) -> None:
    with pytest.raises(DocumentError, match=r"^x/zarr\.json[^\n]*$"):
        _check({**ARRAY_3, **change}, "zarr.json")


@pytest.mark.parametrize("path", ["../up", "a/../../b", "/etc", "a\0b"])
def test_consolidated_metadata_name_nothing_outside_of_their_group(path: str) -> None:
    group = {"zarr_format": 3, "node_type": "group", "consolidated_metadata": {"metadata": {path: ARRAY_3}}}
    with pytest.raises(DocumentError, match="outside of itself"):
        _check(group, "zarr.json")


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_what_anndata_and_zarr_write_is_opened(tmp_path: Path, zarr_format: int) -> None:
    """Text, categories, structures, times, sparse matrices, with and without compression."""
    import pandas as pd
    from scipy import sparse

    obs = pd.DataFrame({"kind": pd.Categorical(["a", "b", "a"]), "note": ["x", "y", "z"]}, index=list("ABC"))
    names = np.array([("G1", "G2")], dtype=[("a", "U7"), ("b", "U7")])
    data = anndata.AnnData(
        sparse.csr_matrix(np.eye(3, dtype=np.float32)),
        obs,
        uns={"rank": {"names": names}, "s": "text", "n": 1.5},
    )
    old_format, anndata.settings.zarr_write_format = anndata.settings.zarr_write_format, zarr_format
    try:
        data.write_zarr(tmp_path / "a.zarr")
    finally:
        anndata.settings.zarr_write_format = old_format
    check_tree(tmp_path / "a.zarr")
    group = zarr.create_group(tmp_path / "z.zarr", zarr_format=zarr_format)
    for i, dtype in enumerate(["?", "i1", ">u2", "<f2", "c8", "M8[s]", "m8[ns]", "S5", "U3", "V4"]):
        group.create_array(f"a{i}", shape=(7, 5), chunks=(3, 2), dtype=dtype)
    check_tree(tmp_path / "z.zarr")
    opened = zarr.open_group(Location(tmp_path / "z.zarr").zarr(read_only=True), mode="r")
    assert len(list(opened.arrays())) == 10
