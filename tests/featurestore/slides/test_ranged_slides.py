"""Remote slides of JPEG tiles: only what is needed is fetched; served by real servers."""

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from make_slides import tissue_like

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.errors import MppError, SlideError, SlideNotFoundError
from featurestore.grid import GridSpec
from featurestore.slides.download_cache import ENV_FOLDER
from featurestore.slides.fingerprint import slide_fingerprint
from featurestore.slides.open_slide import open_slide
from featurestore.slides.range_reader import MAX_GAP, MAX_PART, merge_ranges
from featurestore.slides.readers.jpeg_tile_reader import JpegTileSlide
from featurestore.storage.store import Store

MPP = 0.5


@dataclass
class Site:
    """A folder behind a web server that serves ranges."""

    folder: Path
    url: str = ""
    sent: int = 0
    requests: list[str | None] = field(default_factory=list)
    broken_after: int | None = None


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, *args: Any, site: Site, **kwargs: Any) -> None:
        self.site = site
        super().__init__(*args, directory=str(site.folder), **kwargs)

    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.site.requests.append(wanted)
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or "")
        file = Path(self.translate_path(self.path))
        if match is None or not file.is_file():
            super().do_GET()
            return
        if self.site.broken_after is not None and len(self.site.requests) > self.site.broken_after:
            self.send_error(500)
            return
        start, stop = int(match[1]), int(match[2]) + 1
        data = file.read_bytes()[start:stop]
        self.site.sent += len(data)
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{file.stat().st_size}")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv(ENV_FOLDER, str(tmp_path / "cache"))
    found = Site(tmp_path / "site")
    found.folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, site=found))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield found
    server.shutdown()
    server.server_close()


def _write(path: Path, mpp: float | None = MPP, side: int = 2048) -> Path:
    """Write a pyramid of JPEG tiles, mostly grain, so that it is of some size."""
    image = tissue_like(side, side, 4.0)
    image = np.clip(image + np.random.default_rng(0).integers(-9, 9, image.shape), 0, 255).astype(np.uint8)
    resolution = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as file:
        for level, step in enumerate((1, 2, 4)):
            file.write(
                image[::step, ::step],
                tile=(256, 256),
                compression="jpeg",
                compressionargs={"level": 97},
                photometric="rgb",
                subfiletype=1 if level else 0,
                metadata=None,
                **resolution,
            )
            if resolution:
                resolution["resolution"] = (1e4 / mpp / (2 * step), 1e4 / mpp / (2 * step))  # type: ignore[operator]
    return path


def test_it_is_the_same_slide_as_the_file(site: Site) -> None:
    path = _write(site.folder / "a.tif")
    remote, local = open_slide(f"{site.url}/a.tif"), open_slide(str(path))
    assert isinstance(remote, JpegTileSlide)
    assert (remote.size_px, remote.mpp, remote.level_mpps) == (local.size_px, local.mpp, local.level_mpps)
    assert remote.source == f"{site.url}/a.tif"
    for mpp, region in ((0.5, (300, 100, 700, 500)), (1.0, (0, 0, 1024, 1024)), (1.4, (50, 70, 300, 200))):
        np.testing.assert_array_equal(remote.read_region(*region, mpp), local.read_region(*region, mpp))
    remote.close()
    local.close()


def test_no_more_is_fetched_than_what_is_looked_at(site: Site) -> None:
    size = _write(site.folder / "a.tif").stat().st_size
    slide = open_slide(f"{site.url}/a.tif")
    opening = site.sent
    assert opening < size / 3
    requests = len(site.requests)
    slide.read_region(0, 0, 512, 512, MPP)  # four tiles, two rows: those of a row lie side by side
    assert site.sent - opening < size / 10
    assert len(site.requests) - requests <= 2
    slide.read_region(0, 0, 512, 500, MPP)
    slide.close()


def test_its_fingerprint_is_that_of_the_file_and_costs_two_mib(site: Site) -> None:
    path = _write(site.folder / "a.tif")
    assert path.stat().st_size > 3 << 20
    assert slide_fingerprint(f"{site.url}/a.tif") == slide_fingerprint(str(path))
    assert site.sent == (2 << 20) + 1  # one byte tells whether the server serves parts


def test_an_embedding_equals_that_of_the_file_and_leaves_no_copy(site: Site, tmp_path: Path) -> None:
    path = _write(site.folder / "a.tif")
    settings = EmbedSettings(("colour",), GridSpec(MPP, 128, 128))
    stored = {}
    for name, slide in (("remote", f"{site.url}/a.tif"), ("local", str(path))):
        sheet = tmp_path / f"{name}.csv"
        sheet.write_text(f"slide_id,slide\nA,{slide}\n")
        (result,) = embed(str(sheet), str(tmp_path / name), settings)
        assert result.state == "done", result.reason
        root = tmp_path / name
        stored[name] = {p.relative_to(root): p.read_bytes() for p in root.rglob("embedding/c/*/*/0")}
        stored[name]["fingerprint"] = Store.open(str(root)).slide("A").fingerprint
    assert stored["remote"] == stored["local"]
    assert len(stored["local"]) > 1
    assert not (tmp_path / "cache").exists()


def test_a_server_that_fails_later_leaves_holes_that_are_counted(site: Site, tmp_path: Path) -> None:
    _write(site.folder / "a.tif")
    slide = open_slide(f"{site.url}/a.tif")
    site.broken_after = len(site.requests)
    with pytest.raises(SlideError) as refused:
        slide.read_region(0, 0, 300, 300, MPP)
    assert "a.tif cannot be read" in str(refused.value)
    assert "\n" not in str(refused.value)
    slide.close()


def test_other_tiffs_are_fetched_whole(site: Site, tmp_path: Path) -> None:
    tifffile.imwrite(site.folder / "flat.tif", tissue_like(300, 200, 4.0), photometric="rgb")
    slide = open_slide(f"{site.url}/flat.tif", 4.0)
    assert slide.size_px == (300, 200)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    slide.close()


def test_what_is_missing_is_said(site: Site) -> None:
    _write(site.folder / "a.tif", mpp=None)
    with pytest.raises(MppError, match="--slide-mpp"):
        open_slide(f"{site.url}/a.tif")
    with pytest.raises(SlideNotFoundError, match=r"no slide at .*none\.tif"):
        open_slide(f"{site.url}/none.tif")


def test_parts_that_lie_close_are_one_request_and_none_is_too_large() -> None:
    near, far = 100 + MAX_GAP, 10 * MAX_PART
    assert merge_ranges([(far, 7), (0, 100), (near, 50)]) == [(0, near + 50), (far, far + 7)]
    assert merge_ranges([(0, 100), (101 + MAX_GAP, 5)]) == [(0, 100), (101 + MAX_GAP, 106 + MAX_GAP)]
    row = [(i * 1_000_000, 1_000_000) for i in range(20)]
    assert all(stop - start <= MAX_PART + 1_000_000 for start, stop in merge_ranges(row))
