"""A store on a real S3 server: what it costs in requests, and what troubled servers do to it."""

import os
from pathlib import Path

import fsspec
import pytest
from _s3 import SECRET
from running import OPTIONS, S3, Start, blocks, contents, wait_for_blocks

from featurestore.slides.open_slide import open_slide
from featurestore.slides.readers.jpeg_tile_reader import JpegTileSlide
from featurestore.storage.catalogue import catalogue
from featurestore.storage.store import Store
from featurestore.storage.validation import validate
from histosge.data.embedded_slide import load_patches, open_embedded

pytestmark = [pytest.mark.s3, pytest.mark.e2e]
URL = "s3://test/store"


@pytest.fixture
def reach(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reach the server from this process too."""
    for name, value in s3.environ.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()


def test_a_slide_costs_one_put_per_block_and_a_constant(
    start: Start, sheet: Path, s3: S3, undisturbed: dict[str, bytes]
) -> None:
    code, out, err = start("embed", sheet, URL, *OPTIONS, "--quiet", **s3.environ).wait()
    assert (code, err) == (0, "")
    assert contents(s3.store()) == undisturbed
    puts = [path for method, path in s3.proxy.log if method == "PUT"]
    assert (
        len(puts) == len(set(puts)) or max(map(puts.count, puts)) == 2
    )  # a group is written, then consolidated
    per_block = [path for path in puts if "/embedding/c/" in path]
    assert len(per_block) == len(set(per_block)) == sum("/embedding/c/" in name for name in undisturbed)
    assert not [
        path for method, path in s3.proxy.log if method in ("GET", "HEAD") and "/embedding/c/" in path
    ]
    assert len(puts) - len(per_block) < 20 * 3
    assert SECRET not in out
    assert not any(SECRET.encode() in data for data in contents(s3.store()).values())

    s3.proxy.reset()
    code, out, _ = start("embed", sheet, URL, *OPTIONS, **s3.environ).wait()
    assert (code, out.count("nothing to do")) == (0, 3)
    assert s3.proxy.requests["PUT"] == 0
    assert sum(s3.proxy.requests.values()) < 40 * 3


@pytest.mark.usefixtures("reach")
def test_reading_costs_the_gets_of_the_blocks_and_a_constant(start: Start, sheet: Path, s3: S3) -> None:
    assert start("embed", sheet, URL, *OPTIONS, "--encoder", "colour", **s3.environ).wait()[0] == 0
    s3.proxy.reset()
    slide = open_embedded(Store.open(URL), "S1", None, None)
    opening = sum(s3.proxy.requests.values())
    assert opening < 40
    s3.proxy.reset()
    assert len(load_patches(slide)) > 100
    reads = [path for method, path in s3.proxy.log if method == "GET" and "/embedding/c/" in path]
    assert len(reads) == len(set(reads)) == len(slide.stored.planned(slide.array.block_shape))
    s3.proxy.reset()
    frame = catalogue(URL)
    assert frame["state"].to_list() == ["done"] * 3
    # Of the store its document, its slides and its failures; of a slide one listing, its document and its tissue.
    assert sum(s3.proxy.requests.values()) <= 4 + 3 * 5
    assert validate(URL, deep=True) == []


@pytest.mark.usefixtures("reach")
def test_a_flipped_byte_is_found_and_mended(start: Start, sheet: Path, s3: S3) -> None:
    assert start("embed", sheet, URL, *OPTIONS, "--encoder", "colour", **s3.environ).wait()[0] == 0
    undisturbed = contents(s3.store())
    bucket = fsspec.filesystem("s3")
    damaged, lost = (f"test/{path.relative_to(s3.store().parent)}" for path in sorted(blocks(s3.store()))[:2])
    whole = bucket.cat_file(damaged)
    bucket.pipe_file(damaged, whole[:100] + bytes([whole[100] ^ 4]) + whole[101:])
    bucket.rm(lost)
    found = {problem.path.rsplit("embedding")[-1]: problem for problem in validate(URL, deep=True)}
    assert len(found) == 2
    for problem in found.values():
        assert "embed" in problem.fix or "rm" in problem.fix
    bucket.rm(damaged)
    assert contents(s3.store()) != undisturbed
    assert start("embed", sheet, URL, *OPTIONS, "--encoder", "colour", **s3.environ).wait()[0] == 0
    assert contents(s3.store()) == undisturbed


def _every(n: int, trouble: str | float) -> object:
    return lambda number, method, path: trouble if number % n == 0 else None


@pytest.mark.parametrize(
    ("name", "n", "trouble"),
    [
        ("every third answer is 503", 3, "503"),
        ("every seventh connection is cut", 7, "cut"),
        ("slow", 9, 2.0),
    ],
)
def test_a_troubled_server_costs_nothing_but_time(
    start: Start, sheet: Path, s3: S3, undisturbed: dict[str, bytes], name: str, n: int, trouble: str | float
) -> None:
    s3.proxy.fault = _every(n, trouble)  # type: ignore[assignment]
    code, _, err = start("embed", sheet, URL, *OPTIONS, "--quiet", "--workers", 2, **s3.environ).wait()
    assert (code, err) == (0, ""), name
    assert s3.proxy.faults > 5
    assert contents(s3.store()) == undisturbed


def test_a_server_killed_in_the_middle_and_started_again_loses_nothing(
    start: Start, sheet: Path, s3: S3, undisturbed: dict[str, bytes]
) -> None:
    run = start("embed", sheet, URL, *OPTIONS, "--workers", 2, **s3.environ)
    wait_for_blocks(run, s3.store(), 2)
    s3.server.kill()
    before = {path: path.read_bytes() for path in blocks(s3.store())}
    os.sync()
    s3.server.start()
    code, _, err = run.wait()
    if code:  # the outage was longer than its patience: it says so, and goes on when asked
        assert "Traceback" not in err, err
        code, _, err = start("embed", sheet, URL, *OPTIONS, "--workers", 2, **s3.environ).wait()
    assert code == 0, err
    assert all(path.read_bytes() == data for path, data in before.items())
    assert contents(s3.store()) == undisturbed


@pytest.mark.usefixtures("reach")
def test_a_slide_on_s3_is_read_in_parts(sheet: Path, s3: S3) -> None:
    local = next(sheet.parent.rglob("*.tif"))
    fsspec.filesystem("s3").put_file(str(local), "test/slides/a.tif")
    s3.proxy.reset()
    remote, file = open_slide("s3://test/slides/a.tif"), open_slide(str(local))
    assert isinstance(remote, JpegTileSlide)
    region = (100, 100, 300, 200, file.mpp)
    assert (remote.read_region(*region) == file.read_region(*region)).all()
    assert sum(s3.proxy.requests.values()) < 15
