"""`embed --report`: what was done, how fast, what failed, as a page and as JSON."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from make_slides import tissue_like, write_pyramid

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from featurestore.storage.store import Store

Histosge = Callable[..., Any]
OPTIONS = ("--encoder", "colour", "--mpp", 1, "--patch", 64, "--tissue", "none")
SETTINGS = EmbedSettings(encoders=("colour",), spec=GridSpec(1.0, 64, 64), tissue="none")
# 640 x 512 px: 10 x 8 patches of 64 px, 20 tiles of 128 px.
WIDTH, HEIGHT, TILE, N_PATCHES = 640, 512, 128, 80


def _jpeg_tiles(path: Path) -> Path:
    tifffile.imwrite(
        path,
        tissue_like(WIDTH, HEIGHT, 1.0),
        tile=(TILE, TILE),
        photometric="rgb",
        compression="jpeg",
        resolution=(1e4, 1e4),
        resolutionunit="CENTIMETER",
    )
    return path


def _report(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    return found


def test_both_files_name_what_is_done_what_failed_and_why(histosge: Histosge, tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    _jpeg_tiles(slides / "whole.tif")
    (slides / "broken.tif").write_bytes(b"no slide")
    ran = histosge("embed", slides, tmp_path / "S", *OPTIONS, "--report", tmp_path / "run.html", "--quiet")
    assert ran.code == 1
    found = _report(tmp_path / "run.html")
    assert found["slides"] == {"done": 1, "failed": 1, "planned": 0}
    assert found["complete"]
    assert [failure["slide_id"] for failure in found["failures"]] == ["broken"]
    assert "broken.tif cannot be opened" in found["failures"][0]["reason"]
    assert found["patches"] == N_PATCHES
    # Seconds are rounded to thousandths.
    assert N_PATCHES / found["patches_per_second"] == pytest.approx(found["seconds"], abs=0.001)
    assert found["settings"]["grid"] == "mpp1.0000_px64_stride64"
    identity = Store.open(tmp_path / "S").identity("whole", "mpp1.0000_px64_stride64", "colour")
    assert found["encoders"][0]["fingerprint"] == identity.fingerprint
    assert {"histosge", "numpy", "python"} <= set(found["software"])
    page = (tmp_path / "run.html").read_text()
    assert "1 slide done, 1 failed" in page
    assert "broken.tif cannot be opened" in page


def test_bytes_and_requests_are_those_of_the_tiles_and_of_the_objects(
    histosge: Histosge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide = _jpeg_tiles(tmp_path / "slide.tif")
    read: list[int] = []
    pread = os.pread

    def counting(handle: int, n: int, at: int) -> bytes:
        read.append(n)
        return pread(handle, n, at)

    monkeypatch.setattr(os, "pread", counting)
    # JSON may be named as well.
    ran = histosge("embed", slide, tmp_path / "S", *OPTIONS, "--report", tmp_path / "run.json", "--quiet")
    assert ran.code == 0
    found = _report(tmp_path / "run.json")
    assert (tmp_path / "run.html").is_file()
    # At least every tile once: for the overview, and for the patches what has left the cache since.
    with tifffile.TiffFile(slide) as file:
        tiles = file.pages[0].databytecounts
    assert found["requests"] == len(read) >= len(tiles)
    assert found["bytes_read"] == sum(read) >= sum(tiles)
    objects = [file for file in (tmp_path / "S/slide").rglob("embedding/c/*/*/*") if file.is_file()]
    assert found["objects_written"] == len(objects) == 1
    # Each object ends with a checksum of four bytes.
    assert found["bytes_written"] == sum(file.stat().st_size - 4 for file in objects)
    for stage in ("plan", "read", "decode", "write"):
        assert found["stage_seconds"][stage] >= 0


def test_a_reader_that_counts_no_bytes_says_so(histosge: Histosge, tmp_path: Path) -> None:
    slide = write_pyramid(tmp_path / "slide.tif", tissue_like(WIDTH, HEIGHT, 1.0), 1.0)
    assert histosge("embed", slide, tmp_path / "S", *OPTIONS, "--report", tmp_path / "run.html").code == 0
    assert _report(tmp_path / "run.html")["bytes_read"] is None
    assert "do not count bytes" in (tmp_path / "run.html").read_text()


def test_the_next_run_replaces_its_report_and_another_file_is_left_alone(
    histosge: Histosge, tmp_path: Path
) -> None:
    slide = _jpeg_tiles(tmp_path / "slide.tif")
    command = ("embed", slide, tmp_path / "S", *OPTIONS, "--quiet", "--report")
    assert histosge(*command, tmp_path / "run.html").code == 0
    assert histosge(*command, tmp_path / "run.html").code == 0
    found = _report(tmp_path / "run.html")
    assert (found["patches"], found["objects_written"]) == (0, 0)
    (tmp_path / "mine.json").write_text("{}")
    for place, expected in (
        ("mine.html", "is no report of embed"),
        ("run.txt", "must end in .html or .json"),
    ):
        ran = histosge(*command, tmp_path / place)
        assert ran.code == 2
        assert expected in ran.err
    assert (tmp_path / "mine.json").read_text() == "{}"
    assert not (tmp_path / "mine.html").exists()


def test_a_run_that_stops_reports_the_slides_that_were_finished(
    histosge: Histosge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    for name in ("a.tif", "b.tif"):
        _jpeg_tiles(slides / name)
    from featurestore.embedding import embed as module

    planned = module.plan_slide

    def stop_at_b(store: Any, slide: Any, sample: Any, *rest: Any) -> Any:
        if sample.slide_id == "b":
            raise KeyboardInterrupt
        return planned(store, slide, sample, *rest)

    monkeypatch.setattr(module, "plan_slide", stop_at_b)
    ran = histosge("embed", slides, tmp_path / "S", *OPTIONS, "--report", tmp_path / "run.html")
    assert ran.code == 130
    found = _report(tmp_path / "run.html")
    assert not found["complete"]
    assert [slide["slide_id"] for slide in found["per_slide"]] == ["a"]
    assert "stopped before its end" in (tmp_path / "run.html").read_text()


@pytest.mark.e2e
def test_workers_hand_back_the_same_counts(tmp_path: Path) -> None:
    slide = _jpeg_tiles(tmp_path / "slide.tif")
    (here,) = embed(slide, tmp_path / "here", SETTINGS)
    (there,) = embed(slide, tmp_path / "there", SETTINGS, workers=1)
    for name in ("patches", "requests", "bytes_read", "bytes_written", "objects"):
        assert getattr(there.costs, name) == getattr(here.costs, name), name
    assert there.costs.plan_seconds > 0
    assert np.isfinite(there.costs.encode_seconds)
