"""One slide under two ids: refused, whichever way the two come together."""

import shutil
from pathlib import Path

import pytest
from make_slides import tissue_like, write_pyramid

from featurestore.embedding.duplicates import AHEAD, DuplicateCheck
from featurestore.embedding.embed import EmbedSettings, SlideResult, embed
from featurestore.errors import SlideError
from featurestore.grid import GridSpec
from featurestore.slides.sample_sheet import Sample
from featurestore.storage.store import Store

SETTINGS = EmbedSettings(("colour",), GridSpec(1.0, 64, 64))
ALLOWED = EmbedSettings(("colour",), GridSpec(1.0, 64, 64), allow_duplicates=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two slides that differ, and copies of the first before and after it in the order of names."""
    slides = tmp_path / "slides"
    slides.mkdir()
    write_pyramid(slides / "b.tif", tissue_like(300, 260, 1.0, seed=2), 1.0)
    write_pyramid(slides / "c.tif", tissue_like(300, 260, 1.0, seed=3), 1.0)
    for copy in ("a", "d"):
        shutil.copy(slides / "b.tif", slides / f"{copy}.tif")
    return slides


def _states(results: list[SlideResult]) -> dict[str, str]:
    return {result.slide_id: result.state for result in results}


def _stored(store: Path) -> list[str]:
    return Store.open(store).slide_ids()


def test_of_copies_in_one_run_the_first_row_is_embedded_and_named_by_the_others(
    folder: Path, tmp_path: Path
) -> None:
    results = embed(folder, tmp_path / "store", SETTINGS)
    assert _states(results) == {"a": "done", "b": "failed", "c": "done", "d": "failed"}
    for number in (1, 3):
        assert "the same file as slide 'a' of an earlier row" in results[number].reason
        assert "--allow-duplicates" in results[number].reason
    assert _stored(tmp_path / "store") == ["a", "c"]
    assert set(Store.open(tmp_path / "store").failures()[0]) == {"b", "d"}
    again = embed(folder, tmp_path / "store", SETTINGS)
    assert _states(again) == _states(results)
    assert [result.computed for result in again] == [0] * 4


@pytest.mark.e2e
def test_workers_refuse_the_same_rows(folder: Path, tmp_path: Path) -> None:
    results = embed(folder, tmp_path / "store", SETTINGS, workers=2)
    assert _states(results) == {"a": "done", "b": "failed", "c": "done", "d": "failed"}
    assert _stored(tmp_path / "store") == ["a", "c"]


def test_a_slide_that_the_store_has_under_another_id_is_refused_also_in_an_earlier_row(
    folder: Path, tmp_path: Path
) -> None:
    embed(folder / "b.tif", tmp_path / "store", SETTINGS)
    results = embed(folder, tmp_path / "store", SETTINGS)
    assert _states(results) == {"a": "failed", "b": "done", "c": "done", "d": "failed"}
    assert "the same file as slide 'b' in the store" in results[0].reason


def test_duplicates_that_were_allowed_go_on_and_others_may_still_not_join_them(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "a.tif").rename(tmp_path / "a.tif")
    assert set(_states(embed(folder, tmp_path / "store", ALLOWED)).values()) == {"done"}
    assert set(_states(embed(folder, tmp_path / "store", SETTINGS)).values()) == {"done"}
    (result,) = embed(tmp_path / "a.tif", tmp_path / "store", SETTINGS)
    assert result.state == "failed"


def test_a_slide_that_was_removed_from_the_store_is_no_duplicate(folder: Path, tmp_path: Path) -> None:
    embed(folder / "b.tif", tmp_path / "store", SETTINGS)
    Store.open(tmp_path / "store").remove("b")
    assert _states(embed(folder / "d.tif", tmp_path / "store", SETTINGS)) == {"d": "done"}


def test_slides_are_compared_as_their_turn_comes(folder: Path, tmp_path: Path) -> None:
    """A run of ten thousand slides must not read of them all before its first block."""
    taken = 0

    def rows() -> list[Sample]:
        nonlocal taken
        for number in range(10 * AHEAD):
            taken += 1
            yield Sample(f"s{number}", str(folder / ("b.tif" if number else "c.tif")))

    refused: list[tuple[str, str]] = []
    check = DuplicateCheck(Store.open_or_create(tmp_path / "store"), allowed=False)
    accepted = check.accepted(rows(), lambda sample, error: refused.append((sample.slide_id, str(error))))
    assert next(accepted).slide_id == "s0"
    assert taken == AHEAD
    assert [sample.slide_id for sample in accepted] == ["s1"]
    assert [slide_id for slide_id, _ in refused] == [f"s{number}" for number in range(2, 10 * AHEAD)]


def test_slides_that_cannot_be_read_and_empty_ones_are_left_to_who_opens_them(
    folder: Path, tmp_path: Path
) -> None:
    for name in ("x.tif", "y.tif"):
        (folder / name).write_bytes(b"")
    files = ["x.tif", "y.tif", "gone.tif", "gone.tif"]
    samples = [Sample(f"s{number}", str(folder / name)) for number, name in enumerate(files)]

    def refuse(sample: Sample, error: SlideError) -> None:
        raise AssertionError(sample)

    check = DuplicateCheck(Store.open_or_create(tmp_path / "store"), allowed=False)
    assert list(check.accepted(samples, refuse)) == samples
