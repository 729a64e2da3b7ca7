"""The page of a store on S3, and of a slide that lies there too."""

import json
import os
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import s3fs
from _s3 import BUCKET, environment
from _s3 import serving as serving_s3
from viewer_world import GENES, Get, World, serving

from featurestore.file_systems import storage_options
from histosge.viewer.collection import Collection

pytestmark = pytest.mark.s3
HERE = 2


@pytest.fixture
def remote(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with serving_s3() as server:
        for name, value in environment(server.port).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HISTOSGE_CACHE", str(tmp_path / "cache"))
        url = f"s3://{BUCKET}"
        # fsspec keeps clients by their options: not one of another server, or without these credentials.
        s3fs.S3FileSystem.clear_instance_cache()
        fs, _ = fsspec.core.url_to_fs(url, **storage_options(url))
        for name in ("store", "maps"):
            fs.put(f"{getattr(world, name)}{os.sep}", f"{BUCKET}/{name}/", recursive=True)
        fs.put(str(world.store.parent / "slides" / "here.tif"), f"{BUCKET}/here.tif")
        yield url
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_page_is_read_on_demand_from_s3(remote: str, get: Get, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.csv"
    sheet.write_text(f"slide_id,slide\nhere,{remote}/here.tif\n")
    with serving(Collection.open(f"{remote}/store", f"{remote}/maps", str(sheet))) as address:

        def ask(path: str) -> bytes:
            with urllib.request.urlopen(f"{address}/data/{HERE}/{path}", timeout=120) as answer:
                return answer.read()

        assert ask("slide.json") == get(f"data/{HERE}/slide.json").body.replace(
            b'"spots":true', b'"spots":false'
        )
        gene = ask("layers/0/genes/0.f16")
        assert gene == get(f"data/{HERE}/layers/0/genes/0.f16").body
        assert np.isfinite(np.frombuffer(gene, "<f2")).any()
        assert json.loads(ask("layers/0/layer.json"))["genes"] == list(GENES)
        deadline = time.monotonic() + 120
        while json.loads(ask("picture.json"))["state"] == "opening":
            assert time.monotonic() < deadline
        assert ask("tiles/0/0_0.jpg") == get(f"data/{HERE}/tiles/0/0_0.jpg").body
