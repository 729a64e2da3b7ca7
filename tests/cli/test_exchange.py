"""Embeddings go out to other tools' files and come back the same."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pytest
import zarr
from make_slides import tissue_like, write_pyramid

from featurestore.storage.catalogue import catalogue
from featurestore.storage.store import Store
from featurestore.storage.validation import validate

Histosge = Callable[..., NamedTuple]
GRID = "mpp1.0000_px32_stride16"


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return write_pyramid(tmp_path / "A.tif", tissue_like(900, 800, 0.5), 0.5)


@pytest.fixture
def store(histosge: Histosge, slide: Path, tmp_path: Path) -> Path:
    options = ("--mpp", 1.0, "--patch", 32, "--stride", 16, "--encoder", "colour")
    assert histosge("embed", slide, tmp_path / "store", *options).code == 0
    return tmp_path / "store"


def _values(store: Path, encoder: str = "colour") -> np.ndarray:
    array = Store.open(str(store)).embedding("A", GRID, encoder)
    return array.read((0, array.shape[0]), (0, array.shape[1]))


def test_out_as_trident_writes_and_in_again_is_the_same(
    histosge: Histosge, store: Path, slide: Path, tmp_path: Path
) -> None:
    ran = histosge("export", store, tmp_path / "out", "--to", "trident")
    assert ran.code == 0
    with h5py.File(tmp_path / "out" / "A.h5") as file:
        said = dict(file["coords"].attrs)
        assert (said["patch_size"], said["patch_size_level0"], said["overlap"]) == (32, 64, 16)
        assert (said["level0_magnification"], said["target_magnification"]) == (20, 10)
        assert (said["level0_width"], said["level0_height"]) == (900, 800)
        coords, features = file["coords"][...], file["features"][...]
        assert file["features"].attrs["encoder"] == "colour"
    before = _values(store)
    x, y = coords.T
    np.testing.assert_array_equal(features, before[y // 32, x // 32].astype(np.float32))
    assert len(coords) == np.isfinite(before).all(axis=2).sum()

    back = tmp_path / "back"
    ran = histosge("import", tmp_path / "out" / "A.h5", back, "--slide", slide)
    assert ran.code == 0, ran.err
    assert f"{len(coords)} patches imported as {GRID}" in ran.out
    np.testing.assert_array_equal(_values(back), before)
    assert validate(str(back), deep=True) == []
    originals, imported = (catalogue(str(s))["fingerprint"][0] for s in (store, back))
    assert originals != imported  # nobody can tell how the file's vectors were made
    again = histosge("import", tmp_path / "out" / "A.h5", back, "--slide", slide)
    assert again.code == 0
    np.testing.assert_array_equal(_values(back), before)


def _clam(path: Path) -> np.ndarray:
    rows, cols = np.nonzero(np.random.default_rng(0).random((9, 11)) > 0.3)
    coords = np.stack([cols, rows], axis=1) * 256
    with h5py.File(path, "w") as file:
        file["features"] = np.random.default_rng(1).standard_normal((len(rows), 7)).astype(np.float32)
        file["coords"] = coords
    return coords


def test_a_clam_file_comes_in_once_its_scale_is_options(histosge: Histosge, tmp_path: Path) -> None:
    coords = _clam(tmp_path / "B.h5")
    options = ("--slide-mpp", 0.25, "--mpp", 0.25, "--patch", 256, "--encoder", "ctranspath")
    for missing in (options[:2] + options[6:], options[:6], options[2:]):
        ran = histosge("import", tmp_path / "B.h5", tmp_path / "none", *missing)
        assert ran.code == 2
        assert len(ran.err.strip().splitlines()) == 1
        assert not (tmp_path / "none").exists()
    ran = histosge("import", tmp_path / "B.h5", tmp_path / "in", *options)
    assert ran.code == 0, ran.err
    (row,) = catalogue(str(tmp_path / "in")).to_dicts()
    assert (row["slide"], row["encoder"], row["state"], row["patches"]) == (
        "B",
        "ctranspath",
        "done",
        len(coords),
    )
    assert validate(str(tmp_path / "in"), deep=True) == []


def _raw2features(path: Path, models: tuple[str, ...] = ("uni",)) -> np.ndarray:
    rows, cols = np.nonzero(np.random.default_rng(0).random((6, 8)) > 0.4)
    root = zarr.create_group(path, zarr_format=2)
    grid = root.create_group("grids/mpp0.5_px224")
    grid.attrs["raw2features"] = {
        "schema_version": "0.1",
        "source": {
            "uri": "x.ome.zarr",
            "slide_id": "X",
            "mpp_level0": 0.25,
            "level_dimensions": [[4000, 3000]],
        },
        "patching": {
            "target_mpp": 0.5,
            "achieved_mpp": 0.5,
            "patch_px": 224,
            "level0_patch": 448,
            "level0_step": 448,
        },
        "models": {name: {"embedding_dim": 5, "pooling": "cls"} for name in models},
    }
    coords = (np.stack([cols, rows], axis=1) * 448).astype(np.int32)
    grid.create_array("coords", data=coords)
    features = grid.create_group("features")
    for i, name in enumerate(models):
        features.create_array(
            name, data=np.random.default_rng(i).standard_normal((len(rows), 5)).astype(np.float16)
        )
    return coords


def test_a_raw2features_store_comes_in(histosge: Histosge, tmp_path: Path) -> None:
    coords = _raw2features(tmp_path / "X.embeddings.zarr")
    ran = histosge("import", tmp_path / "X.embeddings.zarr", tmp_path / "in")
    assert ran.code == 0, ran.err
    store = Store.open(str(tmp_path / "in"))
    grid = store.grid("X", "mpp0.5000_px224_stride224").grid
    assert (grid.slide_mpp, grid.effective_mpp, grid.shape) == (0.25, 0.5, (6, 8))
    array = store.embedding("X", grid.spec.key, "uni")
    values = array.read((0, 6), (0, 8))
    source = zarr.open_group(tmp_path / "X.embeddings.zarr", mode="r")["grids/mpp0.5_px224/features/uni"][...]
    np.testing.assert_array_equal(values[coords[:, 1] // 448, coords[:, 0] // 448], source)
    assert validate(str(tmp_path / "in"), deep=True) == []


def test_a_choice_is_asked_for_and_what_is_no_such_file_refused(histosge: Histosge, tmp_path: Path) -> None:
    _raw2features(tmp_path / "X.embeddings.zarr", ("uni", "conch"))
    ran = histosge("import", tmp_path / "X.embeddings.zarr", tmp_path / "in")
    assert ran.code == 2
    assert "name one with --encoder: conch, uni" in ran.err
    (tmp_path / "text.h5").write_text("no")
    (tmp_path / "empty").mkdir()
    for name in ("text.h5", "empty", "absent.h5"):
        ran = histosge("import", tmp_path / name, tmp_path / "in")
        assert ran.code == 2
        assert len(ran.err.strip().splitlines()) == 1
    assert histosge("export", tmp_path / "in", tmp_path / "o", "--to", "clam").code == 2
    assert not (tmp_path / "in").exists()
