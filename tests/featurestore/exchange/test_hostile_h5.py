"""Feature files that claim what cannot be: one line, little memory, and nothing of other files is read."""

import tracemalloc
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from featurestore.errors import FeatureStoreError
from featurestore.exchange.external import check_array
from featurestore.exchange.importing import ImportOptions, import_embeddings

CORNERS = np.argwhere(np.ones((5, 7), bool))[:, ::-1] * 64
FEATURES = np.random.default_rng(1).standard_normal((len(CORNERS), 3)).astype(np.float32)
ATTRS = {"patch_size": 64, "patch_size_level0": 64, "overlap": 0, "level0_width": 448, "level0_height": 320}
OPTIONS = ImportOptions(slide_mpp=0.5, encoder="e")


def _write(path: Path, attrs: dict[str, Any]) -> Path:
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = FEATURES, CORNERS
        file["coords"].attrs.update({**ATTRS, **attrs})
    return path


def _refused(file: Path, options: ImportOptions = OPTIONS) -> str:
    tracemalloc.start()
    with pytest.raises(FeatureStoreError) as refused:
        import_embeddings(file, file.parent / "store", options)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 << 20
    assert not (file.parent / "store").exists()
    message = str(refused.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 1000
    return message


@pytest.mark.parametrize("name", ["patch_size", "patch_size_level0", "level0_width", "overlap"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), b"\xff\xfe", "many", 1e300, [[]], 2**63])
def test_attributes_that_are_no_positive_number_are_named(tmp_path: Path, name: str, value: Any) -> None:
    assert name in _refused(_write(tmp_path / "A.h5", {name: value}))


@pytest.mark.parametrize("name", ["patch_size", "patch_size_level0", "level0_width"])
def test_zero_is_no_size(tmp_path: Path, name: str) -> None:
    assert name in _refused(_write(tmp_path / "A.h5", {name: 0}))


def test_an_overlap_of_a_whole_patch_is_refused(tmp_path: Path) -> None:
    assert "overlap of 64 px" in _refused(_write(tmp_path / "A.h5", {"overlap": 64}))


def test_a_slide_of_two_billion_pixels_a_side_takes_no_memory(tmp_path: Path) -> None:
    attrs = {"level0_width": 2**31 - 1, "level0_height": 2**31 - 1}
    assert "positions of patches" in _refused(_write(tmp_path / "A.h5", attrs))


def test_an_array_that_claims_more_than_the_file_can_hold_is_not_read(tmp_path: Path) -> None:
    for name in ("features", "coords"):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["features"], file["coords"] = FEATURES, CORNERS
            del file[name]
            # Chunks that are not there read as zeros: 8 EiB in a file of a few kB.
            file.create_dataset(name, (2**58, 2), "<f4" if name == "features" else "<i8", chunks=(1024, 2))
        assert "claims" in _refused(tmp_path / f"{name}.h5")


def test_a_large_array_is_bounded_by_its_file() -> None:
    check_array("x", (10**6, 1024), np.dtype("f2"), 10**9)
    with pytest.raises(FeatureStoreError, match="claims"):
        check_array("x", (10**6, 1024), np.dtype("f2"), 10**6)


def test_numbers_in_other_files_and_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(FEATURES.tobytes())
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["features"] = FEATURES
    layout = h5py.VirtualLayout(FEATURES.shape, "f4")
    layout[...] = h5py.VirtualSource(tmp_path / "other.h5", "features", FEATURES.shape)
    with h5py.File(tmp_path / "external.h5", "w") as file:
        file["coords"] = CORNERS
        file.create_dataset(
            "features", FEATURES.shape, "f4", external=[(str(tmp_path / "secret"), 0, FEATURES.nbytes)]
        )
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        file["coords"] = CORNERS
        file.create_virtual_dataset("features", layout)
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["coords"] = CORNERS
        file["features"] = h5py.ExternalLink("other.h5", "features")
    with h5py.File(tmp_path / "group.h5", "w") as file:
        file["coords"] = CORNERS
        file.create_group("features")
    with h5py.File(tmp_path / "text.h5", "w") as file:
        file["coords"] = CORNERS
        file["features"] = ["a"] * len(CORNERS)
    with h5py.File(tmp_path / "empty.h5", "w") as file:
        file["coords"] = CORNERS
        file["features"] = h5py.Empty("f4")
    for name, said in (
        ("external", "in other files"),
        ("virtual", "in other files"),
        ("link", "no dataset of this file"),
        ("group", "no dataset of this file"),
        ("text", "not of numbers"),
        ("empty", "is empty"),
    ):
        assert said in _refused(tmp_path / f"{name}.h5")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e12, -1e300])
def test_corners_that_are_no_places_are_refused(tmp_path: Path, value: float) -> None:
    corners = CORNERS.astype(float)
    corners[3, 1] = value
    with h5py.File(tmp_path / "A.h5", "w") as file:
        file["features"], file["coords"] = FEATURES, corners
        file["coords"].attrs.update(ATTRS)
    assert "coordinates of 1 patches" in _refused(tmp_path / "A.h5")


@pytest.mark.parametrize("shape", [(0, 3), (35,), (35, 0), (5, 7, 3), ()])
def test_shapes_that_do_not_belong_together_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with h5py.File(tmp_path / "A.h5", "w") as file:
        file["features"], file["coords"] = np.zeros(shape, np.float32), CORNERS
    _refused(tmp_path / "A.h5")


def test_a_file_that_is_cut_off_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    whole = _write(tmp_path / "whole.h5", {}).read_bytes()
    for name, data in (("cut", whole[: len(whole) // 2]), ("text", b"no"), ("empty", b"")):
        (tmp_path / f"{name}.h5").write_bytes(data)
        _refused(tmp_path / f"{name}.h5")
    for name in ("a\0b.h5", "n" * 5000 + ".h5"):
        with pytest.raises(FeatureStoreError):
            import_embeddings(tmp_path / name, tmp_path / "store", OPTIONS)
