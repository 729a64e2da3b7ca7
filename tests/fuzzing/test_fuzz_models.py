"""Any change to a model's configuration or tensors, and to the metadata of a map, is refused in one line or harmless."""

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hostile_values import changed_bytes, files_around, refuses_or_reads, run_default, run_long
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from histosge.prediction.expression_catalogue import expression_catalogue
from histosge.prediction.expression_store import ExpressionStore
from histosge.prediction.expression_validation import validate_expression
from histosge.training.model_files import CONFIG, WEIGHTS
from histosge.training.saved_model import load_model

ARCHIVE = Path(__file__).parents[1] / "contracts" / "data" / "written_by_6995a84.zip"
PRESETS = ("dense", "dense+spots", "gp", "knn", "mean", "ridge")
GRID = "mpp1.0000_px48_stride24"
MAP_PARTS = ("", "/gene", "/tissue", "/rgb", "/trust", "/depth", "/expression")
MAP_DOCUMENTS = ["", "S1", *(f"S1/{GRID}{name}" for name in MAP_PARTS)]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("old")
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(home)
    return home


def _sign(folder: Path, data: bytes) -> bytes:
    """Give a configuration the fingerprint that belongs to it, where it is still one."""
    try:
        document = json.loads(data)
        parts = [document["card"], document["model"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return data
    if document.get("calibration"):
        parts.append(document["calibration"])
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes() + json.dumps(parts, sort_keys=True).encode())
    return json.dumps(document | {"fingerprint": digest.hexdigest()}).encode()


def _change_model(old: Path, data: st.DataObject) -> None:
    folder = old / "models" / data.draw(st.sampled_from(PRESETS))
    originals = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    around = files_around(folder)
    try:
        if data.draw(st.booleans()):
            state = load_file(folder / WEIGHTS)
            name = data.draw(st.sampled_from(sorted(state)))
            shape = tuple(data.draw(st.lists(st.sampled_from([0, 1, 2, 5, 6, 10, 13, 30]), max_size=3)))
            fill = data.draw(st.sampled_from([0.0, 1.0, -1.0, 1e30, np.inf, np.nan]))
            dtype = data.draw(st.sampled_from(["float64", "float32", "float16", "int64", "uint8", "bool"]))
            with np.errstate(all="ignore"):
                state[name] = np.full(shape, fill).astype(dtype)
            save_file(state, folder / WEIGHTS)
            changed = originals[CONFIG]
        else:
            changed = data.draw(changed_bytes(json.loads(originals[CONFIG])))
        (folder / CONFIG).write_bytes(_sign(folder, changed))
        refuses_or_reads(lambda: load_model(folder))
    finally:
        for name, content in originals.items():
            (folder / name).write_bytes(content)
    assert files_around(folder) == around


def _change_map(old: Path, data: st.DataObject) -> None:
    url = str(old / "maps.zarr")
    file = old / "maps.zarr" / data.draw(st.sampled_from(MAP_DOCUMENTS)) / "zarr.json"
    original = file.read_bytes()
    try:
        file.write_bytes(data.draw(changed_bytes(json.loads(original))))
        refuses_or_reads(lambda: expression_catalogue(url))
        refuses_or_reads(lambda: validate_expression(url))
        refuses_or_reads(lambda: ExpressionStore.open(url).map("S1", GRID).read_with_bounds((0, 3), (0, 5)))
    finally:
        file.write_bytes(original)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on tensors of absurd values
@run_default
@given(data=st.data())
def test_any_change_of_a_model_is_refused_or_read(old: Path, data: st.DataObject) -> None:
    _change_model(old, data)


@run_default
@given(data=st.data())
def test_any_change_of_a_map_s_metadata_is_refused_or_read(old: Path, data: st.DataObject) -> None:
    _change_map(old, data)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@run_long
@given(data=st.data())
def test_many_changes_of_models_are_refused_or_read(old: Path, data: st.DataObject) -> None:
    _change_model(old, data)


@pytest.mark.slow
@run_long
@given(data=st.data())
def test_many_changes_of_maps_are_refused_or_read(old: Path, data: st.DataObject) -> None:
    _change_map(old, data)
