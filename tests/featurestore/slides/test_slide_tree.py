"""A sample sheet from a tree of folders: ids, what is known, what is left out."""

import csv
from pathlib import Path

import numpy as np
import pytest
from make_slides import painted, write_pyramid
from PIL import Image

from featurestore.errors import SampleSheetError
from featurestore.slides.sample_sheet import read_samples
from featurestore.slides.sheet_listing import write_sheet
from featurestore.slides.slide_tree import list_tree, unique_ids
from histosge_cli import main


def slide(path: Path, mpp: float = 0.5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_pyramid(path, painted(150, 130), mpp, levels=1)


def by_path(folder: Path, sheet: Path | None = None) -> dict[str, str]:
    return {
        str(Path(row["slide"]).relative_to(folder)): row["slide_id"] for row in list_tree(folder, sheet).rows
    }


def test_ids_take_as_many_folders_as_it_needs_to_be_unique() -> None:
    paths = [
        "a/1/S.svs",
        "a/2/S.svs",
        "b/1/S.svs",
        "T.svs",
        "a/T.svs",
        "U.svs",
        "u.tif",
        "u/V.svs",
        "W (1).svs",
        "W [1].svs",
    ]
    ids = dict(zip(paths, unique_ids([Path(path) for path in paths]), strict=True))
    assert ids["a/2/S.svs"] == "2-S"
    assert (ids["a/1/S.svs"], ids["b/1/S.svs"]) == ("a-1-S", "b-1-S")
    assert ids["a/T.svs"] == "a-T"
    assert ids["T.svs"] == "T.svs"
    # A store is a folder, and on some disks U and u are one folder.
    assert (ids["U.svs"], ids["u.tif"], ids["u/V.svs"]) == ("U.svs", "u.tif", "V")
    assert ids["W (1).svs"] != ids["W [1].svs"]
    assert len({one.casefold() for one in ids.values()}) == len(paths)


def test_ids_are_unique_whatever_the_paths() -> None:
    rng = np.random.default_rng(0)
    names = ["A", "a", "A b", "A-b", "tissue", "ä", "B"]
    paths = sorted(
        {
            Path(*rng.choice(names, rng.integers(0, 3)), f"{rng.choice(names)}.{rng.choice(['svs', 'tif'])}")
            for _ in range(300)
        }
    )
    ids = unique_ids(paths)
    assert len({one.casefold() for one in ids}) == len(paths)
    assert "tissue" not in ids


def test_all_slides_below_a_folder_are_found_and_described(tmp_path: Path) -> None:
    folder = tmp_path / "slides"
    slide(folder / "A.tif", 0.25)
    slide(folder / "batch 1" / "A.tif")
    slide(folder / "batch 1" / "deep" / "B.tif")
    slide(folder / ".thumbnails" / "C.tif")
    (folder / "broken.svs").write_bytes(b"no slide")
    (folder / "batch 1" / "plot.png").touch()  # pictures beside slides are no slides
    (folder / "notes.txt").touch()
    found = list_tree(folder)
    assert by_path(folder) == {"A.tif": "A.tif", "batch 1/A.tif": "batch-1-A", "batch 1/deep/B.tif": "B"}
    assert found.rows[0]["known"] == "0.25 um/px, 150 x 130 px, generic-tiff"
    (reason,) = found.left_out
    assert reason.startswith("broken.svs: ")


def test_the_sheet_is_read_back_with_its_paths(tmp_path: Path) -> None:
    slide(tmp_path / "slides" / "A.tif")
    sheet = tmp_path / "sheet.csv"
    write_sheet(list_tree(tmp_path / "slides"), sheet, sheet)
    with sheet.open() as file:
        (row,) = csv.DictReader(file)
    assert row == {
        "slide_id": "A",
        "slide": "slides/A.tif",
        "expression": "",
        "mpp": "",
        "donor": "",
        "mask": "",
        "known": "0.5 um/px, 150 x 130 px, generic-tiff",
    }
    (sample,) = read_samples(sheet)
    assert (sample.slide, sample.mpp) == (str(tmp_path / "slides" / "A.tif"), None)


def test_slides_that_are_added_do_not_rename_those_of_the_earlier_sheet(tmp_path: Path) -> None:
    folder, sheet = tmp_path / "slides", tmp_path / "sheet.csv"
    slide(folder / "x" / "A.tif")
    write_sheet(list_tree(folder), sheet, sheet)
    slide(folder / "w" / "A.tif")
    assert by_path(folder) == {"w/A.tif": "w-A", "x/A.tif": "x-A"}
    assert by_path(folder, sheet) == {"w/A.tif": "w-A", "x/A.tif": "A"}
    sheet.write_text("no sheet at all")
    assert by_path(folder, sheet) == by_path(folder)


def test_a_slide_without_a_scale_has_a_row_that_says_so(tmp_path: Path) -> None:
    Image.fromarray(painted(40, 30)).save(tmp_path / "A.png")
    (row,) = list_tree(tmp_path).rows
    assert row["known"] == "no mpp: fill in the column mpp, 40 x 30 px, png"
    write_pyramid(tmp_path / "A.tif", painted(90, 70), 352.9, levels=1)
    known = next(row["known"] for row in list_tree(tmp_path).rows if row["slide"].endswith(".tif"))
    assert known.startswith(
        "no usable mpp (the file claims 352.9 microns per pixel): fill in the column mpp, 90 x 70 px"
    )


def test_the_command_names_no_donors_that_nobody_gave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slide(tmp_path / "slides" / "A.tif")
    slide(tmp_path / "slides" / "B.tif")
    monkeypatch.setattr(
        "sys.argv", ["histosge", "samples", str(tmp_path / "slides"), str(tmp_path / "sheet.csv")]
    )
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert not stopped.value.code
    assert capsys.readouterr().out.endswith(
        "sheet.csv: 2 slides; 2 without a donor: fill in the column donor\n"
    )


def test_a_folder_without_slides_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SampleSheetError, match="hold no slides that can be read"):
        list_tree(tmp_path)
    with pytest.raises(SampleSheetError, match="is no folder"):
        list_tree(tmp_path / "absent")
    (tmp_path / "A.svs").write_bytes(b"no slide")
    with pytest.raises(SampleSheetError, match=r"no slide of .* can be opened: A.svs: "):
        list_tree(tmp_path)
