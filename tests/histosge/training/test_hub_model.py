"""Models on the hub: the card that a folder carries, and models that are read from a small server with its protocol."""

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from _models import invent_model
from _stores import Made, write_store
from huggingface_hub import ModelCard

from histosge.errors import ModelError
from histosge.prediction.predict import predict
from histosge.training.saved_model import load_model, read_fingerprint

TOKEN = "hf_secret_token_of_a_user"
COMMIT = "5" * 40
MADE = Made((19, 23), 11, (7, 11), frame=2)


@dataclass
class Hub:
    """Files of repositories by ``owner/name`` and path, and what was read."""

    files: dict[tuple[str, str], bytes] = field(default_factory=dict)
    status: int = 200
    code: str = ""
    asked: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self, *, body: bool) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        hub.asked.append(f"{self.command} {self.path}")
        repository, _, rest = self.path[1:].partition("/resolve/")
        revision, _, name = rest.partition("/")
        if hub.status != 200:
            self._refuse(hub.status, hub.code)
        elif revision not in ("main", "v2", COMMIT):
            self._refuse(404, "RevisionNotFound")
        elif repository not in {known for known, _ in hub.files}:
            self._refuse(404, "RepoNotFound")
        elif (repository, name) not in hub.files:
            self._refuse(404, "EntryNotFound")
        else:
            data = hub.files[repository, name]
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    store = write_store(folder / "store", 2, MADE)
    invent_model(store, "S00", folder / "model", 17)
    return folder


@pytest.fixture
def hub(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub()
    for file in (world / "model").iterdir():
        found.files["lab/model", file.name] = found.files["lab/models", f"breast/v1/{file.name}"] = (
            file.read_bytes()
        )
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = found  # type: ignore[attr-defined]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield found
    server.shutdown()
    server.server_close()


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
    assert {line.split(" ")[0] for line in hub.asked} <= {"HEAD", "GET"}


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
