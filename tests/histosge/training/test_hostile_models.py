"""A model folder that somebody else wrote: one line about what does not fit, and nothing in it is imported or run."""

import hashlib
import json
import os
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from histosge.errors import ModelError
from histosge.models.dense import DenseModel
from histosge.models.low_rank_targets import LowRankTargets
from histosge.models.scale_ridges import ScaleRidges
from histosge.training.model_files import CONFIG, WEIGHTS
from histosge.training.saved_model import load_model, save_model

ARCHIVE = Path(__file__).parents[2] / "contracts" / "data" / "written_by_6995a84.zip"
PRESETS = ("dense", "dense+attention", "dense+spots", "gp", "knn", "mean", "paper", "ridge")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(tmp_path, [name for name in archive.namelist() if name.startswith("models/")])
    return tmp_path / "models"


def sign(folder: Path) -> None:
    """Write the fingerprint that belongs to the files: whoever changes a model can do that, too."""
    document = json.loads((folder / CONFIG).read_text())
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes())
    parts = [document.get("card"), document.get("model")]
    if document.get("calibration"):
        parts.append(document["calibration"])
    digest.update(json.dumps(parts, sort_keys=True).encode())
    (folder / CONFIG).write_text(json.dumps({**document, "fingerprint": digest.hexdigest()}))


def change_config(folder: Path, *keys: str | int, to: object) -> None:
    document = json.loads((folder / CONFIG).read_text())
    holder: Any = document
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = to
    (folder / CONFIG).write_text(json.dumps(document))
    sign(folder)


def change_tensors(folder: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    state = load_file(folder / WEIGHTS)
    edit(state)
    save_file({name: np.ascontiguousarray(array) for name, array in state.items()}, folder / WEIGHTS)
    sign(folder)


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ModelError, match=rf"^[^\n]*{message}[^\n]*$") as caught:
        load_model(folder)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["os:system", "os:no_such", "no.such.module:Class", "subprocess:Popen"])
def test_the_card_s_class_is_never_imported(models: Path, name: str) -> None:
    change_config(models / "dense", "card", "preset", to=name)
    loaded = set(sys.modules)
    refused(models / "dense", "only imported if you name it")
    # Python loads the codec of a file's text when it first meets it.
    assert {module for module in set(sys.modules) - loaded if not module.startswith("encodings.")} == set()


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("card", "preset"), "no-such", "unknown preset"),
        (("card", "preset"), None, "card.preset is null"),
        (("card", "preset"), "mean", "tensor 'mean' is missing"),
        (("card", "genes"), [], "card.genes is a list of 0"),
        (("card", "genes"), ["a", 7], r"card.genes\[1\] is 7"),
        (("card", "genes"), ["a", "b"], "predicts 13 genes, its card names 2"),
        (("card", "encoder", "dim"), 0, "card.encoder.dim is 0"),
        (("card", "encoder", "dim"), 10**9, "card.encoder.dim is 1000000000"),
        (("card", "encoder", "dim"), 7, "does not go with its weights"),
        (("card", "grid", "mpp"), float("nan"), "card.grid.mpp is NaN"),
        (("card", "grid", "mpp"), 1e-9, "card.grid.mpp is 1e-09"),
        (("card", "grid", "stride_px"), -1, "card.grid.stride_px is -1"),
        (("card", "sections"), "x", 'card.sections is "x"'),
        (("card",), [], "card is a list of 0"),
        (("model",), None, "model is null"),
        (("model", "penalties"), "x", 'model.penalties is "x"'),
        (("model", "penalties"), [[None]], r"model.penalties\[0\]\[0\] is null"),
        (("calibration", "level"), 2, "calibration.level is 2"),
        (("calibration", "depth_strata"), 3, "depth_edge' is missing"),
        (("calibration", "depth_strata"), 10**9, "calibration.depth_strata is 1000000000"),
        (("calibration",), [], "calibration is a list of 0"),
        (("format",), "1", "newer version"),
    ],
)
def test_a_wrong_value_is_named_with_its_field(
    models: Path, keys: tuple[str, ...], value: object, message: str
) -> None:
    change_config(models / "dense", *keys, to=value)
    refused(models / "dense", message)


@pytest.mark.parametrize("preset", [*PRESETS, "new dense"])
def test_every_tensor_is_checked_against_the_others_and_the_card(models: Path, preset: str) -> None:
    folder = models / preset
    if preset == "new dense":
        _save_new_dense(models / "dense", folder)
    original = load_file(folder / WEIGHTS)
    for name, array in original.items():
        changes = {
            "missing": None,
            "one more": np.concatenate([array, array[:1]]),
            "one": array[:1],
            "another rank": array[None],
            "flat": array.ravel() if array.ndim > 1 else array[:, None],
        }
        for what, changed in changes.items():
            state = {key: value for key, value in original.items() if key != name}
            if changed is not None:
                if changed.shape == array.shape:
                    continue
                state[name] = changed
            save_file({k: np.ascontiguousarray(v) for k, v in state.items()}, folder / WEIGHTS)
            sign(folder)
            try:
                load_model(folder)
            except ModelError as error:
                line = str(error)
                assert len(line.splitlines()) == 1, (name, what)
            else:
                pytest.fail(f"{preset}: {name} {what} was taken")


def _save_new_dense(earlier: Path, folder: Path) -> None:
    """Save a model as this version makes it, with the card of an earlier one."""
    old = load_model(earlier)
    n_genes, n_patterns, dim = len(old.card.genes), 3, old.card.encoder["dim"]
    rng = np.random.default_rng(7)
    linear = ScaleRidges(
        rng.standard_normal((dim, 2 * (n_patterns + 1))),
        np.ones(n_patterns + 1),
        (0.0, 80.0),
        ((1.0,),),
        (0.5, 0.5),
    )
    targets = LowRankTargets(np.ones(n_genes), np.ones(n_genes), rng.standard_normal((n_genes, n_patterns)))
    save_model(folder, DenseModel(linear, targets, has_depth=True), old.card, old.intervals)
    load_model(folder)


def test_a_tensor_is_named_with_its_shape_and_the_right_one(models: Path) -> None:
    change_tensors(models / "dense", lambda state: state.update({"targets.sd": np.ones(1)}))
    refused(models / "dense", r"tensor 'targets.sd' has shape \(1,\), and should have \(13\)")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full(13, np.nan), "holds NaN"),
        (np.empty((2**30, 0)), "has shape"),
        (np.empty(0), "should have"),
        (np.ones(13, bool), "should hold numbers"),
        (np.ones(13).astype(np.complex64), "should hold numbers"),
    ],
)
def test_a_tensor_without_usable_numbers_is_refused(models: Path, array: np.ndarray, message: str) -> None:
    if array.dtype.kind == "c":
        _write_raw(models / "dense" / WEIGHTS, {"targets.sd": ("C64", [13], bytes(13 * 8))})
        sign(models / "dense")
        refused(models / "dense", "cannot be read|should hold numbers|does not go|is missing")
        return
    change_tensors(models / "dense", lambda state: state.update({"targets.sd": array}))
    refused(models / "dense", message)


def _write_raw(file: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    header, body = {}, b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F4", "XX"])
def test_a_dtype_that_numpy_lacks_is_refused(models: Path, dtype: str) -> None:
    _write_raw(models / "dense" / WEIGHTS, {"mean": (dtype, [13], bytes(26))})
    sign(models / "dense")
    refused(models / "dense", "cannot be read")


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 8, struct.pack("<Q", 2**63), struct.pack("<Q", 10) + b"{" * 10, b"[" * 10**5]
)
def test_weights_that_are_none_are_refused(models: Path, data: bytes) -> None:
    (models / "dense" / WEIGHTS).write_bytes(data)
    sign(models / "dense")
    refused(models / "dense", "cannot be read")


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"[" * 10**5, b'{"spec": "histosge-model", "spec": 1}', b"\xff", b"1" * 5000]
)
def test_a_config_that_is_none_is_refused(models: Path, data: bytes) -> None:
    (models / "dense" / CONFIG).write_bytes(data)
    refused(models / "dense", "is no saved model")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_fifo_is_no_file_of_a_model(models: Path, name: str) -> None:
    (models / "dense" / name).unlink()
    os.mkfifo(models / "dense" / name)
    refused(models / "dense", "is no saved model|or no file")
