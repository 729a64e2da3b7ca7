"""Training, predicting and exporting from a store on the hub, and going on from a model there: a small server stands in."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from _cohorts import MadeCohort, write_cohort, write_section, write_sheet
from hub_server import COMMIT, LATER, TOKEN, Hub, serving_hub

from featurestore.storage.store import Store
from histosge.data.embedded_slide import load_patches, open_embedded
from histosge.errors import ModelError
from histosge.prediction.predict import predict
from histosge.training.saved_model import load_model
from histosge.training.train import TrainSettings, train

MADE = MadeCohort(sections=4, shape=(17, 19), dim=7, spots=61, genes=5, block=(7, 11), frame=2)
URL = "hf://datasets/lab/cohort"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four sections, a model of them, and a sheet with a fifth."""
    folder = tmp_path_factory.mktemp("hub")
    sheet, store = write_cohort(folder, MADE)
    settings = TrainSettings(preset="ridge", intervals=False)
    train(sheet, store, folder / "four", settings)
    train(sheet, store, folder / "bare", settings, keep_sums=False)
    write_section(folder, Store.open(str(store)), MADE, 4)
    write_sheet(folder, folder / "five.csv", MADE, range(5))
    return folder


@pytest.fixture
def hub(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HISTOSGE_CACHE", str(tmp_path / "kept"))
    with serving_hub(monkeypatch, tmp_path / "cache") as found:
        found.add_folder("datasets/lab/cohort", world / "store")
        found.add_folder("lab/four", world / "four")
        found.add_folder("lab/models", world / "four", "breast/v1/")
        found.add("lab/models", "other/large.bin", b"0")
        found.add_folder("lab/bare", world / "bare")
        yield found


def _predicted(world: Path, model: Path) -> np.ndarray:  # type: ignore[type-arg]
    patches = load_patches(open_embedded(Store.open(str(world / "store")), "S004", None, None))
    return load_model(model).predict(patches).values


def test_a_model_trained_from_the_hub_is_that_of_the_folder(
    hub: Hub, world: Path, tmp_path: Path, histosge: Callable[..., tuple[int, str, str]]
) -> None:
    arguments = ("--preset", "ridge", "--genes", "all")
    code, _, err = histosge("train", world / "five.csv", URL, tmp_path / "there", *arguments)
    assert code == 0, err
    assert histosge("train", world / "five.csv", world / "store", tmp_path / "here", *arguments)[0] == 0
    assert np.array_equal(_predicted(world, tmp_path / "there"), _predicted(world, tmp_path / "here"))
    # What a model was trained on is known by fingerprints, so the other place is no other training.
    again = histosge("train", world / "five.csv", f"{URL}@{COMMIT}", tmp_path / "here", *arguments)
    assert (again[0], "nothing to do" in again[1] + again[2]) == (0, True)


def test_training_goes_on_from_a_model_on_the_hub(
    hub: Hub, world: Path, tmp_path: Path, histosge: Callable[..., tuple[int, str, str]]
) -> None:
    train(world / "five.csv", world / "store", tmp_path / "here", start_from=world / "four")
    wanted = _predicted(world, tmp_path / "here")
    code, _, err = histosge(
        "train", world / "five.csv", URL, tmp_path / "there", "--from", "hf://lab/four@main"
    )
    assert code == 0, err
    assert np.array_equal(_predicted(world, tmp_path / "there"), wanted)
    # Only the new section is read, and of a repository only the model.
    assert not [
        line
        for line in hub.seen("/datasets/lab/cohort/resolve/")
        if "/embedding/c/" in line and "S004" not in line
    ]
    train(world / "five.csv", world / "store", tmp_path / "below", start_from="hf://lab/models/breast/v1")
    assert np.array_equal(_predicted(world, tmp_path / "below"), wanted)
    assert not hub.seen("large.bin")


def test_sums_and_model_are_of_one_commit(hub: Hub, world: Path, tmp_path: Path) -> None:
    load_model("hf://lab/four")  # kept here without its sums
    hub.files["lab/four", LATER] = {}
    hub.add_folder("lab/four", world / "bare", commit=LATER)
    hub.revisions["main"] = LATER
    # The new commit has no sums: those that are here are of the other one.
    model = train(world / "five.csv", world / "store", tmp_path / "model", start_from="hf://lab/four")
    assert model.card.origin is not None


@pytest.mark.parametrize(
    ("place", "status", "message"),
    [
        ("hf://lab/gone", 200, "shows no hf://lab/gone to this account"),
        ("hf://lab/four@v9", 200, "hf://lab/four@v9 has no"),
        ("hf://lab/models", 200, r"hf://lab/models has no config\.json: it is no histosge model"),
        ("hf://lab/four", 400, "the hub answered 400"),
        (URL, 200, "names no model on the hub"),
    ],
)
def test_what_cannot_be_gone_on_from_is_one_line(
    hub: Hub,
    world: Path,
    tmp_path: Path,
    histosge: Callable[..., tuple[int, str, str]],
    place: str,
    status: int,
    message: str,
) -> None:
    hub.status = status
    code, _, err = histosge("train", world / "five.csv", world / "store", tmp_path / "model", "--from", place)
    assert code == 2
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert re.search(message, lines[0]), lines
    assert TOKEN not in err
    assert not (tmp_path / "model").exists()


def test_without_the_hub_sums_that_were_not_kept_are_missed(
    hub: Hub, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_model("hf://lab/four")
    # Nothing listens there.
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match="hf download lab/four --local-dir MODEL"):
        train(world / "five.csv", world / "store", tmp_path / "model", start_from="hf://lab/four")


def test_maps_and_tables_of_a_store_on_the_hub_are_those_of_the_folder(
    hub: Hub, world: Path, tmp_path: Path, histosge: Callable[..., tuple[int, str, str]]
) -> None:
    predict(URL, world / "four", tmp_path / "there", slide_ids=["S004"])
    predict(world / "store", world / "four", tmp_path / "here", slide_ids=["S004"])
    files = [
        {p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("c/*") if p.is_file()}
        for n in ("there", "here")
    ]
    assert files[0] == files[1]
    assert files[0]
    tables = {}
    for name, place in (("there", URL), ("here", world / "store")):
        code, _, err = histosge("analyse", place, "summary", "--out", tmp_path / f"{name}.parquet")
        assert code == 0, err
        tables[name] = pl.read_parquet(tmp_path / f"{name}.parquet")
    assert tables["there"].equals(tables["here"])
    # Maps on the hub are read as well.
    hub.add_folder("datasets/lab/maps", tmp_path / "here")
    for name, place in (("a", "hf://datasets/lab/maps"), ("b", tmp_path / "here")):
        code, _, err = histosge("export", place, tmp_path / name, "--to", "h5ad")
        assert code == 0, err
    assert [p.name for p in sorted((tmp_path / "a").iterdir())] == [
        p.name for p in sorted((tmp_path / "b").iterdir())
    ]
