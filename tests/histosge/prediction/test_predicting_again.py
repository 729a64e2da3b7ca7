"""A slide that is predicted again: the same is nothing to do, another model's map is refused or replaced whole."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import xarray as xr
from killed_steps import COUNT_STEPS

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.errors import AmbiguousSelectionError, IdentityMismatchError, StoreError
from featurestore.grid import GridSpec
from histosge.data.section_loading import Selection
from histosge.errors import ModelError
from histosge.prediction.expression_store import ExpressionStore
from histosge.prediction.predict import PredictSettings, predict
from histosge.synthetic import GeneCounts, SyntheticSpec, make_cohort
from histosge.training.saved_model import load_model
from histosge.training.train import TrainSettings, train

SPEC = SyntheticSpec(
    size_px=(808, 760), mpp=0.5, genes=GeneCounts(4, 3, 2, 2), spot_diameter_um=41.0, spot_pitch_um=59.0
)
GRID, FINER = GridSpec(1.0, 48, 48), GridSpec(1.0, 48, 24)
SETTINGS = TrainSettings(preset="ridge", genes=7, intervals=False, selection=Selection(GRID.key, "colour"))


class World(NamedTuple):
    store: Path
    model: Path
    other: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    cohort = make_cohort(folder / "data", SPEC, 2)
    for spec, encoders in ((GRID, ("colour", "morphology")), (FINER, ("colour",))):
        embed(
            cohort.sheet, folder / "store", EmbedSettings(encoders=encoders, spec=spec, block_shape=(3, 100))
        )
    train(cohort.sheet, folder / "store", folder / "model", SETTINGS)
    train(cohort.sheet, folder / "store", folder / "other", replace(SETTINGS, genes=5))
    return World(folder / "store", folder / "model", folder / "other")


def _genes(out: Path, slide_id: str = "S1") -> int:
    return len(ExpressionStore.open(str(out)).map(slide_id, GRID.key).genes)


def _values(out: Path, slide_id: str = "S1") -> np.ndarray:
    with xr.open_zarr(out / slide_id / GRID.key, consolidated=False, zarr_format=3) as data:
        return np.asarray(data["expression"].values)


def test_of_several_grids_and_encoders_the_model_knows_its_own(world: World, tmp_path: Path) -> None:
    results = predict(world.store, world.model, tmp_path / "maps")
    assert [(r.slide_id, r.grid_key) for r in results] == [("S1", GRID.key), ("S2", GRID.key)]
    # Named all the same: the other encoder is refused, as before.
    settings = PredictSettings(Selection(GRID.key, "morphology"))
    with pytest.raises(ModelError, match="trained on encoder 'colour'"):
        predict(world.store, world.model, tmp_path / "maps", settings)
    # A fitted model knows neither.
    fitted = load_model(world.model)
    with pytest.raises(AmbiguousSelectionError):
        predict(world.store, fitted.model, tmp_path / "fitted", genes=fitted.card.genes)


@pytest.mark.parametrize(
    ("slide_id", "hint"),
    [("S3", "did you mean S. or S."), ("tumour", "it holds S1, S2"), ("x" * 5000, "it holds")],
)
def test_a_slide_that_is_not_there_is_refused_with_those_that_are(
    world: World, tmp_path: Path, slide_id: str, hint: str
) -> None:
    with pytest.raises(ModelError, match=hint) as refused:
        predict(world.store, world.model, tmp_path / "maps", slide_ids=[slide_id])
    assert len(str(refused.value)) < 400
    assert not (tmp_path / "maps").exists()


def test_another_models_map_is_refused_and_replaced_where_that_is_wanted(
    world: World, tmp_path: Path
) -> None:
    out = tmp_path / "maps"
    predict(world.store, world.model, out)
    assert [r.computed for r in predict(world.store, world.model, out)] == [0, 0]
    for options in ({}, {"genes": ["nope"], "overwrite": True}):
        with pytest.raises((IdentityMismatchError, ModelError)):
            predict(world.store, world.other, out, slide_ids=["S1"], **options)  # type: ignore[arg-type]
        assert (_genes(out), _genes(out, "S2")) == (7, 7)
    predict(world.store, world.other, out, slide_ids=["S1"], overwrite=True)
    assert (_genes(out), _genes(out, "S2")) == (5, 7)
    predict(world.store, world.other, tmp_path / "alone")
    np.testing.assert_array_equal(_values(out), _values(tmp_path / "alone"))
    assert {path.name for path in (out / "S1").iterdir()} == {GRID.key, "zarr.json"}
    # Consolidated metadata are the new map's.
    document = json.loads((out / "S1" / "zarr.json").read_text())
    assert document["consolidated_metadata"]["metadata"][f"{GRID.key}/gene"]["shape"] == [5]
    some = load_model(world.other).card.genes[:2]
    with pytest.raises(IdentityMismatchError, match="replace the map with --overwrite"):
        predict(world.store, world.other, out, slide_ids=["S1"], genes=some)


def test_a_map_of_an_object_store_is_not_replaced(world: World) -> None:
    out = "memory://replaced-maps"
    predict(world.store, world.model, out, slide_ids=["S1"])
    with pytest.raises(StoreError, match="not on this machine"):
        predict(world.store, world.other, out, slide_ids=["S1"], overwrite=True)


KILLED = (
    COUNT_STEPS
    + """
from histosge.prediction.expression_store import ExpressionStore
from histosge.prediction.predict import predict

store, old, new, out, grid = *map(Path, sys.argv[1:5]), sys.argv[5]

predict(store, old, out, slide_ids=["S1"])
first = out.with_name("first")
shutil.copytree(out, first)
while True:
    # All steps of writing blocks are one kind: one of them, and then all that come after the last block.
    at = at + 1 if at != 3 else int(sys.argv[6])
    shutil.rmtree(out)
    shutil.copytree(first, out)
    child = os.fork()
    if not child:
        in_child = True
        predict(store, new, out, slide_ids=["S1"], overwrite=True)
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    stored = ExpressionStore.open(str(out))
    assert list(stored.maps()) == [("S1", grid)], list(stored.maps())
    found = stored.map("S1", grid)
    assert not found.array.missing(found.planned())
    print(len(found.genes), int(killed))
    if not killed:
        break
"""
)


@pytest.mark.e2e
def test_a_kill_at_any_step_of_replacing_a_map_leaves_the_old_or_the_new_one(
    world: World, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", KILLED, *world, tmp_path / "maps", GRID.key]
    done = subprocess.run([*command, "4"], capture_output=True, text=True, check=True)
    *killed, finished = done.stdout.splitlines()
    assert finished == "5 0"
    assert set(killed) == {"7 1", "5 1"}


def test_a_model_that_refuses_all_slides_leaves_nothing(world: World, tmp_path: Path) -> None:
    sheet = tmp_path / "one.csv"
    rows = (world.store.parent / "data" / "cohort.csv").read_text().splitlines()
    sheet.write_text("\n".join(_beside(row, world.store.parent / "data") for row in rows[:2]) + "\n")
    train(sheet, world.store, tmp_path / "model", replace(SETTINGS, preset="nearest"))
    with pytest.raises(ModelError, match="has none of slide 'S2'"):
        predict(world.store, tmp_path / "model", tmp_path / "maps", slide_ids=["S2"])
    assert not (tmp_path / "maps").exists()
    # Beside a slide that it knows: the map of that one, and no other.
    results = predict(world.store, tmp_path / "model", tmp_path / "maps")
    assert [bool(result.failed) for result in results] == [False, True]
    assert list(ExpressionStore.open(str(tmp_path / "maps")).maps()) == [("S1", GRID.key)]
    assert {path.name for path in (tmp_path / "maps").iterdir()} == {"S1", "zarr.json"}


def _beside(row: str, folder: Path) -> str:
    """Return a row of a sheet with the files' full paths."""
    return ",".join(
        str(folder / cell) if cell and (folder / cell).is_file() else cell for cell in row.split(",")
    )
