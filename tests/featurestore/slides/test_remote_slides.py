"""Slides behind URLs: fetched once, whole, into a folder of bounded size; served by a real HTTP server."""

import os
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_slides import tissue_like, write_pyramid

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.errors import SlideError, SlideNotFoundError
from featurestore.grid import GridSpec
from featurestore.slides.download_cache import ENV_FOLDER, ENV_GB, fetch
from featurestore.slides.open_slide import open_slide
from featurestore.storage.store import Store

MPP = 2.0
GETS: Counter[str] = Counter()


class _Handler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        GETS[self.path] += 1
        super().do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(ENV_FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    folder = tmp_path / "site"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    GETS.clear()
    yield folder, f"http://user:secret@127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def url(site: tuple[Path, str]) -> str:
    folder, base = site
    write_pyramid(folder / "a.tif", tissue_like(700, 600, MPP), MPP)
    return f"{base}/a.tif".replace("user:secret@", "")


@pytest.mark.usefixtures("cache")
def test_a_remote_slide_is_the_slide(site: tuple[Path, str], url: str) -> None:
    with_url, local = open_slide(url), open_slide(str(site[0] / "a.tif"))
    assert (with_url.size_px, with_url.mpp) == (local.size_px, local.mpp)
    for slide in (with_url, local):
        np.testing.assert_array_equal(
            slide.read_region(5, 7, 300, 200, MPP), local.read_region(5, 7, 300, 200, MPP)
        )
    with_url.close()
    local.close()


def test_it_is_fetched_once_and_again_when_it_has_changed(
    site: tuple[Path, str], url: str, cache: Path
) -> None:
    first = fetch(url)
    assert fetch(url) == first
    assert GETS["/a.tif"] == 1
    write_pyramid(site[0] / "a.tif", tissue_like(800, 600, MPP), MPP)
    second = fetch(url)
    assert second != first
    assert second.read_bytes() == (site[0] / "a.tif").read_bytes()
    assert [p for p in cache.iterdir() if p.is_dir()] == []


def test_an_embedding_of_a_url_equals_that_of_the_file(
    site: tuple[Path, str], url: str, cache: Path, tmp_path: Path
) -> None:
    settings = EmbedSettings(("colour",), GridSpec(MPP, 32, 32))
    for slide, store in ((url, "remote"), (str(site[0] / "a.tif"), "local")):
        sheet = tmp_path / f"{store}.csv"
        sheet.write_text(f"slide_id,slide\nA,{slide}\n")
        (result,) = embed(str(sheet), str(tmp_path / store), settings)
        assert result.state == "done", result.reason
    records = [Store.open(str(tmp_path / store)).slide("A") for store in ("remote", "local")]
    assert records[0].fingerprint == records[1].fingerprint
    assert records[0].source == url
    remote, local = (
        {p.relative_to(tmp_path / s): p.read_bytes() for p in (tmp_path / s).rglob("embedding/c/*/*/0")}
        for s in ("remote", "local")
    )
    assert remote == local != {}


def test_the_folder_keeps_to_its_size_and_keeps_what_is_used(
    site: tuple[Path, str], url: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (site[0] / "a.tif").stat().st_size
    cache.mkdir()
    strangers = [cache / f"{i}.tif" for i in range(3)]  # of other processes, which have ended
    for age, path in enumerate(strangers):
        path.write_bytes(b"x" * size)
        os.utime(path, (100 - age, 100 - age))
    used = fetch(url)
    os.utime(used, (1, 1))  # used longest ago, but used
    monkeypatch.setenv(ENV_GB, str(3.5 * size / 1e9))
    (site[0] / "b.tif").write_bytes((site[0] / "a.tif").read_bytes())
    newest = fetch(url.replace("a.tif", "b.tif"))
    assert {p for p in cache.iterdir() if p.is_file()} == {used, newest, strangers[0]}


@pytest.mark.usefixtures("cache")
def test_what_cannot_be_fetched_is_said_in_one_line_without_secrets(site: tuple[Path, str], url: str) -> None:
    with pytest.raises(SlideNotFoundError) as missing:
        fetch(url.replace("a.tif", "none.tif"))
    with pytest.raises(SlideError) as dead:
        fetch("http://user:secret@127.0.0.1:9/a.tif?token=secret")
    with pytest.raises(SlideError, match="several files") as folder:
        fetch("s3://bucket/a.mrxs")
    for refused in (missing, dead, folder):
        assert "\n" not in str(refused.value)
        assert "secret" not in str(refused.value)
