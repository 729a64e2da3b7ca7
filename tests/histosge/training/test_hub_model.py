"""Models on the hub: the card that a folder carries, and models that are read from a small server with its protocol."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from _models import invent_model
from _stores import Made, write_store
from hub_server import COMMIT, TOKEN, Hub, serving_hub
from huggingface_hub import ModelCard

from histosge.errors import ModelError
from histosge.prediction.predict import predict
from histosge.training.model_files import read_fingerprint
from histosge.training.saved_model import load_model

MADE = Made((19, 23), 11, (7, 11), frame=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    store = write_store(folder / "store", 2, MADE)
    invent_model(store, "S00", folder / "model", 17)
    return folder


@pytest.fixture
def hub(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving_hub(monkeypatch, tmp_path / "cache") as found:
        found.add_folder("lab/model", world / "model")
        found.add_folder("lab/models", world / "model", "breast/v1/")
        yield found


@pytest.mark.parametrize(
    "place",
    [
        "hf://lab/model",
        "hf://lab/model@v2",
        f"hf://lab/model@{COMMIT}/",
        "hf://lab/models/breast/v1",
        Path("hf://lab/model"),
    ],
)
def test_a_model_on_the_hub_is_the_one_that_was_uploaded(hub: Hub, world: Path, place: str | Path) -> None:
    assert read_fingerprint(place) == read_fingerprint(world / "model")
    assert load_model(place).fingerprint == load_model(world / "model").fingerprint
    assert {line.split(" ")[0] for line in hub.requests} <= {"HEAD", "GET"}


def test_a_prediction_with_it_is_that_of_the_folder(hub: Hub, world: Path, tmp_path: Path) -> None:
    predict(world / "store", "hf://lab/model", tmp_path / "one", slide_ids=["S01"])
    predict(world / "store", world / "model", tmp_path / "two", slide_ids=["S01"])
    assert predict(world / "store", "hf://lab/model", tmp_path / "two", slide_ids=["S01"])[0].computed == 0
    files = [
        sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("c/*") if p.is_file())
        for n in ("one", "two")
    ]
    assert files[0] == files[1]
    for file in files[0]:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize(
    ("place", "status", "code", "message"),
    [
        ("hf://lab/model@v9", 200, "", "has no config.json: it is no histosge model, or another revision"),
        ("hf://lab/model/other", 200, "", "hf://lab/model/other has no config.json"),
        ("hf://lab/gone", 200, "", "shows no hf://lab/gone to this account"),
        ("hf://lab/model", 401, "GatedRepo", "hf auth login"),
        ("hf://lab/model", 400, "", "the hub answered 400"),
        ("hf://model", 200, "", "names no model on the hub; give hf://OWNER/NAME"),
        ("hf://datasets/lab/x", 200, "", "names no model on the hub"),
        ("hf://lab/model/../../x", 200, "", "names no model on the hub"),
    ],
)
def test_what_the_hub_refuses_is_one_line_without_the_token(
    hub: Hub, place: str, status: int, code: str, message: str
) -> None:
    hub.status, hub.code = status, code
    with pytest.raises(ModelError, match=message) as refused:
        load_model(place)
    assert "\n" not in str(refused.value)
    assert TOKEN not in str(refused.value)


def test_without_the_hub_the_way_round_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="hf download lab/model --local-dir MODEL"):
        load_model("hf://lab/model")


def test_the_card_is_read_by_the_hub_s_own_client(world: Path) -> None:
    saved = load_model(world / "model")
    card = ModelCard.load(world / "model" / "README.md")
    facts = card.data.to_dict()
    assert facts["library_name"] == "histosge"
    assert facts["license"] == "other"
    assert saved.fingerprint in card.text
    for part in (
        "## Training data",
        "## Encoder",
        "licence",
        "## Held-out figures",
        "## Controls",
        "## Limits",
    ):
        assert part in card.text
    if saved.intervals is not None:
        (trusted, median) = card.data.eval_results
        assert trusted.metric_value == int(saved.intervals.trusted.sum())
        assert median.metric_value == pytest.approx(float(np.median(saved.intervals.trust)), abs=1e-4)
