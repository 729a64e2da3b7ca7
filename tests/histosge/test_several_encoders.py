"""Models of several encoders: one fit each, predictions averaged, also where their grids differ."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import map_coordinates
from typer.testing import CliRunner

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from featurestore.storage.store import Store
from histosge.data.embedded_slide import load_patches, open_embedded
from histosge.data.joined_encoders import read_at
from histosge.data.section_loading import Selection, load_sections
from histosge.errors import ModelError
from histosge.prediction.expression_store import ExpressionStore
from histosge.prediction.predict import PredictSettings, predict
from histosge.synthetic import GeneCounts, SyntheticSpec, make_cohort
from histosge.training.saved_model import load_model
from histosge.training.train import TrainSettings, train
from histosge_cli.main import app

FINE, COARSE = GridSpec(1.0, 48, 24), GridSpec(1.0, 64, 40)
SPEC = SyntheticSpec(
    size_px=(1208, 1128), genes=GeneCounts(7, 5, 3, 2), spot_diameter_um=29.0, spot_pitch_um=53.0
)
N_GENES = 5
# The first encoder's grid has both; the second one's other grid is coarser.
SAME = Selection(FINE.key, "colour", ("morphology",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    sheet = str(make_cohort(folder, SPEC, 2).sheet)
    embed(sheet, str(folder / "same"), EmbedSettings(encoders=("colour", "morphology"), spec=FINE))
    embed(sheet, str(folder / "other"), EmbedSettings(encoders=("colour",), spec=FINE))
    embed(sheet, str(folder / "other"), EmbedSettings(encoders=("morphology",), spec=COARSE))
    for name, selection in (("both", SAME), ("first", Selection(FINE.key, "colour"))):
        settings = TrainSettings(genes=N_GENES, selection=selection)
        train(sheet, folder / "same", folder / name, settings)
    settings = TrainSettings(genes=N_GENES, selection=Selection(FINE.key, "morphology"), intervals=False)
    train(sheet, folder / "same", folder / "second", settings)
    settings = TrainSettings(
        genes=N_GENES, selection=Selection(None, "colour", ("morphology",)), intervals=False
    )
    train(sheet, folder / "other", folder / "two-grids", settings)
    return folder


def _map(out: Path, slide_id: str = "S1") -> np.ndarray:
    store = ExpressionStore.open(str(out))
    stored = store.map(slide_id, FINE.key)
    values = np.full((*stored.is_tissue.shape, N_GENES), np.nan)
    for block in stored.planned():
        values[block.slices] = stored.array.read_block(block)
    return values


def test_the_map_is_the_mean_of_the_maps_of_one_model_for_each_encoder(folder: Path) -> None:
    for name, selection in (("both", Selection()), ("first", Selection()), ("second", Selection())):
        predict(
            folder / "same",
            folder / name,
            folder / f"{name}.zarr",
            PredictSettings(selection),
            slide_ids=["S1"],
        )
    both, first, second = (_map(folder / f"{name}.zarr") for name in ("both", "first", "second"))
    there = np.isfinite(both).all(axis=2)
    assert there.sum() > 200
    np.testing.assert_allclose(both[there], ((first + second) / 2)[there], atol=5e-3)
    assert np.abs(first - second)[there].max() > 0.05


def test_a_map_of_two_grids_is_what_the_model_predicts_from_all_of_the_slide(folder: Path) -> None:
    predict(folder / "other", folder / "two-grids", folder / "two-grids.zarr", slide_ids=["S1"])
    values = _map(folder / "two-grids.zarr")
    store = Store.open(str(folder / "other"))
    slide = open_embedded(store, "S1", FINE.key, "colour", [(COARSE.key, "morphology")])
    patches = load_patches(slide)
    expected = load_model(folder / "two-grids").model.predict(patches)
    np.testing.assert_allclose(values[patches.rows, patches.cols], expected, atol=5e-3)


def test_embeddings_on_another_grid_are_interpolated_over_tissue_alone(folder: Path) -> None:
    store = Store.open(str(folder / "other"))
    fine = open_embedded(store, "S1", FINE.key, "colour")
    coarse = open_embedded(store, "S1", COARSE.key, "morphology")
    rows, cols = np.nonzero(fine.stored.is_tissue)
    found = read_at(coarse.stored, coarse.array, fine.stored.grid, rows, cols)
    # scipy's interpolation of values times tissue, over that of tissue.
    whole = np.zeros((*coarse.stored.is_tissue.shape, 3))
    patches = load_patches(coarse)
    whole[patches.rows, patches.cols] = patches.embedding[:, :3]
    mask = np.zeros(coarse.stored.is_tissue.shape)
    mask[patches.rows, patches.cols] = 1
    at = np.stack([(rows * 24 + 24 - 32) / 40, (cols * 24 + 24 - 32) / 40])
    weight = map_coordinates(mask, at, order=1, mode="grid-constant")
    there = weight > 1e-9
    assert 0 < (~there).sum() < 0.1 * len(rows) or there.all()
    for k in range(3):
        expected = map_coordinates(whole[..., k], at, order=1, mode="grid-constant")[there] / weight[there]
        np.testing.assert_allclose(found[there, k], expected, rtol=2e-4, atol=1e-4)
    assert np.isnan(found[~there]).all()


def test_the_card_names_both_encoders_and_a_loaded_model_predicts_the_same(folder: Path) -> None:
    saved = load_model(folder / "both")
    assert saved.card.encoder["key"] == "colour + morphology"
    assert [encoder["key"] for encoder in saved.encoders] == ["colour", "morphology"]
    assert saved.card.preset == "dense"
    assert saved.intervals is not None
    document = json.loads((folder / "both" / "config.json").read_text())
    assert document["format"] == 2
    assert "colour + morphology" in document["made_with"]["encoder"]
    assert json.loads((folder / "first" / "config.json").read_text())["format"] == 1


def test_the_same_training_again_is_nothing_to_do_and_the_encoders_order_decides_the_grid(
    folder: Path,
) -> None:
    sheet = folder / "cohort.csv"
    again = train(sheet, folder / "same", folder / "both", TrainSettings(genes=N_GENES, selection=SAME))
    assert again.was_there
    swapped = Selection(None, "morphology", ("colour",))
    saved = train(
        sheet,
        folder / "other",
        folder / "swapped",
        TrainSettings(genes=N_GENES, selection=swapped, intervals=False),
    )
    assert saved.card.grid["stride_px"] == COARSE.stride_px


def test_a_store_that_lacks_one_encoder_is_refused_with_the_command_that_makes_it(folder: Path) -> None:
    shutil.copytree(folder / "same", folder / "lacking")
    shutil.rmtree(folder / "lacking" / "S2" / FINE.key / "morphology")
    refused = (
        r"'S2' has no embedding by 'morphology' .* histosge embed SLIDES .* --encoder morphology "
        r"--mpp 1.0 --patch 48 --stride 24"
    )
    with pytest.raises(ModelError, match=refused):
        predict(folder / "lacking", folder / "both", folder / "lacking.zarr", slide_ids=["S2", "S1"])
    assert not (folder / "lacking.zarr").exists()
    # Not the first one: slides are opened one after the other, and this one is set aside.
    results = predict(folder / "lacking", folder / "both", folder / "lacking.zarr")
    assert [bool(result.failed) for result in results] == [result.slide_id == "S2" for result in results]
    assert re.search(refused, results[1].failed)


def test_a_patch_that_one_encoder_lacks_is_left_out(folder: Path) -> None:
    (item, *_) = load_sections(str(folder / "cohort.csv"), str(folder / "same"), SAME)
    (alone, *_) = load_sections(str(folder / "cohort.csv"), str(folder / "same"), replace(SAME, others=()))
    assert item.slide.identity.dim == item.section.patches.embedding.shape[1]
    np.testing.assert_array_equal(item.section.patches.rows, alone.section.patches.rows)
    dim = alone.slide.identity.dim
    np.testing.assert_array_equal(item.section.patches.embedding[:, :dim], alone.section.patches.embedding)
    assert np.isfinite(item.section.patches.embedding).all()


def test_what_takes_one_encoder_says_so(folder: Path) -> None:
    settings = TrainSettings(genes=N_GENES, selection=SAME, stains=True)
    with pytest.raises(ModelError, match="--stains takes one encoder"):
        train(folder / "cohort.csv", folder / "same", folder / "stains", settings)
    with pytest.raises(ModelError, match="--condition-on takes a model of one encoder"):
        predict(
            folder / "same",
            folder / "both",
            folder / "conditioned.zarr",
            slide_ids=["S1"],
            condition_on=folder / "S1.h5ad",
        )


def test_the_command_takes_the_option_twice(folder: Path) -> None:
    arguments = [str(folder / name) for name in ("cohort.csv", "other", "by-command")]
    encoders = ["--encoder", "colour", "--encoder", "morphology"]
    result = CliRunner().invoke(app, ["train", *arguments, "--genes", str(N_GENES), *encoders])
    assert result.exit_code == 0, result.output
    assert "trusted:" in result.output
    assert load_model(folder / "by-command").card.encoder["key"] == "colour + morphology"
