"""Nothing is orphaned: what commit 6995a84 wrote is opened, checked, gone on with, used and exported.

`data/make_old_files.py` says how the archive was made. It is never made again with a later commit.
"""

import json
import shutil
import zipfile
from pathlib import Path

import anndata
import numpy as np
import pytest
from threadpoolctl import threadpool_info

from featurestore.embedding.embed import EmbedSettings, SlideResult, embed
from featurestore.grid import GridSpec
from featurestore.storage.catalogue import catalogue
from featurestore.storage.store import Store
from featurestore.storage.validation import validate
from histosge.data.embedded_slide import load_patches, open_embedded
from histosge.data.sections import Patches
from histosge.errors import ModelError
from histosge.exporting.export import export
from histosge.prediction.expression_store import ExpressionStore
from histosge.prediction.predict import predict
from histosge.training.saved_model import load_model

ARCHIVE = Path(__file__).parent / "data" / "written_by_6995a84.zip"
GRID = GridSpec(mpp=1.0, patch_px=48, stride_px=24)
EMBEDDED = EmbedSettings(encoders=("colour",), spec=GRID, block_shape=(7, 11))
PRESETS = ("dense", "dense+attention", "dense+spots", "gp", "knn", "mean", "paper", "ridge")
REFUSED: tuple[str, ...] = ()
"""Presets whose old folders are no longer loaded, but refused with the command that trains them again."""
OLD_KERNELS = {"SkylakeX"}
"""OpenBLAS's name for the processor that predicted `expected.npz`; another one's products differ in the last bits."""
OLD_VENDOR = "AuthenticAMD"
"""Of that processor: torch's MKL has other kernels for each maker, where OpenBLAS has the same."""
OF_TORCH = {"paper"}
"""Presets that are predicted by a network of torch."""


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What lies in the archive; read-only: tests that write take `copy`."""
    home = tmp_path_factory.mktemp("old")
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(home)
    return home


@pytest.fixture
def copy(old: Path, tmp_path: Path) -> Path:
    return shutil.copytree(old, tmp_path / "copy")


@pytest.fixture(scope="module")
def patches(old: Path) -> Patches:
    return load_patches(open_embedded(Store.open(str(old / "store.zarr")), "S1", None, None))


def _written(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder: when it was written, and its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def _objects(folder: Path) -> list[Path]:
    """Every stored object of an array: the files below `c`."""
    return sorted(path for path in (folder / "c").rglob("*") if path.is_file())


def _embed(home: Path) -> list[SlideResult]:
    return embed(str(home / "cohort" / "cohort.csv"), str(home / "store.zarr"), EMBEDDED)


def _same_kernels(preset: str = "dense") -> bool:
    found = {info["architecture"] for info in threadpool_info() if info["internal_api"] == "openblas"}
    processors = Path("/proc/cpuinfo")
    is_old_vendor = processors.is_file() and OLD_VENDOR in processors.read_text()
    return found == OLD_KERNELS and (is_old_vendor or preset not in OF_TORCH)


def _assert_only_this_file_was_written_again(
    before: dict[str, tuple[int, bytes]], folder: Path, name: str
) -> None:
    after = _written(folder)
    assert after.keys() == before.keys()
    assert {path for path in after if after[path][0] != before[path][0]} == {name}


class TestOldStore:
    def test_it_is_whole(self, old: Path) -> None:
        assert Store.open(str(old / "store.zarr")).slide_ids() == ["S1", "S2"]
        assert validate(str(old / "store.zarr"), deep=True) == []

    def test_the_catalogue_says_what_the_files_say(self, old: Path) -> None:
        rows = catalogue(str(old / "store.zarr")).to_dicts()
        assert [row["slide"] for row in rows] == ["S1", "S2"]
        for row in rows:
            array = old / "store.zarr" / row["slide"] / GRID.key / "colour" / "embedding"
            encoder = json.loads((array / "zarr.json").read_text())["attributes"]["encoder"]
            objects = _objects(array)
            assert (row["grid"], row["encoder"], row["state"]) == (GRID.key, "colour", "done")
            assert row["done"] == row["planned"] == len(objects) > 8
            assert row["bytes"] == sum(path.stat().st_size for path in objects)
            assert row["fingerprint"] == encoder["fingerprint"]
            assert (row["unreadable"], row["reason"]) == (0, None)

    def test_to_embed_again_is_nothing_to_do(self, copy: Path) -> None:
        before = _written(copy / "store.zarr")
        results = _embed(copy)
        assert [(result.state, result.computed) for result in results] == [("done", 0), ("done", 0)]
        assert _written(copy / "store.zarr") == before

    def test_a_lost_object_is_computed_again_to_the_byte_and_no_other(self, copy: Path) -> None:
        store = copy / "store.zarr"
        before = _written(store)
        lost = _objects(store / "S1" / GRID.key / "colour" / "embedding")[5]
        lost.unlink()
        assert [result.computed for result in _embed(copy)] == [1, 0]
        _assert_only_this_file_was_written_again(before, store, str(lost.relative_to(store)))
        assert lost.read_bytes() == before[str(lost.relative_to(store))][1]


class TestOldModels:
    @pytest.mark.parametrize("preset", PRESETS)
    def test_it_predicts_what_it_predicted_then_or_is_refused_with_the_command(
        self, old: Path, patches: Patches, preset: str
    ) -> None:
        if preset in REFUSED:
            with pytest.raises(ModelError, match=r"^[^\n]*histosge train[^\n]*$"):
                load_model(old / "models" / preset)
            return
        expected = np.load(old / "expected.npz")[preset]
        saved = load_model(old / "models" / preset)
        found = saved.model.predict(patches)
        assert found.shape == (len(patches), len(saved.card.genes))
        if _same_kernels(preset):
            assert np.array_equal(found, expected)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)

    def test_every_folder_of_the_archive_is_looked_at(self, old: Path) -> None:
        assert sorted(path.name for path in (old / "models").iterdir()) == sorted(PRESETS)


class TestOldMaps:
    def test_it_holds_what_its_model_predicted(self, old: Path, patches: Patches) -> None:
        store = ExpressionStore.open(str(old / "maps.zarr"))
        assert list(store.maps()) == [("S1", GRID.key)]
        stored = store.map("S1", GRID.key)
        assert stored.genes == load_model(old / "models" / "dense").card.genes
        values = stored.array.read((0, stored.grid.n_rows), (0, stored.grid.n_cols))
        expected = np.load(old / "expected.npz")["dense"]
        # The map was predicted block by block: single precision's own noise, then the step of half precision.
        np.testing.assert_allclose(values[patches.rows, patches.cols], expected, atol=5e-3)
        assert np.isfinite(values).all(axis=2).sum() == len(patches)

    def test_to_predict_again_is_nothing_to_do(self, copy: Path) -> None:
        before = _written(copy / "maps.zarr")
        (result,) = _predict(copy)
        assert result[0] == 0 < result[1]
        assert _written(copy / "maps.zarr") == before

    def test_a_lost_object_is_predicted_again_to_the_byte(self, copy: Path) -> None:
        maps = copy / "maps.zarr"
        before = _written(maps)
        lost = _objects(maps / "S1" / GRID.key / "expression")[4]
        lost.unlink()
        assert [computed for computed, _ in _predict(copy)] == [1]
        after = _written(maps)
        depth = str(lost.relative_to(maps)).replace("expression", "depth")
        written = {path for path in after if after[path][0] != before[path][0]}
        # A block's depth is written beside its genes.
        assert written == {str(lost.relative_to(maps)), depth}
        if _same_kernels():
            assert {path: data for path, (_, data) in after.items()} == {
                path: data for path, (_, data) in before.items()
            }

    def test_it_is_exported(self, old: Path, tmp_path: Path, patches: Patches) -> None:
        export(str(old / "maps.zarr"), tmp_path / "S1.h5ad", "h5ad")
        written = anndata.read_h5ad(tmp_path / "S1.h5ad")
        assert written.shape == (len(patches), len(load_model(old / "models" / "dense").card.genes))


def _predict(home: Path) -> list[tuple[int, int]]:
    """Predict into the old maps: objects computed and planned of each slide."""
    results = predict(
        str(home / "store.zarr"), home / "models" / "dense", str(home / "maps.zarr"), slide_ids=["S1"]
    )
    return [(result.computed, result.planned) for result in results]
