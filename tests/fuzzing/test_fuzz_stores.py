"""Any change to the metadata of a store is read, refused in one line, or shown by `validate`: never a traceback."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile_values import changed_bytes, files_around, refuses_or_reads, run_default, run_long
from hypothesis import given
from hypothesis import strategies as st

from featurestore.storage.catalogue import catalogue
from featurestore.storage.selection import open_slides
from featurestore.storage.store import Store
from featurestore.storage.tree import open_store
from featurestore.storage.validation import validate
from histosge.data.embedded_slide import load_patches, open_embedded

ARCHIVE = Path(__file__).parents[1] / "contracts" / "data" / "written_by_6995a84.zip"
GRID = "mpp1.0000_px48_stride24"
DOCUMENTS = [
    "zarr.json",
    "S1/zarr.json",
    f"S1/{GRID}/zarr.json",
    f"S1/{GRID}/tissue/zarr.json",
    f"S1/{GRID}/rgb/zarr.json",
    f"S1/{GRID}/y/zarr.json",
    f"S1/{GRID}/colour/zarr.json",
    f"S1/{GRID}/colour/embedding/zarr.json",
]


def _read_grid(url: str) -> None:
    store = Store.open(url)
    for grid_key in store.grid_keys("S1"):
        store.grid("S1", grid_key)


READERS: list[Callable[[str], object]] = [
    catalogue,
    validate,
    _read_grid,
    open_store,
    lambda url: [slide.read_tissue() for slide in open_slides(Store.open(url), None, None, None)[0]],
    lambda url: load_patches(open_embedded(Store.open(url), "S1", None, None)),
]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("old")
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(home)
    # The slide's documents are changed one by one: its consolidated copy of them would be read in their place.
    file = home / "store.zarr" / "S1" / "zarr.json"
    document = json.loads(file.read_text())
    (home / "consolidated.json").write_text(json.dumps(document))
    document.pop("consolidated_metadata")
    file.write_text(json.dumps(document))
    return home


def _change_and_read(old: Path, data: st.DataObject, name: str, document: str) -> None:
    file = old / "store.zarr" / name
    original, around = file.read_bytes(), files_around(old / "store.zarr")
    try:
        file.write_bytes(data.draw(changed_bytes(json.loads(document))))
        for reader in READERS:
            refuses_or_reads(lambda reader=reader: reader(str(old / "store.zarr")))
    finally:
        file.write_bytes(original)
    assert files_around(old / "store.zarr") == around


def _any_document(old: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*DOCUMENTS, "consolidated"]))
    if name == "consolidated":
        _change_and_read(old, data, "S1/zarr.json", (old / "consolidated.json").read_text())
    else:
        _change_and_read(old, data, name, (old / "store.zarr" / name).read_text())


@run_default
@given(data=st.data())
def test_any_change_of_a_document_is_refused_or_read(old: Path, data: st.DataObject) -> None:
    _any_document(old, data)


@pytest.mark.slow
@run_long
@given(data=st.data())
def test_many_changes_of_documents_are_refused_or_read(old: Path, data: st.DataObject) -> None:
    _any_document(old, data)
