"""Streaming from a real S3 server: one GET a block, none from the disk's copies, and 503 is waited out."""

import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
from _stores import Made, write_store
from running import S3

from histosge import Loader, LoadSettings

pytestmark = pytest.mark.s3
URL = "s3://test/store"
BLOCKS = 9


def test_a_block_costs_one_get_and_then_none(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write_store(tmp_path / "store", 1, Made((17, 23), 5, (7, 11), frame=3))
    shutil.copytree(tmp_path / "store", s3.store())
    for name, value in {**s3.environ, "HISTOSGE_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    settings = LoadSettings(batch=50, seed=1)
    expected = [batch.embedding for batch in Loader(store.location.url, settings=settings).epoch(0)]
    s3.proxy.fault = lambda number, method, path: (
        "503" if "/embedding/c/" in path and number % 5 == 0 else None
    )
    loader = Loader(URL, settings=settings)

    def stream() -> int:
        """Go through the first epoch, and return how often blocks were asked for."""
        s3.proxy.reset()
        got = [batch.embedding for batch in loader.epoch(0)]
        assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))
        return sum(method == "GET" and "/embedding/c/" in path for method, path in s3.proxy.log)

    assert stream() == BLOCKS + s3.proxy.faults
    assert stream() == 0
    monkeypatch.setenv("HISTOSGE_BLOCK_CACHE_GB", "0")
    s3.proxy.fault = None
    loader = Loader(URL, settings=settings)
    assert [stream(), stream()] == [BLOCKS, BLOCKS]
