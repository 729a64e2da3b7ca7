"""Slides and stores on Google Cloud Storage and Azure, against emulators: as on a local disk, and refused in one line."""

import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _s3 import Proxy, Reply
from cloud_servers import AZURE_KEY, BUCKET, CloudServer, environment, make_container, serving_cloud
from make_slides import tissue_like, write_pyramid
from PIL import Image

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.errors import AccessError, SlideAccessError, SlideError, SlideNotFoundError
from featurestore.file_systems import anonymous_access, open_file_system
from featurestore.grid import GridSpec
from featurestore.location import Location
from featurestore.object_stores import bucket_check
from featurestore.slides.fingerprint import slide_fingerprint
from featurestore.slides.open_slide import open_slide
from featurestore.storage.catalogue import catalogue
from featurestore.storage.store import Store
from featurestore.storage.validation import validate

MPP = 2.0
# One slide is embedded from the cloud and from this machine.
SETTINGS = EmbedSettings(("colour",), GridSpec(MPP, 32, 32), block_shape=(7, 5), allow_duplicates=True)
SCHEMES = [pytest.param("gs", marks=pytest.mark.gcs), pytest.param("az", marks=pytest.mark.azure)]
VARIABLES = (
    "STORAGE_EMULATOR_HOST",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_ACCOUNT_NAME",
    "AZURE_STORAGE_ACCOUNT_KEY",
)
pytestmark = [
    # Their clients leave sessions to the garbage collector, as s3fs does.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def _forget_clients() -> None:
    """fsspec keeps file systems, which read the environment when they are made."""
    for module, name in (("azure", "AzureStorage"), ("gcs", "GoogleStorage")):
        if loaded := sys.modules.get(f"featurestore.object_stores.{module}"):
            getattr(loaded, name).clear_instance_cache()


def _reach(patch: pytest.MonkeyPatch, environ: dict[str, str]) -> None:
    for name in VARIABLES:
        patch.delenv(name, raising=False)
    # Google's client would look for the metadata server of its machines, and wait for its answer.
    for name, value in {**environ, "NO_GCE_CHECK": "true"}.items():
        patch.setenv(name, value)
    _forget_clients()


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pyramid(tmp_path_factory.mktemp("slides") / "a.tif", tissue_like(700, 600, MPP), MPP)


@pytest.fixture(scope="module", params=SCHEMES)
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, azurite: str | None
) -> Iterator[CloudServer]:
    with serving_cloud(request.param, tmp_path_factory.mktemp("cloud"), azurite) as server:
        yield server


@pytest.fixture
def server(running: CloudServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[CloudServer]:
    monkeypatch.setenv("HISTOSGE_CACHE", str(tmp_path / "cache"))
    _reach(monkeypatch, running.environment)
    yield running
    _forget_clients()


def _upload(server: CloudServer, file: Path, name: str) -> str:
    url = f"{server.scheme}://{BUCKET}/{name}"
    fs, path = open_file_system(url)
    fs.pipe_file(path, file.read_bytes())
    return url


def _contents(place: str) -> dict[str, bytes]:
    location = Location(place)
    return {name: location.read_bytes(name) for name in location.sizes() if "_failures" not in name}


def test_a_store_in_the_cloud_equals_a_local_one_and_is_read_listed_resumed_and_removed(
    server: CloudServer, slide: Path, tmp_path: Path
) -> None:
    url = f"{server.scheme}://{BUCKET}/cohort"
    sheet = tmp_path / "cohort.csv"
    sheet.write_text(f"slide_id,slide\nS1,{_upload(server, slide, 'slides/a.tif')}\nS2,{slide}\n")
    assert [result.state for result in embed(str(sheet), url, SETTINGS)] == ["done"] * 2
    local = tmp_path / "local"
    embed(str(sheet), str(local), SETTINGS)
    assert _contents(url) == _contents(str(local))
    assert validate(url, deep=True) == validate(str(local), deep=True)
    rows = catalogue(url)
    assert rows["state"].to_list() == ["done"] * 2
    assert rows["modified"].null_count() == 0

    block = next(name for name in Location(url).sizes("S1") if "/embedding/c/" in name)
    kept = Location(url).read_bytes(f"S1/{block}")
    Location(url).remove(f"S1/{block}")
    assert sorted(catalogue(url)["state"].to_list()) == ["done", "partial"]
    embed(str(sheet), url, SETTINGS)
    assert Location(url).read_bytes(f"S1/{block}") == kept
    Location(url).remove("S2")
    assert Store.open(url).slide_ids() == ["S1"]


def test_a_slide_in_the_cloud_has_the_pixels_and_the_fingerprint_of_the_file(
    server: CloudServer, slide: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "flat.png"
    Image.fromarray(tissue_like(300, 200, MPP)).save(picture)
    for file in (slide, picture):  # in parts, and fetched whole
        url = _upload(server, file, f"slides/{file.name}")
        assert slide_fingerprint(url) == slide_fingerprint(str(file))
        here, there = open_slide(file, MPP), open_slide(url, MPP)
        assert here.size_px == there.size_px
        region = (11, 7, 150, 130, MPP)
        np.testing.assert_array_equal(here.read_region(*region), there.read_region(*region))
    with pytest.raises(SlideNotFoundError, match="there is no slide at"):
        open_slide(f"{server.scheme}://{BUCKET}/slides/none.tif")


def test_a_slide_that_was_replaced_is_fetched_anew(server: CloudServer, tmp_path: Path) -> None:
    picture = tmp_path / "flat.png"
    for colour in ((1, 2, 3), (4, 5, 6)):
        # Without compression, so that both files have one size.
        Image.new("RGB", (300, 200), colour).save(picture, compress_level=0)
        url = _upload(server, picture, "slides/replaced.png")
        with closing(open_slide(url, MPP)) as opened:
            assert opened.read_region(0, 0, 1, 1, MPP).tolist() == [[list(colour)]]


@pytest.fixture(autouse=True)
def collected() -> None:
    """Clients of earlier tests would say at any moment that they were not closed, also within a command's output."""
    gc.collect()


def _commands(store: str, slide: Path) -> dict[str, tuple[object, ...]]:
    grid = ("--mpp", MPP, "--patch", 32, "--encoder", "colour")
    return {
        "embed": ("embed", slide, store, *grid),
        "ls": ("ls", store),
        "validate": ("validate", store),
        "rm": ("rm", store, "--slide", "a"),
        "analyse": ("analyse", store, "summary"),
    }


def _one_line(ran: tuple[int, str, str], name: str) -> str:
    code, out, err = ran
    assert "Traceback" not in out + err, err
    assert AZURE_KEY not in out + err
    assert code == 2, (name, ran)
    # Clients of earlier tests that are collected meanwhile say that they were not closed.
    begin = ("warning: ", "Unclosed ", "client_session: ", "connector: ", "connections: ")
    lines = [line for line in err.strip().splitlines() if not line.startswith(begin)]
    assert len(lines) == 1, (name, err)
    return lines[0]


def test_a_bucket_that_is_not_there_is_refused_by_every_command(
    server: CloudServer, histosge: Callable[..., Any], slide: Path, tmp_path: Path
) -> None:
    store = f"{server.scheme}://no-such-bucket/store"
    for name, command in _commands(store, slide).items():
        line = _one_line(histosge(*command), name)
        assert re.search(r"NoSuchBucket|ContainerNotFound", line), (name, line)
        assert "make the bucket first" in line or "make the container first" in line, (name, line)
    code, out, _ = histosge(
        "embed", f"{store}/a.tif", tmp_path / "store", "--mpp", MPP, "--encoder", "colour"
    )
    assert code == 1
    assert "NoSuchBucket" in out


def test_a_bucket_that_is_gone_is_no_missing_block(
    server: CloudServer, slide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_check, "CHECK_S", 0.0)
    bucket = f"{server.scheme}://gone"
    fs, _ = open_file_system(bucket)
    fs.mkdir("gone")
    embed(str(slide), f"{bucket}/store", SETTINGS)
    array = Store.open(f"{bucket}/store").embedding("a", SETTINGS.spec.key, "colour")
    block = Store.open(f"{bucket}/store").grid("a", SETTINGS.spec.key).planned(array.block_shape)[0]
    assert not np.isnan(array.read_block(block)).all()
    Location(f"{bucket}/store").remove("a")
    assert np.isnan(array.read_block(block)).all()  # an object that is not there
    Location(f"{bucket}/store").remove("")
    fs.rmdir("gone")
    location = Location(f"{bucket}/store")
    for look in (
        lambda: array.read_block(block),
        lambda: location.exists("zarr.json"),
        lambda: location.files(""),
        lambda: location.sizes(""),
        lambda: location.read_json("zarr.json"),
        lambda: location.write_json("zarr.json", {}),
    ):
        with pytest.raises(AccessError, match=r"make the (bucket|container) first"):
            look()


@pytest.mark.e2e
def test_commands_end_without_a_word_of_the_client(server: CloudServer, slide: Path) -> None:
    """Clients close their connections when Python ends, which must print nothing."""
    url = f"{server.scheme}://{BUCKET}/ended"
    grid = ("--mpp", "2", "--patch", "32", "--encoder", "colour", "--quiet")
    for arguments in (("embed", slide, url, *grid), ("ls", url)):
        done = subprocess.run(
            [sys.executable, "-m", "histosge_cli", *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, ""), done


# ---------------------------------------------------------------- Google alone


@pytest.fixture(scope="module")
def google(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CloudServer]:
    with serving_cloud("gs", tmp_path_factory.mktemp("google")) as server:
        yield server


@pytest.mark.gcs
@pytest.mark.parametrize(
    ("status", "message", "says"),
    [
        (403, "x@y does not have storage.objects.get access", "set GOOGLE_APPLICATION_CREDENTIALS"),
        (
            401,
            "Anonymous caller does not have storage.objects.list access",
            "set GOOGLE_APPLICATION_CREDENTIALS",
        ),
        (400, "invalid bucket name", "invalid bucket name"),
    ],
)
def test_google_refuses_in_one_line_that_says_what_to_set(
    google: CloudServer,
    histosge: Callable[..., Any],
    slide: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    message: str,
    says: str,
) -> None:
    proxy = Proxy(google.port)
    body = json.dumps({"error": {"code": status, "message": message}}).encode()
    proxy.fault = lambda *_: Reply(status, body=body)
    _reach(monkeypatch, environment("gs", proxy.port))
    monkeypatch.setenv("HISTOSGE_CACHE", str(tmp_path / "cache"))
    try:
        for name, command in _commands(f"gs://{BUCKET}/store", slide).items():
            line = _one_line(histosge(*command), name)
            assert message in line, (name, line)
            assert says in line, (name, line)
        for name in ("a.tif", "a.png"):
            with pytest.raises(SlideAccessError, match=re.escape(message)):
                open_slide(f"gs://{BUCKET}/{name}", MPP)
    finally:
        proxy.close()
        _forget_clients()


# ---------------------------------------------------------------- Azure alone


@pytest.fixture(scope="module")
def azure(tmp_path_factory: pytest.TempPathFactory, azurite: str | None) -> Iterator[CloudServer]:
    with serving_cloud("az", tmp_path_factory.mktemp("azure"), azurite) as server:
        make_container(server, "public", public="container")
        yield server


@pytest.mark.azure
def test_azure_refuses_a_wrong_key_in_one_line_without_the_key(
    azure: CloudServer,
    histosge: Callable[..., Any],
    slide: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = {
        name: value.replace(AZURE_KEY, AZURE_KEY.replace("Eby8", "Ebz8"))
        for name, value in azure.environment.items()
    }
    _reach(monkeypatch, wrong)
    for name, command in _commands(f"az://{BUCKET}/store", slide).items():
        ran = histosge(*command)
        line = _one_line(ran, name)
        assert "the server answers 403" in line, (name, line)
        assert "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY" in line, (name, line)
        assert "Ebz8" not in "".join(ran[1:])
    _forget_clients()


@pytest.mark.azure
def test_azure_without_an_account_says_what_to_set(
    histosge: Callable[..., Any], slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _reach(monkeypatch, {})
    for name, command in _commands(f"az://{BUCKET}/store", slide).items():
        line = _one_line(histosge(*command), name)
        assert "set AZURE_STORAGE_ACCOUNT_NAME" in line, (name, line)
    with pytest.raises(SlideError, match="set AZURE_STORAGE_ACCOUNT_NAME"):
        open_slide(f"az://{BUCKET}/a.tif", MPP)


@pytest.mark.azure
def test_a_public_container_is_read_without_the_key_and_a_private_one_is_not(
    azure: CloudServer, slide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _reach(monkeypatch, azure.environment)
    for container in ("public", BUCKET):
        embed(str(slide), f"az://{container}/store", SETTINGS)
    with anonymous_access():
        _forget_clients()
        assert catalogue("az://public/store")["state"].to_list() == ["done"]
        with pytest.raises(
            AccessError, match="it is not public, leave --anonymous out and set AZURE_STORAGE"
        ):
            catalogue(f"az://{BUCKET}/store")
    _forget_clients()
