"""Embedding from Python, in this process."""

from pathlib import Path

from make_slides import tissue_like, write_pyramid

from featurestore import EmbedSettings, GridSpec, catalogue, embed, open_store, validate
from featurestore.analysis.patch_stream import open_stream
from featurestore.storage.removal import remove

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
