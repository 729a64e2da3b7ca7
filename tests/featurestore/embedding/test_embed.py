"""Embedding from Python, in this process."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from make_slides import tissue_like, write_pyramid

from featurestore import EmbedSettings, GridSpec, catalogue, embed, open_store, validate
from featurestore.analysis.patch_stream import open_stream
from featurestore.embedding import slide_grid
from featurestore.embedding.block_task import embed_blocks
from featurestore.embedding.slide_grid import resident_bytes
from featurestore.encoders.protocol import EncoderIdentity
from featurestore.events import Progress
from featurestore.grid import PatchGrid
from featurestore.slides.open_slide import open_slide
from featurestore.storage.removal import remove
from featurestore.storage.store import SlideRecord, Store
from featurestore.tissue.survey import Survey

SETTINGS = EmbedSettings(("colour",), GridSpec(1.0, 32, 32), block_shape=(5, 7))


def test_a_path_is_taken_wherever_a_string_is(tmp_path: Path) -> None:
    slide = write_pyramid(tmp_path / "a.tif", tissue_like(400, 360, 1.0), 1.0)
    store = tmp_path / "store"
    (result,) = embed(slide, store, SETTINGS)
    assert result.computed == result.planned > 1
    assert catalogue(store)["state"].to_list() == ["done"]
    assert validate(store, deep=True) == []
    assert list(open_store(store).children) == ["a"]
    assert sum(len(block.rows) for block in open_stream(store).blocks()) == result.patches
    assert remove(store, "a", None, None, dry_run=True) == ["a"]


class NoVectors:
    """An encoder that gives NaN for every patch."""

    identity = EncoderIdentity("none", 3, {"algorithm": "NaN"})

    def encode(self, patches: np.ndarray) -> np.ndarray:
        return np.full((len(patches), 3), np.nan, np.float32)


def test_why_patches_failed_is_recorded_before_their_block_is_written(tmp_path: Path) -> None:
    """Once a block exists nobody computes it again: were it written first, a crash would lose the reason."""
    path = str(write_pyramid(tmp_path / "a.tif", tissue_like(400, 360, 1.0), 1.0))
    slide, encoder, store = open_slide(path), NoVectors(), Store.open_or_create(tmp_path / "store")
    grid = PatchGrid.for_slide(slide.size_px, slide.mpp, slide.level_mpps, GridSpec(1.0, 32, 32))
    store.add_slide(SlideRecord("a", path, slide.size_px, slide.mpp, "1-a"))
    tissue, rgb = np.full(grid.shape, 255, np.uint8), np.zeros((*grid.shape, 3), np.uint8)
    store.add_grid("a", grid, Survey(tissue, rgb, {"name": "none"}), {})
    array, stored = store.add_embedding("a", grid, encoder.identity, (5, 7)), store.grid("a", grid.spec.key)
    # A file where the objects' folder belongs: nothing can be written, as on a disk that is full.
    (tmp_path / "store" / array.path / "c").write_text("")
    block = stored.planned((5, 7))[1]
    with pytest.raises(OSError, match="c/0/1"):
        list(embed_blocks(store, slide, stored, {block: ("none",)}, {"none": encoder}))
    slide.close()
    ((name, record),) = store.block_failures("a")
    assert name == f"{grid.spec.key}/none/0.1"
    assert record["reason"] == "the encoder gave no finite vector"
    assert len(record["patches"]) == 5 * (grid.n_cols - 7)


@pytest.fixture(scope="module")
def slide_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pyramid(tmp_path_factory.mktemp("slide") / "a.tif", tissue_like(400, 360, 1.0), 1.0)


def _objects(store: Path) -> dict[str, bytes]:
    return {str(file.relative_to(store)): file.read_bytes() for file in store.rglob("embedding/c/*/*/0")}


@pytest.mark.parametrize("workers", [None, 1])
def test_encoders_with_blocks_of_unlike_shape_are_planned_each_by_its_own(
    slide_file: Path, tmp_path: Path, workers: int | None
) -> None:
    both = replace(SETTINGS, encoders=("colour", "morphology"), block_shape=(3, 4))
    for name in ("whole", "killed"):
        embed(slide_file, tmp_path / name, SETTINGS)
    (other,) = embed(slide_file, tmp_path / "killed", replace(both, encoders=("morphology",)))
    # Some of either's blocks are lost; among them one whose index the other's array does not have.
    for encoder, n in (("colour", 2), ("morphology", 5)):
        for file in sorted((tmp_path / "killed").rglob(f"{encoder}/embedding/c/*/*/0"))[-n:]:
            file.unlink()
    (done,) = embed(slide_file, tmp_path / "whole", both)
    assert done.computed == other.planned
    assert done.planned == other.planned + len(list((tmp_path / "whole").rglob("colour/embedding/c/*/*/0")))

    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(slide_file, tmp_path / "killed", both, on_progress=stop)
    (resumed,) = embed(slide_file, tmp_path / "killed", both, workers=workers)
    assert 0 < resumed.computed < 7
    assert _objects(tmp_path / "killed") == _objects(tmp_path / "whole")
    assert validate(tmp_path / "killed", deep=True) == []


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_grid_of_too_many_patches_is_refused_with_the_least_stride_that_fits(
    slide_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry_run: bool
) -> None:
    monkeypatch.setattr(slide_grid, "MAX_GRID_PATCHES", 1_000)
    (result,) = embed(
        slide_file, tmp_path / "store", replace(SETTINGS, spec=GridSpec(1.0, 32, 1)), dry_run=dry_run
    )
    assert result.state == "failed"
    assert "would have 329 x 369 patches" in result.reason
    found = re.search(r"give --stride (\d+) or more$", result.reason)
    assert found is not None
    stride = int(found[1])
    for pixels, state in ((stride, "planned"), (stride - 1, "failed")):
        (result,) = embed(
            slide_file, tmp_path / "s", replace(SETTINGS, spec=GridSpec(1.0, 32, pixels)), dry_run=True
        )
        assert result.state == state
        assert (result.state == "failed") == (result.reason != "")


@pytest.mark.parametrize(
    "settings",
    [
        replace(SETTINGS, spec=GridSpec(1.0, 8192, 8192), tissue="none"),
        replace(SETTINGS, spec=GridSpec(1.0, 32, 1), encoders=("morphology",), block_shape=(300, 300)),
    ],
    ids=["patch", "block"],
)
def test_a_block_that_needs_more_memory_than_there_is_is_refused_before_it_is_allocated(
    slide_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: EmbedSettings
) -> None:
    limit = resident_bytes() + 500_000_000
    monkeypatch.setattr(slide_grid, "memory_bytes", lambda: limit)
    for dry_run in (True, False):
        (result,) = embed(slide_file, tmp_path / "store", settings, dry_run=dry_run)
        assert result.state == "failed"
        assert re.search(r"needs about [\d.]+ GB of memory, and there are [\d.]+; use smaller", result.reason)
    assert not list((tmp_path / "store").glob("a*"))


def test_a_patch_that_is_larger_than_the_slide_is_one_patch(slide_file: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, spec=GridSpec(1.0, 1500, 1500), tissue="none")
    (result,) = embed(slide_file, tmp_path / "store", settings)
    assert (result.state, result.patches, result.computed, result.unreadable) == ("done", 1, 1, 0)
