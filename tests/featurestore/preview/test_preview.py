"""The page of all slides: what its data says, what its pictures show, and where it may be written."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_slides import tissue_like, write_pyramid
from PIL import Image

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.errors import EarlierResultError, OutputError, StoreNotFoundError
from featurestore.grid import GridSpec
from featurestore.preview.outliers import far_slides
from featurestore.preview.planned_preview import PlannedPreview
from featurestore.preview.store_preview import write_preview
from featurestore.preview.thumbnail import LONGEST_PX, OUTLINE
from featurestore.storage.store import Store

SETTINGS = EmbedSettings(encoders=("colour",), spec=GridSpec(2.0, 32, 32))
GRID_KEY = SETTINGS.spec.key
# Slides at 2 microns per pixel: 702 x 551 px are 21 x 17 patches of 32 px.
N_SLIDES = 9


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    for number in range(N_SLIDES):
        image = tissue_like(702, 551, 2.0, seed=number)
        # One has its colours exchanged, as a reader that takes RGB for BGR would show it.
        write_pyramid(folder / f"s{number}.tif", image[..., ::-1] if number == 4 else image, 2.0)
    (folder / "broken.tif").write_bytes(b"no slide")
    return folder


@pytest.fixture(scope="module")
def embedded(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("embedded") / "store"
    embed(slides, store, SETTINGS)
    return store


@pytest.fixture
def store(embedded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(embedded, tmp_path / "store"))


def cards(page: Path) -> dict[str, dict[str, Any]]:
    lines = (page / "slides.js").read_text().splitlines()[1:]
    found = [json.loads(line.removeprefix("preview.add(").removesuffix(");")) for line in lines]
    return {card["slide_id"]: card for card in found}


def test_every_slide_has_a_card_with_its_state_and_its_reason(store: Path, tmp_path: Path) -> None:
    done = write_preview(store, tmp_path / "page")
    found = cards(tmp_path / "page")
    assert (done.slides, done.failed) == (N_SLIDES + 1, 1)
    assert found["broken"]["state"] == "failed"
    assert "broken.tif cannot be opened" in found["broken"]["reason"]
    stored = Store.open(store).grid("s0", GRID_KEY)
    first = found["s0"]
    assert (first["state"], first["size_px"], first["mpp"]) == ("done", [702, 551], 2.0)
    assert first["patches"] == int(stored.is_tissue.sum())
    assert first["embeddings"] == [
        {
            "grid": GRID_KEY,
            "encoder": "colour",
            "state": "done",
            "done": 1,
            "planned": 1,
            "unreadable": 0,
            "reason": "",
        }
    ]


def test_a_slide_that_lacks_blocks_is_partial(store: Path, tmp_path: Path) -> None:
    (store / "s1" / GRID_KEY / "colour/embedding/c/0/0/0").unlink()
    write_preview(store, tmp_path / "page", outliers=False)
    assert cards(tmp_path / "page")["s1"]["state"] == "partial"


def test_the_slide_with_other_colours_is_far_from_the_others_and_no_other_is(
    store: Path, tmp_path: Path
) -> None:
    assert write_preview(store, tmp_path / "page").outliers == 1
    found = cards(tmp_path / "page")
    assert [name for name, card in found.items() if card.get("is_outlier")] == ["s4"]
    assert found["s4"]["shift"] == max(card.get("shift", 0) for card in found.values())


def test_few_slides_have_no_outliers() -> None:
    assert far_slides({f"s{i}": 0.1 for i in range(6)} | {"far": 50.0}) == set()
    assert far_slides({f"s{i}": 0.1 for i in range(7)} | {"far": 50.0}) == {"far"}


def test_the_picture_is_the_slide_with_its_tissue_outlined(store: Path, slides: Path, tmp_path: Path) -> None:
    write_preview(store, tmp_path / "page", outliers=False)
    card = cards(tmp_path / "page")["s0"]
    assert card["picture_of"] == "slide"
    picture = np.asarray(Image.open(tmp_path / "page" / card["picture"]).convert("RGB")).astype(int)
    assert abs(max(picture.shape) - LONGEST_PX) <= 1
    # Outline pixels lie around the ellipse of tissue: about its centre, within its tissue patches' bounds.
    drawn = np.argwhere(np.abs(picture - OUTLINE).sum(axis=2) < 60)
    assert len(drawn) > 200
    stored = Store.open(store).grid("s0", GRID_KEY)
    rows, cols = np.nonzero(stored.is_tissue)
    scale = LONGEST_PX / 702 * 32
    assert drawn.min(axis=0) == pytest.approx([rows.min() * scale, cols.min() * scale], abs=3)
    assert drawn.max(axis=0) == pytest.approx([(rows.max() + 1) * scale, (cols.max() + 1) * scale], abs=3)


def test_a_slide_that_is_gone_or_was_replaced_is_shown_by_its_colours(
    store: Path, slides: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "s0.tif"
    (slides / "s0.tif").rename(moved)
    other = (slides / "s1.tif").read_bytes()
    try:
        write_preview(store, tmp_path / "page", outliers=False)
        write_pyramid(slides / "s0.tif", tissue_like(702, 551, 2.0, seed=99), 2.0)
        write_preview(store, tmp_path / "page again", outliers=False)
    finally:
        moved.replace(slides / "s0.tif")
    assert (slides / "s1.tif").read_bytes() == other
    for page in ("page", "page again"):
        card = cards(tmp_path / page)["s0"]
        assert card["picture_of"] == "colours"
        picture = np.asarray(Image.open(tmp_path / page / card["picture"]).convert("RGB")).astype(int)
        # The first patch is glass, and the one in the middle of the tissue is the stored colour.
        stored = Store.open(store).grid("s0", GRID_KEY)
        scale = LONGEST_PX / (stored.grid.n_cols * 32)
        row, col = 9, 9
        at = picture[int((row + 0.5) * 32 * scale), int((col + 0.5) * 32 * scale)]
        assert at == pytest.approx(stored.rgb[row, col].astype(int), abs=12)


def test_again_for_the_same_store_there_is_nothing_to_do_and_a_new_state_is_brought_up_to_date(
    store: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page"
    assert not write_preview(store, page).was_there
    names = {file.name: file.stat().st_mtime_ns for file in (page / "pictures").iterdir()}
    assert write_preview(store, page).was_there
    assert {file.name: file.stat().st_mtime_ns for file in (page / "pictures").iterdir()} == names
    Store.open(store).remove("s3")
    assert not write_preview(store, page).was_there
    assert "s3" not in cards(page)
    assert not list((page / "pictures").glob("s3-*"))


def test_no_page_takes_the_place_of_another_stores_page_or_of_something_else(
    store: Path, slides: Path, tmp_path: Path
) -> None:
    write_preview(store, tmp_path / "page", outliers=False)
    embed(slides / "s0.tif", tmp_path / "other/store", SETTINGS)
    with pytest.raises(EarlierResultError, match="preview of another store"):
        write_preview(tmp_path / "other/store", tmp_path / "page")
    assert write_preview(tmp_path / "other/store", tmp_path / "page", overwrite=True).slides == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds something that is no preview"):
        write_preview(store, tmp_path / "mine")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    with pytest.raises(StoreNotFoundError):
        write_preview(tmp_path / "none", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_dry_run_shows_what_would_be_embedded_and_writes_no_store(
    slides: Path, embedded: Path, tmp_path: Path
) -> None:
    page = PlannedPreview.open(tmp_path / "page", tmp_path / "store", ("colour",))
    page.finish(embed(slides, tmp_path / "store", SETTINGS, dry_run=True, on_survey=page.add_survey))
    assert not (tmp_path / "store").exists()
    planned = cards(tmp_path / "page")
    assert planned["broken"]["state"] == "failed"
    # What is embedded afterwards is what was shown, picture and all.
    shutil.copytree(embedded, tmp_path / "store")
    write_preview(tmp_path / "store", tmp_path / "page", outliers=False)
    stored = cards(tmp_path / "page")
    for name in ("s0", "s4"):
        assert planned[name]["state"] == "planned"
        for fact in ("patches", "tissue_share", "picture", "grid", "mpp", "size_px"):
            assert stored[name][fact] == planned[name][fact], fact


def test_a_name_cannot_end_the_script_that_it_stands_in(store: Path, tmp_path: Path) -> None:
    Store.open(store).record_failure("_failures/s0.json", {"slide_id": "s0", "reason": "</script><b>1"})
    write_preview(store, tmp_path / "page", outliers=False)
    assert "<" not in (tmp_path / "page/slides.js").read_text()
    assert cards(tmp_path / "page")["s0"]["reason"] == "</script><b>1"
