"""Whatever is wrong with one slide is that slide's failure, in one line; the others are embedded."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import s3fs
import tifffile
from make_slides import painted, write_pyramid

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.embedding.slide_result import SlideResult
from featurestore.embedding.worker import Job, plan_job
from featurestore.errors import SlideError, SlideNotFoundError
from featurestore.grid import GridSpec
from featurestore.slides.access_errors import access_error
from featurestore.slides.download_cache import ENV_FOLDER
from featurestore.slides.fingerprint import slide_fingerprint
from featurestore.slides.open_slide import open_slide
from featurestore.slides.sample_sheet import Sample

IMAGE = painted(131, 97)
SETTINGS = EmbedSettings(encoders=("colour",), spec=GridSpec(0.5, 16, 16), tissue="none")


def damaged_xml(path: Path) -> None:
    metadata = {"axes": "YXS", "Name": "AAAA", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    tifffile.imwrite(path, IMAGE, photometric="rgb", ome=True, metadata=metadata)
    path.write_bytes(path.read_bytes().replace(b"AAAA", b"H&E "))


def endless_directory(path: Path) -> None:
    path.write_bytes(b"II*\0\x08\0\0\0\xff\xff" + bytes(40))


def cut_off(path: Path) -> None:
    write_pyramid(path, IMAGE, 0.5)
    path.write_bytes(path.read_bytes()[:20_000])


def zarr_of(attributes: object) -> dict[str, object]:
    return {"zarr_format": 3, "node_type": "group", "attributes": {"ome": {"multiscales": attributes}}}


def write_zarr(path: Path, document: object) -> None:
    path.mkdir()
    (path / "zarr.json").write_text(json.dumps(document))


def write_all(folder: Path) -> list[str]:
    """Write slides of which each is wrong in another way; return their names."""
    damaged_xml(folder / "xml.ome.tif")
    endless_directory(folder / "directory.tif")
    cut_off(folder / "cut.tif")
    (folder / "empty.svs").write_bytes(b"")
    (folder / "bytes.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(30))
    (folder / "short.jpg").write_bytes(b"\xff\xd8\xff")
    write_zarr(folder / "list.zarr", [])
    write_zarr(folder / "axes.zarr", zarr_of([{"axes": 5, "datasets": 7}]))
    write_zarr(folder / "empty.zarr", zarr_of([]))
    write_zarr(folder / "level.zarr", zarr_of([{"axes": [{"name": "y"}], "datasets": [{"path": "0"}]}]))
    (folder / "file.zarr").write_bytes(b"x")
    others = ["file.zarr/inside.zarr", "n" * 300 + ".tif", "gone.svs"]
    return [*sorted(path.name for path in folder.iterdir()), *others]


def test_one_bad_slide_of_each_kind_leaves_the_others_whole(tmp_path: Path) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    names = write_all(folder)
    write_pyramid(folder / "good.tif", IMAGE, 0.5)
    store = str(tmp_path / "store.zarr")
    for number, name in enumerate([*names, "good.tif"]):
        sample = Sample(f"S{number}", str(folder / name), fallback_mpp=0.5)
        result = plan_job_of(store, sample)
        if name == "good.tif":
            assert not isinstance(result, SlideResult)
            continue
        assert isinstance(result, SlideResult), name
        assert result.state == "failed"
        assert "\n" not in result.reason


def plan_job_of(store: str, sample: Sample) -> object:
    """Plan a slide as a worker process does."""
    from featurestore.storage.store import Store

    Store.open_or_create(store)
    return plan_job(Job(f"run of {sample.slide_id}", store, sample, SETTINGS))


def test_a_run_over_a_folder_goes_on_after_a_bad_slide(tmp_path: Path) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    damaged_xml(folder / "A.ome.tif")
    write_pyramid(folder / "B.tif", IMAGE, 0.5)
    write_zarr(folder / "C.zarr", zarr_of([{"axes": 5, "datasets": 7}]))
    states = {result.slide_id: result.state for result in embed(folder, tmp_path / "store.zarr", SETTINGS)}
    assert states == {"A.ome": "failed", "B": "done", "C": "failed"}
    dry = embed(folder, tmp_path / "none.zarr", SETTINGS, dry_run=True)
    assert [result.state for result in dry] == ["failed", "planned", "failed"]


@contextmanager
def answering(status: int) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status)

        do_HEAD = do_GET  # noqa: N815  # http.server goes by this name

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://user:pa55@127.0.0.1:{server.server_port}/a.tif?sig=s3cret"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_a_server_that_says_no_is_not_a_slide_that_is_missing(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENV_FOLDER, str(tmp_path))
    with answering(status) as url:
        for look in (open_slide, slide_fingerprint):
            with pytest.raises(SlideError) as caught:
                look(url)
            message = str(caught.value)
            assert isinstance(caught.value, SlideNotFoundError) == (status == 404)
            assert status == 404 or f"the server answers {status}" in message
            assert "pa55" not in message
            assert "s3cret" not in message
            assert "\n" not in message


@pytest.fixture
def fresh_clients() -> Iterator[None]:
    """fsspec keeps clients by their options, and with them the credentials that there were: not into or out of a test."""
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.usefixtures("fresh_clients")
def test_no_credentials_is_a_slide_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for name in ("a.svs", "a.zarr"):
        for look in (open_slide, slide_fingerprint):
            with pytest.raises(SlideError, match="credentials"):
                look(f"s3://bucket-without-keys/{name}")


def test_a_library_that_repeats_a_signed_url_does_not_give_its_signature_away() -> None:
    error = OSError("403 from url='https://me:pa55@host/a.svs?X-Signature=s3cret' (try again)")
    message = str(access_error("https://host/a.svs", error, "cannot be read"))
    assert message == "https://host/a.svs cannot be read: 403 from url='https://host/a.svs' (try again)"


def test_random_damage_to_a_header_is_a_slide_error_or_a_slide(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    damaged_bytes = 24
    write_pyramid(tmp_path / "a.tif", IMAGE, 0.5)
    tifffile.imwrite(
        tmp_path / "b.tif", IMAGE, photometric="rgb", ome=True, metadata={"axes": "YXS", "PhysicalSizeX": 0.5}
    )
    for name in ("a.tif", "b.tif"):
        whole = (tmp_path / name).read_bytes()
        for _ in range(30):
            data = np.frombuffer(whole, np.uint8).copy()
            data[rng.integers(4, 900, damaged_bytes)] = rng.integers(0, 256, damaged_bytes)
            (tmp_path / "x.tif").write_bytes(data.tobytes())
            try:
                slide = open_slide(tmp_path / "x.tif", 0.5)
                slide.read_region(0, 0, 64, 64, 0.5, upsample=True)
                slide.close()
            except SlideError:
                pass
