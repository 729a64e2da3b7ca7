"""Published weights through the hub's real client, from a small server that speaks the hub's protocol."""

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from featurestore.encoders.architecture import build
from featurestore.encoders.hub import fetch_config, fetch_weights, hub_answers, in_cache
from featurestore.encoders.protocol import EncoderOptions
from featurestore.encoders.records import EncoderRecord, Preprocessing, Published
from featurestore.encoders.vision import load_record
from featurestore.errors import EncoderError

REPOSITORY, REVISION, TOKEN = "lab/tiny", "5" * 40, "hf_secret_token_of_a_user"
FILE = "model.safetensors"


@dataclass
class Hub:
    """Files of one repository, and how the server treats those who ask."""

    files: dict[str, bytes]
    url: str = ""
    status: int = 200
    code: str = ""
    cut_after: int | None = None
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self, *, body: bool) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        wanted = self.headers.get("Range")
        hub.asked.append((self.command, self.path, wanted))
        hub.tokens.add(self.headers.get("Authorization"))
        name = self.path.rpartition("/")[2]
        if hub.status != 200:
            self._refuse(hub.status, hub.code)
            return
        if f"/resolve/{REVISION}/" not in self.path:
            self._refuse(404, "RevisionNotFound" if "/resolve/" in self.path else "RepoNotFound")
            return
        if name not in hub.files:
            self._refuse(404, "EntryNotFound")
            return
        data = hub.files[name]
        start = int(re.match(r"bytes=(\d+)-", wanted).group(1)) if wanted else 0  # type: ignore[union-attr]
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if body and hub.cut_after is not None:
            self.wfile.write(data[start : start + hub.cut_after])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif body:
            self.wfile.write(data[start:])

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


RECORD_SIZE = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 32, "patch_size": 16}


def _record(published: Published) -> EncoderRecord:
    return EncoderRecord(
        name="tiny",
        pooling="cls",
        dim=48,
        package="timm",
        architecture="vit_tiny_patch16_224",
        arguments=RECORD_SIZE,
        parameters=None,
        prefix_tokens=1,
        preprocessing=Preprocessing(32, None, "bilinear", (0.5,) * 3, (0.5,) * 3),
        mpp=(0.5,),
        dtype="fp32",
        state="timm",
        published=published,
    )


@pytest.fixture(scope="module")
def weights() -> bytes:
    torch.manual_seed(11)
    return save(build(_record(_published())).state_dict())


@pytest.fixture
def hub(weights: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    config = {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    found = Hub({FILE: weights, "config.json": json.dumps(config).encode()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = found  # type: ignore[attr-defined]
    found.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", found.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield found
    server.shutdown()
    server.server_close()


def _published(sha256: str | None = None, *, gated: bool = False) -> Published:
    return Published(REPOSITORY, REVISION, FILE, sha256, gated)


def _refusal(published: Published) -> str:
    with pytest.raises(EncoderError) as refused:
        fetch_weights("tiny", published)
    message = str(refused.value)
    assert "\n" not in message
    assert TOKEN not in message
    return message


def test_weights_come_from_the_pinned_revision_and_are_checked(hub: Hub, weights: bytes) -> None:
    digest = hashlib.sha256(weights).hexdigest()
    path, found = fetch_weights("tiny", _published(digest[:16]))
    assert found == digest
    assert path.read_bytes() == weights
    files = [asked for _, asked, _ in hub.asked if not asked.startswith("/api/")]
    assert files
    assert all(f"/resolve/{REVISION}/" in asked for asked in files)
    assert hub.tokens <= {f"Bearer {TOKEN}", None}
    assert f"Bearer {TOKEN}" in hub.tokens


def test_a_second_time_nothing_is_asked_of_the_hub(hub: Hub) -> None:
    assert not in_cache(_published())
    fetch_weights("tiny", _published())
    assert in_cache(_published())
    asked = len(hub.asked)
    fetch_weights("tiny", _published())
    assert len(hub.asked) == asked


def test_an_encoder_is_the_network_that_was_published(hub: Hub, weights: bytes) -> None:
    encoder = load_record(_record(_published()), EncoderOptions(device="cpu"))
    assert encoder.identity.facts["weights"] == f"sha256 {hashlib.sha256(weights).hexdigest()}"
    other = load_record(_record(_published()), EncoderOptions(device="cpu", random_weights=True))
    assert other.identity.fingerprint != encoder.identity.fingerprint


def test_a_download_into_a_folder_can_be_given_as_weights_elsewhere(hub: Hub, tmp_path: Path) -> None:
    path, _ = fetch_weights("tiny", _published(), tmp_path / "usb")
    assert path == tmp_path / "usb" / FILE
    hub.status = 500
    carried = load_record(_record(_published()), EncoderOptions(device="cpu", weights=str(path)))
    hub.status = 200
    assert carried.identity == load_record(_record(_published()), EncoderOptions(device="cpu")).identity


def test_a_download_that_was_cut_goes_on_where_it_stopped(hub: Hub) -> None:
    whole = np.random.default_rng(5).bytes(31_000_000)  # the client keeps what came by ten million bytes
    hub.files[FILE], hub.cut_after = whole, 13_000_000
    path, _ = fetch_weights("tiny", _published())
    assert path.read_bytes() == whole
    assert [asked for method, _, asked in hub.asked if method == "GET" and asked] == [
        "bytes=10485760-",
        "bytes=20971520-",
    ]


def test_another_file_than_the_published_one_is_refused(hub: Hub, weights: bytes) -> None:
    message = _refusal(_published("0123456789abcdef"))
    assert hashlib.sha256(weights).hexdigest()[:16] in message
    assert "0123456789abcdef" in message
    assert "--weights FILE" in message


@pytest.mark.parametrize(("status", "code"), [(401, "GatedRepo"), (403, "GatedRepo")])
def test_a_gated_model_without_access_names_the_two_steps(hub: Hub, status: int, code: str) -> None:
    hub.status, hub.code = status, code
    message = _refusal(_published(gated=True))
    assert f"{hub.url}/{REPOSITORY}" in message
    assert "hf auth login" in message
    assert "--weights FILE" in message


def test_a_repository_that_is_not_there_is_refused(hub: Hub) -> None:
    hub.status, hub.code = 404, "RepoNotFound"
    assert REPOSITORY in _refusal(_published())


def test_a_file_that_is_not_there_is_refused(hub: Hub) -> None:
    del hub.files[FILE]
    message = _refusal(_published())
    assert FILE in message
    assert "--weights FILE" in message


def test_a_revision_that_is_not_there_is_refused(hub: Hub) -> None:
    gone = Published(REPOSITORY, "9" * 40, FILE, None, False)
    assert "9" * 12 in _refusal(gone)


def test_without_network_the_way_round_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    message = _refusal(_published())
    assert "histosge encoders tiny --download DIR" in message
    assert f"--weights DIR/{FILE}" in message
    assert not hub_answers(1.0)


def test_the_hub_answers_when_it_does(hub: Hub) -> None:
    assert hub_answers(1.0)


def test_a_config_beside_the_weights_that_disagrees_stops_with_both_values(hub: Hub) -> None:
    hub.files["config.json"] = json.dumps({"pretrained_cfg": {"mean": [0.7, 0.6, 0.5]}}).encode()
    with pytest.raises(EncoderError, match=r"\[0.5, 0.5, 0.5\].*\[0.7, 0.6, 0.5\]"):
        load_record(_record(_published()), EncoderOptions(device="cpu"))


def test_no_config_is_no_fault(hub: Hub) -> None:
    del hub.files["config.json"]
    assert fetch_config("tiny", _published()) == {}
    load_record(_record(_published()), EncoderOptions(device="cpu"))
