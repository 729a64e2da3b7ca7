"""The real chain on a small slide: store -> model -> map, and what is refused on the way."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest

from featurestore.embedding import EmbedSettings, embed
from featurestore.errors import IdentityMismatchError
from featurestore.grid import GridSpec
from featurestore.store import Store
from histosge.errors import ModelError
from histosge.maps import ExpressionStore
from histosge.prediction import predict, write_h5ad
from histosge.saved import load_model
from histosge.stream import load_patches, open_embedded
from histosge.synthetic import GeneCounts, SyntheticSection, SyntheticSpec, make_section
from histosge.training import TrainSettings, train

SPEC = SyntheticSpec(size_px=(3400, 3000), genes=GeneCounts(8, 4, 4, 4))
GRID = GridSpec(mpp=0.5, patch_px=64, stride_px=48)
SETTINGS = EmbedSettings(("colour",), GRID, block_shape=(16, 16))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chain")


@pytest.fixture(scope="module")
def section(folder: Path) -> SyntheticSection:
    return make_section(folder, SPEC, "A")


@pytest.fixture(scope="module")
def sheet(folder: Path, section: SyntheticSection) -> str:
    path = folder / "sheet.csv"
    path.write_text("slide,expression\nA.tif,A.h5ad\n")
    return str(path)


@pytest.fixture(scope="module")
def store(folder: Path, sheet: str) -> str:
    path = str(folder / "store")
    (result,) = embed(sheet, path, SETTINGS)
    assert result.computed > 4
    return path


@pytest.fixture(scope="module")
def model(folder: Path, sheet: str, store: str) -> Path:
    train(sheet, store, folder / "model", TrainSettings("dense", genes=10))
    return folder / "model"


@pytest.mark.parametrize("preset", ["mean", "knn", "ridge", "dense"])
def test_a_map_made_block_by_block_is_that_of_the_whole_slide(
    folder: Path, sheet: str, store: str, preset: str
) -> None:
    where = folder / f"model-{preset}"
    saved = train(sheet, store, where, TrainSettings(preset, genes=10))
    predict(store, where, str(folder / f"maps-{preset}"))
    stored = ExpressionStore.open(str(folder / f"maps-{preset}")).map("A", GRID.key)
    patches = load_patches(open_embedded(Store.open(store), "A", None, None))
    whole = saved.model.predict(patches)
    grid = stored.grid
    values = stored.array.read((0, grid.n_rows), (0, grid.n_cols))
    np.testing.assert_allclose(values[patches.rows, patches.cols], whole, rtol=2e-3, atol=2e-3)
    assert np.isfinite(values).all(axis=2).sum() == len(patches)


def test_same_seed_same_model_and_a_reloaded_model_predicts_bit_equal(
    folder: Path, sheet: str, store: str, model: Path
) -> None:
    again = train(sheet, store, folder / "again", TrainSettings("dense", genes=10))
    loaded = load_model(model)
    assert loaded.fingerprint == again.fingerprint
    patches = load_patches(open_embedded(Store.open(store), "A", None, None))
    np.testing.assert_array_equal(loaded.model.predict(patches), again.model.predict(patches))


def test_a_network_trained_twice_on_one_seed_is_bit_equal(folder: Path, sheet: str, store: str) -> None:
    settings = TrainSettings("paper", genes=10, epochs=2)
    first, second = (train(sheet, store, folder / f"paper{i}", settings) for i in range(2))
    other = train(sheet, store, folder / "paper2", replace(settings, seed=1))
    assert first.fingerprint == second.fingerprint != other.fingerprint


def test_maps_are_made_once(folder: Path, store: str, model: Path) -> None:
    out = str(folder / "maps-once")
    (first,) = predict(store, model, out)
    (second,) = predict(store, model, out)
    assert first.computed == first.planned > 0
    assert second.computed == 0


def test_another_model_into_the_same_maps_is_refused(
    folder: Path, sheet: str, store: str, model: Path
) -> None:
    out = str(folder / "maps-two")
    predict(store, model, out)
    train(sheet, store, folder / "other", TrainSettings("ridge", genes=10))
    before = (folder / "maps-two" / "A").stat().st_mtime_ns
    with pytest.raises(
        IdentityMismatchError, match=r"preset dense.* now it is .*preset ridge.*give another OUT"
    ):
        predict(store, folder / "other", out)
    assert (folder / "maps-two" / "A").stat().st_mtime_ns == before


def test_a_model_of_another_grid_is_refused_and_nothing_is_written(
    folder: Path, sheet: str, model: Path
) -> None:
    other = str(folder / "coarse")
    embed(sheet, other, replace(SETTINGS, spec=GridSpec(0.5, 64, 64)))
    with pytest.raises(ModelError, match=r"--stride 48"):
        predict(other, model, str(folder / "none"))
    assert not (folder / "none").exists()


def test_a_gene_that_the_model_does_not_know_is_named_with_its_neighbours(store: str, model: Path) -> None:
    gene = load_model(model).card.genes[0]
    with pytest.raises(ModelError, match=f"did you mean .*{gene}"):
        predict(store, model, "none", genes=[gene + "X"])


def test_only_the_genes_asked_for_are_predicted(folder: Path, store: str, model: Path) -> None:
    genes = load_model(model).card.genes
    predict(store, model, str(folder / "two"), genes=[genes[3], genes[1]])
    assert ExpressionStore.open(str(folder / "two")).map("A", GRID.key).genes == (genes[3], genes[1])
    with pytest.raises(IdentityMismatchError, match="give another OUT"):
        predict(store, model, str(folder / "two"), genes=[genes[3], genes[2]])


def test_a_half_embedded_slide_is_refused(folder: Path, store: str, model: Path) -> None:
    half = folder / "half"
    shutil.copytree(store, half)
    next(p for p in half.rglob("embedding/c/*/*/0")).unlink()
    with pytest.raises(ModelError, match="finish it first"):
        predict(str(half), model, str(folder / "none"))
    assert not (folder / "none").exists()


@pytest.mark.parametrize("damage", ["weights cut", "no weights", "card without genes", "no json"])
def test_a_damaged_model_is_refused_in_one_line(tmp_path: Path, model: Path, damage: str) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    weights, config = copy / "model.safetensors", copy / "config.json"
    if damage == "weights cut":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "card without genes":
        document = json.loads(config.read_text())
        del document["card"]["genes"]
        config.write_text(json.dumps(document))
    else:
        config.write_text("{")
    with pytest.raises(ModelError, match=r"train again|histosge train") as caught:
        load_model(copy)
    assert "\n" not in str(caught.value)


def test_a_model_is_not_written_over_something_else(tmp_path: Path, sheet: str, store: str) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("keep me")
    with pytest.raises(ModelError, match="nothing was written"):
        train(sheet, store, tmp_path / "notes", TrainSettings("mean", genes=5))
    assert [p.name for p in (tmp_path / "notes").iterdir()] == ["a.txt"]


def test_anndata_holds_the_map_where_scanpy_looks_for_it(folder: Path, store: str, model: Path) -> None:
    out = str(folder / "maps-h5ad")
    predict(store, model, out)
    stored = ExpressionStore.open(out).map("A", GRID.key)
    rows = write_h5ad(stored, folder / "a.h5ad")
    data = anndata.read_h5ad(folder / "a.h5ad")
    assert data.shape == (rows, 10)
    grid = stored.grid
    row, col = int(data.obs["row"].iloc[7]), int(data.obs["col"].iloc[7])
    np.testing.assert_allclose(data.obsm["spatial"][7], [col * 48 + 32, row * 48 + 32])
    block = stored.array.read((row, row + 1), (col, col + 1))[0, 0]
    np.testing.assert_array_equal(data.X[7], block.astype(np.float32))
    scale = data.uns["spatial"]["A"]["scalefactors"]
    assert scale["spot_diameter_fullres"] == pytest.approx(grid.stride_um / grid.slide_mpp)


READ_WITHOUT_US = """
import sys
import numpy as np, xarray as xr
tree = xr.open_datatree(sys.argv[1], engine="zarr")
node = tree["A"][sys.argv[2]]
values = node["colour"]["embedding"]
assert values.dims == ("y", "x", "feature"), values.dims
assert node["x"].attrs["units"] == node["y"].attrs["units"] == "micrometer"
assert not {"featurestore", "histosge", "torch"} & set(sys.modules)
near = values.sel(y=700, x=800, method="nearest")
np.savez(sys.argv[3], values=values.values, x=node["x"].values, tissue=node["tissue"].values, near=near.values)
"""


def test_a_store_is_read_by_xarray_alone(tmp_path: Path, store: str) -> None:
    out = tmp_path / "read.npz"
    command = [sys.executable, "-c", READ_WITHOUT_US, store, GRID.key, str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    read = np.load(out)
    ours = Store.open(store)
    stored, array = ours.grid("A", GRID.key), ours.embedding("A", GRID.key, "colour")
    grid = stored.grid
    np.testing.assert_array_equal(read["values"], array.read((0, grid.n_rows), (0, grid.n_cols)))
    np.testing.assert_array_equal(read["x"], grid.x_um)
    np.testing.assert_array_equal(read["tissue"], stored.tissue)
    assert (np.isnan(read["values"]).all(axis=2) == (read["tissue"] < 26)).all()
