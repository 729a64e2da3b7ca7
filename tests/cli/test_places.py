"""Commands on places that refuse: one line with what to set, no traceback, and no secret in any of it."""

import json
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import pytest
import s3fs
from _s3 import BUCKET, Server, environment, free_port, serving
from make_slides import tissue_like, write_pyramid

from featurestore import file_systems
from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.file_systems import ENV_ANONYMOUS
from featurestore.grid import GridSpec
from featurestore.storage.catalogue import catalogue
from histosge_cli import main as command_line

Histosge = Callable[..., Any]
MPP = 2.0
GRID = ("--mpp", MPP, "--patch", 32, "--stride", 32, "--encoder", "colour")
STORE = f"s3://{BUCKET}/store"
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pyramid(tmp_path_factory.mktemp("slides") / "a.tif", tissue_like(700, 600, MPP), MPP)


# ---------------------------------------------------------------- S3


@pytest.fixture(scope="module")
def server(slide: Path) -> Iterator[Server]:
    """A server with a public store, a private one, and a public slide."""
    with serving() as running, pytest.MonkeyPatch.context() as patch:
        for name, value in environment(running.port).items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        client = boto3.client("s3")
        for store in ("store", "private"):
            embed(str(slide), f"s3://{BUCKET}/{store}", EmbedSettings(("colour",), GridSpec(MPP, 32, 32)))
        client.upload_file(str(slide), BUCKET, "a.tif")
        client.put_bucket_acl(Bucket=BUCKET, ACL="public-read")
        for item in client.list_objects_v2(Bucket=BUCKET)["Contents"]:
            if not item["Key"].startswith("private/"):
                client.put_object_acl(Bucket=BUCKET, Key=item["Key"], ACL="public-read")
        yield running
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def reach(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in environment(server.port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("HISTOSGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_systems, "S3_TRIES", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def no_credentials(reach: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)


def _commands(store: str, slide: Path, folder: Path) -> dict[str, tuple[object, ...]]:
    sheet = folder / "sheet.csv"
    sheet.write_text(f"slide_id,slide,expression\na,{slide},{folder}/a.h5ad\n")
    (folder / "a.h5").write_bytes(b"")
    return {
        "embed": ("embed", slide, store, *GRID),
        "ls": ("ls", store),
        "validate": ("validate", store),
        "rm": ("rm", store, "--slide", "a"),
        "doctor": ("doctor", store),
        "train": ("train", sheet, store, folder / "model"),
        "evaluate": ("evaluate", sheet, store, folder / "report"),
        "export": ("export", store, folder / "x.parquet", "--to", "parquet"),
        "view": ("view", store, "--static", folder / "page"),
        "analyse": ("analyse", store, "summary"),
    }


def _assert_one_line(ran: Any, name: str) -> str:
    assert "Traceback" not in ran.err + ran.out, ran.err
    if name == "doctor":
        assert ran.code == 1
        return str(ran.out.strip().splitlines()[-1])
    assert ran.code == 2, (name, ran)
    lines = [line for line in ran.err.strip().splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, ran.err
    return str(lines[0])


@pytest.mark.s3
@pytest.mark.usefixtures("no_credentials")
def test_every_command_without_credentials_says_what_to_set(
    histosge: Histosge, slide: Path, tmp_path: Path
) -> None:
    for name, command in _commands(STORE, slide, tmp_path).items():
        line = _assert_one_line(histosge(*command), name)
        assert "Unable to locate credentials" in line, (name, line)
        for wanted in ("s3://", "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ENDPOINT_URL", "--anonymous"):
            assert wanted in line, (name, line)


@pytest.mark.s3
@pytest.mark.usefixtures("reach")
def test_every_command_on_a_bucket_that_is_not_there_says_so(
    histosge: Histosge, slide: Path, tmp_path: Path
) -> None:
    for name, command in _commands("s3://no-such-bucket/store", slide, tmp_path).items():
        line = _assert_one_line(histosge(*command), name)
        assert "NoSuchBucket" in line, (name, line)
        assert "AWS_ENDPOINT_URL" in line


@pytest.mark.s3
@pytest.mark.usefixtures("reach")
def test_nobody_at_the_endpoint_is_said(
    histosge: Histosge, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    for name in ("ls", "embed", "doctor"):
        line = _assert_one_line(histosge(*_commands(STORE, slide, tmp_path)[name]), name)
        assert "check AWS_ENDPOINT_URL and the network" in line, (name, line)


@pytest.mark.s3
@pytest.mark.usefixtures("no_credentials")
def test_a_public_bucket_is_read_with_the_option_and_only_with_it(histosge: Histosge, tmp_path: Path) -> None:
    import os

    assert histosge("ls", STORE, "--anonymous").code == 0
    assert histosge("validate", STORE, "--deep", "--anonymous").code == 0
    assert histosge("analyse", STORE, "summary", "--anonymous").code == 0
    embedded = histosge("embed", f"s3://{BUCKET}/a.tif", tmp_path / "mine", *GRID, "--anonymous")
    assert embedded.code == 0, embedded
    assert catalogue(tmp_path / "mine")["state"].to_list() == ["done"]
    assert ENV_ANONYMOUS not in os.environ
    without = histosge("embed", f"s3://{BUCKET}/a.tif", tmp_path / "none", *GRID)
    assert without.code == 1
    assert "--anonymous for a public bucket" in without.out
    private = histosge("ls", f"s3://{BUCKET}/private", "--anonymous")
    assert "it is not public, leave --anonymous out and set AWS_ACCESS_KEY_ID" in _assert_one_line(
        private, "ls"
    )


@pytest.mark.s3
@pytest.mark.usefixtures("reach")
def test_what_is_written_is_signed_where_there_are_credentials(histosge: Histosge) -> None:
    # Nobody may write there without: with the option, too, the store is the user's own.
    ran = histosge("embed", f"s3://{BUCKET}/a.tif", f"s3://{BUCKET}/private", *GRID, "--anonymous")
    assert (ran.code, "nothing to do" in ran.out) == (0, True), ran


def test_each_command_that_opens_a_place_has_the_option(histosge: Histosge) -> None:
    for command in (
        "embed",
        "ls",
        "train",
        "predict",
        "evaluate",
        "export",
        "import",
        "view",
        "rm",
        "doctor",
    ):
        assert "--anonymous" in histosge(command, "--help").out
    assert "--anonymous" in histosge("analyse", "x", "pca", "--help").out
    assert "--anonymous" not in histosge("demo", "--help").out


# ---------------------------------------------------------------- secrets

SECRET = "s3cr3tsignature"


class _Refusing(SimpleHTTPRequestHandler):
    """Serves a file a few times, and then refuses in one of several ways."""

    protocol_version = "HTTP/1.1"
    how, after, seen = "403", 0, 0

    def do_HEAD(self) -> None:
        self._serve(with_body=False)

    def do_GET(self) -> None:
        self._serve(with_body=True)

    def _serve(self, *, with_body: bool) -> None:
        type(self).seen += 1
        file = Path(self.directory) / self.path.partition("?")[0].lstrip("/")
        if self.seen > self.after:
            if self.how == "cut":
                self.close_connection = True
                self.connection.shutdown(2)
                return
            self.send_response(int(self.how))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if not file.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = file.read_bytes()
        first, last = 0, len(data) - 1
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(wanted[1]), min(last, int(wanted[2] or last))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        if with_body:
            self.wfile.write(data[first : last + 1])

    def log_message(self, *_: Any) -> None:
        pass


class Case(NamedTuple):
    """A slide behind a URL with a secret, and how its server refuses after some requests."""

    name: str
    how: str
    after: int


CASES = [
    Case(name, how, after)
    for name in ("a.tif", "flat.png", "a.zarr")
    for how in ("403", "401", "500", "404", "cut")
    for after in (0, 2, 4)
]


def test_no_secret_of_a_url_is_printed_logged_or_stored(
    histosge: Histosge, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    from featurestore.slides import range_reader

    monkeypatch.setattr(range_reader, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("HISTOSGE_CACHE", str(tmp_path / "cache"))
    site = tmp_path / "site"
    (site / "a.zarr").mkdir(parents=True)
    (site / "a.tif").write_bytes(slide.read_bytes())
    Image.effect_noise((200, 150), 50).convert("RGB").save(site / "flat.png")
    (site / "a.zarr" / "zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group"}))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Refusing, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{server.server_address[1]}"
    log, printed = tmp_path / "log.jsonl", []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for number, case in enumerate(CASES):
            for form, url in enumerate(
                (f"http://{host}/{case.name}?sig={SECRET}&x=1", f"http://user:{SECRET}@{host}/{case.name}")
            ):
                _Refusing.how, _Refusing.after, _Refusing.seen = case.how, case.after, 0
                sheet = tmp_path / "sheet.csv"
                sheet.write_text(f"slide_id,slide,mpp\nS1,{url},2\n")
                store = tmp_path / "stores" / f"{number}-{form}"
                ran = histosge("embed", sheet, store, *GRID, "--log", log)
                assert ran.code in (0, 1), (case, ran)
                printed += [ran.out, ran.err]
    server.shutdown()
    server.server_close()
    assert sum("failed: " in text for text in printed) > len(CASES)
    assert not [text for text in printed if SECRET in text]
    assert "S1" in log.read_text()
    files = [log, *(path for path in (tmp_path / "stores").rglob("*") if path.is_file())]
    assert len(files) > len(CASES)
    assert not [path for path in files if SECRET.encode() in path.read_bytes() or SECRET in path.name]


def test_the_traceback_of_a_bug_holds_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ZeroDivisionError(f"https://host/a.tif?sig={SECRET}")
    except ZeroDivisionError as error:
        command_line._print_bug(type(error), error, error.__traceback__)
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert "ZeroDivisionError: https://host/a.tif" in printed
    assert SECRET not in printed.replace("SECRET", "")


def test_a_file_that_may_not_be_read_is_one_line(
    histosge: Histosge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A name that is too long is refused to root as well, unlike a file without permissions.
    ran = histosge("ls", tmp_path / ("a" * 300))
    assert ran.code == 2
    assert "Traceback" not in ran.err
    assert len(ran.err.strip().splitlines()) == 1
