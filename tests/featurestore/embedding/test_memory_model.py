import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from make_slides import tissue_like, write_pyramid

from featurestore.embedding import memory_model
from featurestore.embedding.memory_model import memory_bytes, worker_bytes
from featurestore.grid import GridSpec, PatchGrid

RUN = """
import re, sys
from pathlib import Path
from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
settings = EmbedSettings((sys.argv[2],), GridSpec(1.0, 256, 32), block_shape=(32, 32))
(planned,) = embed(sys.argv[1], "none", settings, dry_run=True)
(done,) = embed(sys.argv[1], sys.argv[3], settings)
assert done.computed == planned.planned > 3
# Not ru_maxrss: a process inherits that from whoever started it.
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(planned.worker_bytes, int(peak[1]) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["morphology"])
def test_a_run_holds_less_than_was_said_before_it_and_not_much_less(tmp_path: Path, encoder: str) -> None:
    slide = write_pyramid(tmp_path / "a.tif", tissue_like(2000, 1900, 1.0), 1.0, tile=256)
    command = [sys.executable, "-c", RUN, str(slide), encoder, str(tmp_path / "store")]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    said, held = map(int, ran.stdout.split())
    assert 0.3 * said < held < said


def test_what_costs_more_is_said_to_cost_more() -> None:
    assert _bytes() < _bytes(threads=2) < _bytes(threads=2, batch=256)
    assert _bytes() < _bytes(patch=448)
    assert _bytes(dims=(1536,)) < _bytes(dims=(1536, 1536))
    assert _bytes(threads=2) - _bytes() == _bytes(threads=3) - _bytes(threads=2)


@pytest.mark.parametrize(
    ("where", "bytes_of_one"),
    [
        ("patch_reader.MAX_STRIP_PX", 2 * 2 * 3),
        ("read_ahead.READ_AHEAD", 2 * 64 * 3 * 224**2),
        ("pyramid_slide.MAX_SOURCE_PX", 2 * 3 * 3 * 4),
        ("readers.jpeg_tile_reader.CACHED_PX", 3),
    ],
)
def test_a_reader_that_keeps_more_is_said_to_keep_more(
    monkeypatch: pytest.MonkeyPatch, where: str, bytes_of_one: int
) -> None:
    module, name = f"featurestore.slides.{where}".rsplit(".", 1)
    before, kept = _bytes(threads=2), getattr(importlib.import_module(module), name)
    monkeypatch.setattr(f"featurestore.slides.{where}", 2 * kept)
    assert _bytes(threads=2) - before == kept * bytes_of_one


def test_a_block_that_the_grid_cannot_fill_costs_what_it_holds() -> None:
    grid = PatchGrid.for_slide((500, 400), 0.5, (0.5,), GridSpec(0.5, 224, 224))
    said = {
        worker_bytes(10**9, grid, (7,), threads=1, batch=batch, block_shape=shape, open_slides=1)
        for shape in ((1, 2), (32, 32), (10**6, 10**6))
        for batch in (2, 64)
    }
    assert len(said) == 1


def test_the_limit_of_a_container_counts_where_it_is_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_model, "CONTAINER_LIMITS", (str(tmp_path / "v2"), str(tmp_path / "v1")))
    whole = memory_bytes()
    (tmp_path / "v2").write_text("max\n")
    assert memory_bytes() == whole
    (tmp_path / "v1").write_text("123456\n")
    assert memory_bytes() == 123456


def _bytes(patch: int = 224, dims: tuple[int, ...] = (100,), threads: int = 1, batch: int = 64) -> int:
    grid = PatchGrid.for_slide((20000, 20000), 0.5, (0.5,), GridSpec(0.5, patch, 224))
    return worker_bytes(10**9, grid, dims, threads=threads, batch=batch, block_shape=(32, 32), open_slides=1)
