"""Embeddings that are missing and spots without a patch: left out, counted, and refused only if none is left."""

import shutil
from pathlib import Path

import anndata
import numpy as np
import pytest

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from featurestore.storage.store import Store
from histosge.data.embedded_slide import load_patches, open_embedded
from histosge.data.section_loading import Selection, load_sections
from histosge.errors import ExpressionError
from histosge.prediction.expression_store import ExpressionStore
from histosge.prediction.predict import predict
from histosge.synthetic import GeneCounts, SyntheticSpec, make_cohort
from histosge.training.train import TrainSettings, train

MPP = 0.5
GRID = GridSpec(mpp=1.0, patch_px=48, stride_px=24)
SPEC = SyntheticSpec(
    size_px=(1208, 1128), mpp=MPP, genes=GeneCounts(6, 5, 3, 3), spot_diameter_um=41.0, spot_pitch_um=59.0
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    sheet = make_cohort(folder, SPEC, 1).sheet
    embed(str(sheet), str(folder / "store"), EmbedSettings(encoders=("colour",), spec=GRID))
    return folder


def _sheet(made: Path, folder: Path, data: anndata.AnnData) -> str:
    data.write_h5ad(folder / "spots.h5ad")
    slide = next(path for path in made.iterdir() if path.name.startswith("S1") and "tif" in path.suffix)
    sheet = folder / "sheet.csv"
    sheet.write_text(f"slide_id,slide,expression,mpp\nS1,{slide},{folder / 'spots.h5ad'},{MPP}\n")
    return str(sheet)


def _train(sheet: str, store: Path, model: Path, preset: str) -> list[str]:
    messages: list[str] = []
    settings = TrainSettings(preset=preset, genes=5, epochs=2, intervals=False)
    train(sheet, str(store), model, settings, on_message=messages.append)
    return messages


@pytest.mark.parametrize("preset", ["dense", "ridge"])
def test_patches_without_an_embedding_are_masked_within_windows_and_stay_nan_in_the_map(
    made: Path, tmp_path: Path, preset: str
) -> None:
    store = tmp_path / "store"
    shutil.copytree(made / "store", store)
    slide = open_embedded(Store.open(str(store)), "S1", None, None)
    whole = load_patches(slide)
    middle = np.median(whole.rows), np.median(whole.cols)
    nearest = np.argsort(np.hypot(whole.rows - middle[0], whole.cols - middle[1]))[:7]
    lost = set(zip(whole.rows[nearest].tolist(), whole.cols[nearest].tolist(), strict=True))
    _spoil(store, lost)
    left = load_patches(open_embedded(Store.open(str(store)), "S1", None, None))
    assert len(left) == len(whole) - 7
    _train(str(made / "cohort.csv"), store, tmp_path / "model", preset)
    predict(str(store), tmp_path / "model", str(tmp_path / "out"))
    stored = ExpressionStore.open(str(tmp_path / "out")).map("S1", GRID.key)
    values = stored.array.read((0, stored.grid.n_rows), (0, stored.grid.n_cols))
    assert np.isfinite(values[left.rows, left.cols]).all()
    rows, cols = zip(*lost, strict=True)
    assert np.isnan(values[list(rows), list(cols)]).all()


def _spoil(store: Path, lost: set[tuple[int, int]]) -> None:
    """Write NaN over some embeddings."""
    import zarr

    (path,) = [p.parent for p in store.rglob("zarr.json") if p.parent.name == "embedding"]
    array = zarr.open_array(str(path), mode="r+")
    for row, col in lost:
        array[row, col] = np.nan


def test_spots_with_no_patch_are_named_left_out_and_counted(made: Path, tmp_path: Path) -> None:
    data = anndata.read_h5ad(made / "S1.h5ad")
    before = load_sections(_sheet(made, tmp_path, data), str(made / "store"), Selection())[0]
    assert before.uncovered == ()
    width_px = SPEC.size_px[0]
    xy = np.array(data.obsm["spatial"], dtype=float)
    xy[:3] = [[width_px + 60, 211], [width_px + 60, 307], [width_px + 60, 401]]
    data.obsm["spatial"] = xy
    messages: list[str] = []
    after = load_sections(
        _sheet(made, tmp_path, data), str(made / "store"), Selection(), on_message=messages.append
    )[0]
    assert after.uncovered == tuple(data.obs_names[:3])
    assert len(after.section.spots) == len(before.section.spots) - 3
    assert any("3 off tissue left out" in line for line in messages)
    assert f"S1: no embedded patch under {', '.join(data.obs_names[:3])}" in messages


def test_spots_that_all_lie_elsewhere_are_refused_with_the_likely_cause(made: Path, tmp_path: Path) -> None:
    data = anndata.read_h5ad(made / "S1.h5ad")
    data.obsm["spatial"] = np.array(data.obsm["spatial"]) + 50_000.0
    with pytest.raises(ExpressionError) as refused:
        _train(_sheet(made, tmp_path, data), made / "store", tmp_path / "model", "ridge")
    assert "\n" not in str(refused.value)
    assert "spots" in str(refused.value)
    assert not (tmp_path / "model").exists()
