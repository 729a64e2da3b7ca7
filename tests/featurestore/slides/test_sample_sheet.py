from pathlib import Path

import pytest

from featurestore.errors import SampleSheetError
from featurestore.slides.sample_sheet import Sample, read_samples


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.svs", "b.tif", "notes.txt"):
        (tmp_path / "slides").mkdir(exist_ok=True)
        (tmp_path / "slides" / name).write_text("x")
    (tmp_path / "a.h5ad").write_text("x")
    return tmp_path


def _sheet(folder: Path, text: str) -> str:
    (folder / "sheet.csv").write_text(text)
    return str(folder / "sheet.csv")


def test_paths_are_relative_to_the_sheet_and_defaults_filled_in(folder: Path) -> None:
    text = "slide_id,slide,expression,mpp,donor\nA 1,slides/a.svs,a.h5ad,0.25,D\n,slides/b.tif,,,\n"
    first, second = read_samples(_sheet(folder, text), slide_mpp=0.7)
    assert first == Sample("A-1", str(folder / "slides/a.svs"), str(folder / "a.h5ad"), 0.25, "D")
    assert second == Sample("b", str(folder / "slides/b.tif"), None, 0.7, "b")


def test_only_the_slide_column_is_needed(folder: Path) -> None:
    (row,) = read_samples(_sheet(folder, "slide\nslides/a.svs\n"))
    assert (row.slide_id, row.donor, row.mpp, row.expression) == ("a", "a", None, None)


def test_urls_are_kept(folder: Path) -> None:
    (row,) = read_samples(_sheet(folder, "slide\ns3://bucket/a.svs\n"))
    assert row.slide == "s3://bucket/a.svs"


def test_a_folder_gives_its_slides_in_order(folder: Path) -> None:
    assert [s.slide_id for s in read_samples(str(folder / "slides"))] == ["a", "b"]


def test_one_slide_is_a_cohort_of_one(folder: Path) -> None:
    (row,) = read_samples(str(folder / "slides" / "a.svs"), slide_mpp=0.5)
    assert (row.slide_id, row.mpp) == ("a", 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide,expresion\nslides/a.svs,\n", r"'expresion': did you mean 'expression'"),
        ("slide,xyz\nslides/a.svs,red\n", r"'xyz': known: slide_id"),
        ("slide_id\nA\n", r"no column 'slide'"),
        ("slide\nslides/c.svs\n", r"line 2: slide 'slides/c.svs' does not exist"),
        (
            "slide,expression\nslides/a.svs,\nslides/b.tif,b.h5ad\n",
            r"line 3: expression 'b.h5ad' does not exist",
        ),
        ("slide_id,slide\nA,slides/a.svs\nA,slides/b.tif\n", r"'A' twice \(a.svs and b.tif\)"),
        ("slide_id,slide\nA 1,slides/a.svs\nA/1,slides/b.tif\n", r"'A-1' twice"),
        ("slide,mpp\nslides/a.svs,half\n", r"mpp 'half' is no number"),
        ("slide\n", r"no rows"),
    ],
)
def test_a_bad_sheet_is_refused_in_one_line_with_the_fix(folder: Path, text: str, message: str) -> None:
    with pytest.raises(SampleSheetError, match=message) as caught:
        read_samples(_sheet(folder, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere", "nowhere.csv"])
def test_nothing_there_is_said_so(folder: Path, name: str) -> None:
    with pytest.raises(SampleSheetError, match="there is no"):
        read_samples(str(folder / name))


def test_a_folder_without_slides_is_refused(folder: Path) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(SampleSheetError, match="without slides"):
        read_samples(str(folder / "empty"))
