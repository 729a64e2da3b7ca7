"""`histosge embed --private`: no name of a file in a store, wherever one looks; and the way back on this machine."""

import csv
import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from make_slides import tissue_like, write_pyramid

from featurestore.slides.sample_sheet import Sample
from featurestore.slides.stored_source import open_stored_slide
from featurestore.storage.private_map import PrivateMap
from featurestore.storage.private_text import remove_names
from featurestore.storage.store import Store

Histosge = Callable[..., NamedTuple]
WORDS = (b"mustermann", b"erika", b"dorfklinik", b"befund", b"kaputt", b"verloren", b"umriss")
GRID = ("--encoder", "colour", "--mpp", 1, "--patch", 32)


def _damage(path: Path) -> None:
    """Overwrite a tile in the middle of the finest level: the slide opens, and some patches cannot be read."""
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 3000] = bytes(3000)
    path.write_bytes(data)


@pytest.fixture
def slides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a good slide, one with unreadable patches and one that cannot be opened, all with telling names."""
    monkeypatch.setenv("HISTOSGE_PRIVATE", str(tmp_path / "lists"))
    folder = tmp_path / "Dorfklinik Befund"
    folder.mkdir()
    for seed, name in enumerate(("Mustermann_Erika", "Erika verloren")):
        write_pyramid(folder / f"{name}.tif", tissue_like(400, 360, 1.0, seed=seed), 1.0)
    _damage(folder / "Erika verloren.tif")
    (folder / "kaputt Mustermann.svs").write_bytes(b"no slide")
    return folder


def _found(store: Path) -> dict[str, list[bytes]]:
    """Return the words that stand in a store, by where: in a path or in the bytes of a file."""
    found = {}
    for file in [store, *store.rglob("*")]:
        name = str(file.relative_to(store.parent)).encode()
        data = (name + b"\0" + (file.read_bytes() if file.is_file() else b"")).lower()
        if words := [word for word in WORDS if word in data]:
            found[name.decode()] = words
    return found


def _rows(folder: Path) -> list[dict[str, str]]:
    (file,) = (folder / "lists").glob("*.csv")
    with file.open(newline="") as text:
        return list(csv.DictReader(text))


def test_no_word_of_a_file_name_stands_in_the_store_after_any_run(
    histosge: Histosge, slides: Path, tmp_path: Path
) -> None:
    store, report = tmp_path / "store", tmp_path / "report.html"
    command = ("embed", slides, store, *GRID, "--private", "--tissue", "none")
    first = histosge(*command, "--report", report, "--log", tmp_path / "log")
    assert first.code == 1
    assert "1 of 3 slides failed" in first.out
    ids = sorted(json.loads(histosge("ls", store, "--json").out), key=lambda row: row["slide"])
    assert {row["state"] for row in ids} == {"done", "failed"}
    assert sum(row["unreadable"] or 0 for row in ids) > 0  # a record of a block's failure is there, too
    assert _found(store) == {}
    for file in (report, report.with_suffix(".json"), tmp_path / "log"):
        assert not [word for word in WORDS if word in file.read_bytes().lower()], file
    before = {file: file.read_bytes() for file in store.rglob("embedding/c/*/*/0")}
    again = histosge(*command, "--retry-failed")
    assert again.code == 1
    assert {row["slide"] for row in json.loads(histosge("ls", store, "--json").out)} == {
        row["slide"] for row in ids
    }
    assert {file: file.read_bytes() for file in store.rglob("embedding/c/*/*/0")} == before
    assert _found(store) == {}
    assert "nothing to do" in histosge(*command).out
    assert histosge("validate", store).code == 0


@pytest.mark.e2e
def test_workers_leave_no_names_either_and_take_the_same_ids(
    histosge: Histosge, slides: Path, tmp_path: Path
) -> None:
    command = ("embed", slides, tmp_path / "store", *GRID, "--private", "--tissue", "none")
    assert histosge(*command, "--workers", 2).code == 1
    assert _found(tmp_path / "store") == {}
    ids = [row["slide_id"] for row in _rows(tmp_path)]
    assert "nothing to do" in histosge(*command).out
    assert [row["slide_id"] for row in _rows(tmp_path)] == ids


def test_the_list_on_this_machine_leads_to_the_slides_and_is_nobody_elses_to_read(
    histosge: Histosge, slides: Path, tmp_path: Path
) -> None:
    histosge("embed", slides, tmp_path / "store", *GRID, "--private")
    (file,) = (tmp_path / "lists").glob("*.csv")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    shutil.move(tmp_path / "store", tmp_path / "elsewhere")  # the token is in the store, not its place
    store = Store.open(tmp_path / "elsewhere")
    row = next(row for row in _rows(tmp_path) if "Mustermann_Erika" in row["slide"])
    record = store.slide(row["slide_id"])
    assert record.source == row["slide"]
    slide = open_stored_slide(record.source, record.mpp, record.fingerprint)
    assert slide.size_px == (400, 360)
    slide.close()
    file.unlink()
    assert Store.open(tmp_path / "elsewhere").slide(row["slide_id"]).source == ""


def test_a_list_that_was_lost_is_made_again_from_the_slides(
    histosge: Histosge, slides: Path, tmp_path: Path
) -> None:
    command = ("embed", slides, tmp_path / "store", *GRID, "--private")
    histosge(*command)
    earlier = {row["slide"]: row["slide_id"] for row in _rows(tmp_path) if row["slide"].endswith(".tif")}
    shutil.rmtree(tmp_path / "lists")
    assert "nothing to do" in histosge(*command).out
    now = {row["slide"]: row["slide_id"] for row in _rows(tmp_path) if row["slide"].endswith(".tif")}
    assert now == earlier


def test_ids_of_the_sheet_stay_and_the_list_is_a_sheet_for_other_commands(
    histosge: Histosge, slides: Path, tmp_path: Path
) -> None:
    sheet = tmp_path / "sheet.csv"
    sheet.write_text(
        f"slide_id,slide,mpp,donor\nP1,{slides}/Mustermann_Erika.tif,1.0,D1\n,{slides}/Erika verloren.tif,,\n"
    )
    assert histosge("embed", sheet, tmp_path / "store", *GRID, "--private").code == 0
    first, second = _rows(tmp_path)
    assert (first["slide_id"], first["mpp"], first["donor"]) == ("P1", "1.0", "D1")
    assert second["slide_id"].startswith("slide-")
    assert second["donor"] == second["slide_id"]
    (file,) = (tmp_path / "lists").glob("*.csv")
    again = histosge("embed", file, tmp_path / "store", *GRID, "--private")
    assert (again.code, again.out.count("nothing to do")) == (0, 2)


def test_the_name_of_a_mask_is_kept_out_too(histosge: Histosge, slides: Path, tmp_path: Path) -> None:
    (tmp_path / "Umriss Erika.geojson").write_text("{}")
    sheet = tmp_path / "sheet.csv"
    sheet.write_text(f"slide,mask\n{slides}/Mustermann_Erika.tif,Umriss Erika.geojson\n")
    ran = histosge("embed", sheet, tmp_path / "store", *GRID, "--private")
    assert (ran.code, "failed: " in ran.out) == (1, True)
    assert _found(tmp_path / "store") == {}


def test_a_store_is_private_or_not(histosge: Histosge, slides: Path, tmp_path: Path) -> None:
    slide = slides / "Mustermann_Erika.tif"
    assert histosge("embed", slide, tmp_path / "open", *GRID).code == 0
    mixed = histosge("embed", slide, tmp_path / "open", *GRID, "--private")
    assert (mixed.code, "made without --private" in mixed.err) == (2, True)
    assert histosge("embed", slide, tmp_path / "private", *GRID, "--private").code == 0
    mixed = histosge("embed", slide, tmp_path / "private", *GRID)
    assert (mixed.code, "give --private again" in mixed.err) == (2, True)


def test_a_dry_run_names_slides_by_their_place_and_writes_no_list(
    histosge: Histosge, slides: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page"
    ran = histosge("embed", slides, tmp_path / "store", *GRID, "--private", "--dry-run", "--preview", page)
    assert "slide-1: " in ran.out
    assert not (tmp_path / "lists").exists()
    assert _found(page) == {}


@pytest.mark.parametrize("cut", [0, 5, 11, 23])
def test_names_that_a_message_cut_or_quoted_are_taken_out(cut: int) -> None:
    path = "/data/Dorfklinik/Mustermann, Erika 1950/befund 3.svs"
    whole = (
        f"{path} cannot be opened: tifffile: {path[: len(path) - cut]}; Erika's MUSTERMANN-befund; umriss.dat"
    )
    text = remove_names(whole, [path])
    assert not [word for word in WORDS if word in text.lower().encode()]
    assert "cannot be opened: tifffile" in text


def test_the_names_of_urls_are_taken_out_also_as_they_are_quoted() -> None:
    url = "s3://dorfklinik/Mustermann%20Erika/befund.svs"
    text = remove_names(f"GET https://host/dorfklinik/x: 403; {url}; Mustermann Erika", [url])
    assert not [word for word in WORDS if word in text.lower().encode()]


def test_ids_are_drawn_and_say_nothing_of_their_slide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HISTOSGE_PRIVATE", str(tmp_path))
    samples = [Sample("a", "/x/a.svs", donor="a"), Sample("b", "/x/b.svs", donor="D")]
    one, other = (PrivateMap(token * 32).name_samples(samples) for token in "01")
    assert len({sample.slide_id for sample in (*one, *other)}) == 4
    assert [(s.slide, s.donor == s.slide_id) for s in one] == [("/x/a.svs", True), ("/x/b.svs", False)]
    assert [s.slide_id for s in PrivateMap("0" * 32).name_samples(samples[::-1])] == [
        one[1].slide_id,
        one[0].slide_id,
    ]


def test_a_token_of_a_hostile_store_leads_nowhere(histosge: Histosge, tmp_path: Path) -> None:
    (tmp_path / "zarr.json").write_text(
        json.dumps(
            {
                "zarr_format": 3,
                "node_type": "group",
                "attributes": {"spec": "histosge-featurestore", "version": 1, "private": "../../etc/passwd"},
            }
        )
    )
    ran = histosge("ls", tmp_path)
    assert (ran.code, ran.err.count("\n")) == (2, 1)


def test_without_a_home_the_list_is_not_lost_in_a_temporary_folder(
    histosge: Histosge, slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HISTOSGE_PRIVATE", str(tmp_path / "file" / "folder"))
    ran = histosge("embed", slides, tmp_path / "store", *GRID, "--private")
    assert (ran.code, "HISTOSGE_PRIVATE" in ran.err) == (2, True)
    assert _found(tmp_path / "store") == {}
    assert [file.name for file in (tmp_path / "store").iterdir()] == ["zarr.json"]
