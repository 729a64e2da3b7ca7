"""Which URLs are opened, wherever they come from, and with which options."""

import json
import os
from pathlib import Path

import fsspec
import pytest

from featurestore.errors import SlideError, StoreError
from featurestore.file_systems import (
    ENV_SIGNED,
    SCHEMES,
    anonymous_access,
    check_url,
    open_file_system,
    storage_options,
)
from featurestore.location import Location
from featurestore.slides.fingerprint import slide_fingerprint
from featurestore.slides.open_slide import open_slide
from featurestore.storage.store import Store

FOREIGN = (
    "reference://x.zarr",
    "simplecache::s3://bucket/a.tif",
    "filecache::https://host/a.tif",
    "zip://a.tif::https://host/a.zip",
    "https://host/a.tif::file:///etc/passwd",
    "ftp://host/a.tif",
    "github://owner:repo@/a.tif",
    "local:///etc/passwd",
    "S3://bucket/a.tif",
    "python://x",
)


@pytest.mark.parametrize("url", FOREIGN)
def test_a_url_of_another_scheme_is_refused_with_the_list(url: str) -> None:
    for refused_by, error in (
        (open_slide, SlideError),
        (slide_fingerprint, SlideError),
        (Store.open, StoreError),
        (Store.open_or_create, StoreError),
        (open_file_system, StoreError),
    ):
        with pytest.raises(error, match="is not opened: a URL begins with one of") as refused:
            refused_by(url)
        assert all(f"{scheme}://" in str(refused.value) for scheme in SCHEMES)
        assert "\n" not in str(refused.value)


def test_a_reference_file_system_runs_no_template(tmp_path: Path) -> None:
    """Templates of fsspec's reference file systems are Jinja, which ran code up to fsspec 2025.9."""
    proof = tmp_path / "proof"
    template = "{{ cycler.__init__.__globals__.os.system('touch " + str(proof) + "') }}"
    references = {"version": 1, "templates": {"u": template}, "refs": {"a.zarr/.zgroup": ["{{u}}", 0, 10]}}
    (tmp_path / "refs.json").write_text(json.dumps(references))
    for url in (f"reference://a.zarr::{tmp_path}/refs.json", f"reference://a.zarr?fo={tmp_path}/refs.json"):
        with pytest.raises(SlideError, match="is not opened"):
            slide_fingerprint(url)
        with pytest.raises(SlideError, match="is not opened"):
            open_slide(url)
    assert not proof.exists()


def test_a_folder_with_a_chain_in_its_name_is_a_folder(tmp_path: Path) -> None:
    place = Location(str(tmp_path / "zip::a"))
    place.write_json("b.json", {"c": 3})
    assert json.loads((tmp_path / "zip::a" / "b.json").read_text()) == {"c": 3}
    assert place.read_json("b.json") == {"c": 3}
    assert isinstance(place._fs_root[0], type(fsspec.filesystem("file")))


def test_a_name_that_s3_cannot_hold_is_refused_before_any_request() -> None:
    check_url("s3://bucket/" + "a" * 1024)
    for url in ("s3://bucket/" + "a" * 1025, "s3://bucket/" + "é" * 513):
        with pytest.raises(StoreError, match="S3 takes 1024"):
            Store.open(url)
        with pytest.raises(SlideError, match="S3 takes 1024"):
            open_slide(url)
    with pytest.raises(StoreError, match="S3 takes 1024"):
        Location("s3://bucket/store").read_json("a" * 1100)


def test_anonymous_access_is_for_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    monkeypatch.delenv(ENV_SIGNED, raising=False)
    assert "anon" not in storage_options("s3://bucket/a")
    with anonymous_access(signed=["s3://mine/store"]):
        assert storage_options("s3://bucket/a")["anon"] is True
        assert storage_options("s3://mine/storeroom/a")["anon"] is True
        assert storage_options("gs://bucket/a")["token"] == "anon"
        assert storage_options("az://bucket/a")["anon"] is True
        assert "anon" not in storage_options("https://host/a")
        for url in ("s3://mine/store", "s3://mine/store/S1/zarr.json"):
            assert "anon" not in storage_options(url)
    assert "anon" not in storage_options("s3://bucket/a")
    assert ENV_SIGNED not in os.environ


def test_what_is_written_is_anonymous_only_where_there_are_no_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with anonymous_access(signed=["s3://mine/store"]):
        assert storage_options("s3://mine/store")["anon"] is True
