import datetime as dt
import os
import time
import zipfile
from pathlib import Path

import openpyxl
import pytest
import zarr

from featurestore.errors import MppError, SampleSheetError, SlideWarning
from featurestore.names import slug
from featurestore.slides.sample_sheet import Sample, read_samples
from featurestore.slides.spreadsheet import read_cells
from featurestore.storage.store import Store


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
    assert first == Sample(
        "A-1", str(folder / "slides/a.svs"), str(folder / "a.h5ad"), 0.25, "D", 0.7, is_named=True
    )
    assert second == Sample("b", str(folder / "slides/b.tif"), None, None, "b", 0.7)


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
    assert (row.slide_id, row.mpp, row.fallback_mpp) == ("a", None, 0.5)


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


HEADER = "slide_id,slide,expression,mpp,donor"
ROWS = f"{HEADER}\r\nA,slides/a.svs,,0.5,D\r\nB,slides/b.tif,,,\r\n"


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf" + ROWS.encode(),
        ROWS.encode("utf-16"),
        ROWS.replace(",", ";").replace("0.5", "0,5").encode(),
        ROWS.replace(",", "\t").encode(),
        ROWS.replace("0.5", '"0,5"').encode(),
        ROWS.replace("0.5", "0.5 μm/px").encode(),
        ROWS.replace("0.5", "500 nm").encode(),
        ROWS.replace("slide_id,slide", "Slide_ID, Slide").encode(),
        ROWS.replace("b.tif,,,", "b.tif").encode(),
        ROWS.replace("b.tif,,,", "b.tif,nan,NaN,nan").encode(),
        (ROWS + "\r\n,,,,\r\n\r\n").encode(),
        ROWS.replace("\r\n", "\r").encode(),
    ],
)
def test_a_sheet_is_read_as_spreadsheets_write_it(folder: Path, data: bytes) -> None:
    for name in ("sheet.csv", "sheet.tsv", "SHEET.CSV"):
        (folder / name).write_bytes(data)
        first, second = read_samples(folder / name)
        assert (first.slide_id, first.mpp, first.donor) == ("A", 0.5, "D")
        assert (second.slide_id, second.mpp, second.donor, second.expression) == ("B", None, "B", None)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("s.csv", "slide_id,slide\nÜ,slides/a.svs\n".encode("latin-1"), "line 2: letters are not in UTF-8"),
        ("s.csv", b"slide_id,slide\nA,slides/a.svs,x\n", "line 2: 3 cells, and the header names 2"),
        ("s.csv", b'slide_id,slide\nA,"slides/a.svs\n', "no CSV with a header: line"),
        ("s.csv", b"", "it is empty"),
        ("s.csv", b"slide\n\0\1\n", "binary data"),
        ("s.xls", b"\xd0\xcf", "is a spreadsheet of a kind that is not read; save it as CSV"),
        ("s.xlsx", b"PK\3\4", r"cannot be read as an Excel file \(.*\); save it as CSV"),
        ("s.xlsx", b"", r"cannot be read as an Excel file"),
        ("s.csv", b",slide\n0,slides/a.svs\n", "column without a name"),
        ("s.csv", b"slide,slide \nslides/a.svs,slides/b.tif\n", "two columns 'slide'"),
        ("s.csv", b"slide_id,slide\n..,slides/a.svs\n", r"line 2: slide_id '\.\.' cannot name"),
        ("s.csv", b"slide_id,slide\nzarr.json,slides/a.svs\n", r"line 2: slide_id 'zarr\.json' cannot"),
        ("s.csv", b"slide\n" + b"x" * 5000 + b"\n", "line 2: slide 'x.*does not exist"),
    ],
)
def test_a_sheet_that_cannot_be_read_names_line_and_fix(
    folder: Path, name: str, data: bytes, message: str
) -> None:
    (folder / name).write_bytes(data)
    with pytest.raises(SampleSheetError, match=message) as caught:
        read_samples(folder / name)
    assert "\n" not in str(caught.value)


def _xlsx(path: Path, rows: list[list[object]]) -> Path:
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.create_sheet("notes").append(["slide", "nothing"])
    book.save(path)
    return path


def test_an_excel_sheet_is_read_as_its_csv_would_be(folder: Path) -> None:
    rows: list[list[object]] = [
        [],
        ["Slide_ID", " slide", "mpp", "donor", None],
        [7.0, "slides/a.svs", 0.25, dt.date(2026, 1, 31)],
        [None, None, None, None],
        ["x" * 245, "slides/b.tif", None, "=1/0", ""],
    ]
    path = _xlsx(folder / "sheet.xlsx", rows)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    sheet = "xl/worksheets/sheet1.xml"
    assert b"<v>7</v>" in parts[sheet]
    with zipfile.ZipFile(path, "w") as archive:  # as other programs write whole numbers
        for name, data in {**parts, sheet: parts[sheet].replace(b"<v>7</v>", b"<v>7.0</v>")}.items():
            archive.writestr(name, data)
    first, second = read_samples(path)
    assert (first.slide_id, first.mpp, first.donor) == ("7", 0.25, "2026-01-31")
    assert (second.mpp, second.donor) == (None, second.slide_id)
    assert len(second.slide_id) < 200
    with pytest.raises(SampleSheetError, match=r"sheet\.xlsx, line 3: slide 'gone\.svs' does not exist"):
        read_samples(_xlsx(folder / "sheet.xlsx", [["slide"], ["slides/a.svs"], ["gone.svs"]]))
    with pytest.raises(SampleSheetError, match="two columns 'slide'"):
        read_samples(_xlsx(folder / "sheet.xlsx", [["slide", "slide "], ["slides/a.svs", "slides/b.tif"]]))


def test_an_excel_sheet_of_other_programs_gives_no_warning_of_its_styles(folder: Path) -> None:
    path = _xlsx(folder / "sheet.xlsx", [["slide"], ["slides/a.svs"]])
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    styles = b'<styleSheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"/>'
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**parts, "xl/styles.xml": styles}.items():
            archive.writestr(name, data)
    assert len(read_samples(path)) == 1  # a warning is an error in tests


def test_rows_that_an_excel_sheet_leaves_out_are_not_made(folder: Path) -> None:
    path = _xlsx(folder / "sheet.xlsx", [["slide"], ["slides/a.svs"]])
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    sheet = "xl/worksheets/sheet1.xml"
    far = b'<row r="299993"><c r="A299993" t="inlineStr"><is><t>slides/b.tif</t></is></c></row></sheetData>'
    parts[sheet] = parts[sheet].replace(b"</sheetData>", far)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    assert read_cells(path) == [(1, ["slide"]), (2, ["slides/a.svs"]), (299993, ["slides/b.tif"])]


def test_an_excel_sheet_takes_no_more_memory_than_a_sheet_does(folder: Path) -> None:
    path = _xlsx(folder / "sheet.xlsx", [["slide"], ["slides/a.svs"]])
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    sheet = "xl/worksheets/sheet1.xml"
    far = b'<row r="1048576"><c r="XFD1048576" t="inlineStr"><is><t>x</t></is></c></row></sheetData>'
    entities = b'<!DOCTYPE w [<!ENTITY a "' + b"x" * 9000 + b'">]>' + parts[sheet]
    for name, part, said in (
        ("far", parts[sheet].replace(b"</sheetData>", far), "beyond"),
        ("wide", parts[sheet].replace(b'r="A2"', b'r="XFD2"'), "beyond"),
        ("bomb", b" " * (130 << 20), "unpacks to"),
        ("entities", entities, "document type"),
        ("cut", parts[sheet][:200], "cannot be read"),
    ):
        with zipfile.ZipFile(folder / f"{name}.xlsx", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for other, data in {**parts, sheet: part}.items():
                archive.writestr(other, data)
        started = time.process_time()
        with pytest.raises(SampleSheetError, match=said):
            read_samples(folder / f"{name}.xlsx")
        assert time.process_time() - started < 10


def test_pipes_and_sheets_without_end_are_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "pipe.csv")
    os.mkfifo(folder / "pipe.xlsx")
    os.mkfifo(folder / "slides" / "pipe.svs")
    for name in ("pipe.csv", "pipe.xlsx", "slides/pipe.svs"):
        with pytest.raises(SampleSheetError, match="there is no"):
            read_samples(folder / name)
    with pytest.warns(SlideWarning, match=r"pipe\.svs"):
        assert len(read_samples(folder / "slides")) == 2
    (folder / "large.csv").touch()
    os.truncate(folder / "large.csv", 1 << 30)
    with pytest.raises(SampleSheetError, match="more than 64 MB"):
        read_samples(folder / "large.csv")


def test_names_in_other_alphabets_stay_apart_and_are_the_same_on_a_mac(folder: Path) -> None:
    names = ["样本", "对照", "M\u00fcller", "Muller", "slide", "a" * 240, "a" * 241]
    ids = [sample.slide_id for sample in read_samples(_named(folder, names))]
    assert len(set(ids)) == len(names)
    assert all(slug(name) == name and len(name) < 200 for name in ids)
    assert ids[3:5] == ["Muller", "slide"]
    (decomposed,) = read_samples(_named(folder, ["Mu\u0308ller"]))
    assert decomposed.slide_id == ids[2]


def _named(folder: Path, names: list[str]) -> str:
    return _sheet(folder, "slide_id,slide\n" + "".join(f"{name},slides/a.svs\n" for name in names))


def test_a_signed_url_gives_its_file_name_as_id(folder: Path) -> None:
    url = "https://user:word@host/b/P1.svs?X-Signature=s3.cret"
    for samples in (_sheet(folder, f"slide\n{url}\n"), url):
        (row,) = read_samples(samples)
        assert (row.slide_id, row.slide) == ("P1", url)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-320, float("inf"), float("nan"), 25.0])
def test_an_absurd_mpp_for_all_slides_is_refused_at_once(folder: Path, value: float) -> None:
    with pytest.raises(MppError, match=r"--slide-mpp .* is outside 0\.05\.\.20"):
        read_samples(folder / "slides", slide_mpp=value)


def test_a_folder_of_links_into_a_content_store(folder: Path) -> None:
    (folder / "blobs").mkdir()
    (folder / "links").mkdir()
    for name, blob in (("A.ome.tif", "0f3a"), ("B.svs", "real.svs")):
        (folder / "blobs" / blob).write_text("x")
        (folder / "links" / name).symlink_to(folder / "blobs" / blob)
    first, second = read_samples(folder / "links")
    assert (first.slide_id, first.slide) == ("A.ome", str(folder / "links" / "A.ome.tif"))
    # Slides of several files have the others beside the target.
    assert (second.slide_id, second.slide) == ("B", str(folder / "blobs" / "real.svs"))


def test_what_a_folder_holds_besides_slides_is_left_out_and_named(folder: Path) -> None:
    slides = folder / "slides"
    for name in ("._a.svs", ".DS_Store", "c.vsi", "d.btf", "e.tf8", "f.qptiff"):
        (slides / name).write_text("x")
    (slides / "g.svs").symlink_to(folder / "nowhere.svs")
    with pytest.warns(SlideWarning) as warned:
        samples = read_samples(slides)
    assert [sample.slide_id for sample in samples] == ["a", "b", "d", "e", "f"]
    messages = sorted(str(warning.message) for warning in warned)
    assert len(messages) == 2
    assert messages[0].endswith("(a sample sheet can name them): c.vsi")
    assert messages[1].endswith("links to files that are not there: g.svs")


def test_stores_beside_slides_are_no_slides(folder: Path) -> None:
    Store.open_or_create(str(folder / "slides" / "features.zarr"))
    zarr.create_group(folder / "slides" / "counts.zarr", attributes={"encoding-type": "anndata"})
    zarr.create_group(folder / "slides" / "image.zarr", attributes={"ome": {"multiscales": [{}]}})
    zarr.create_group(folder / "slides" / "old.zarr", attributes={"multiscales": [{}]}, zarr_format=2)
    with pytest.warns(SlideWarning, match=r"Zarr folders without an OME-Zarr image: counts\.zarr$"):
        samples = read_samples(folder / "slides")
    assert [sample.slide_id for sample in samples] == ["a", "b", "image", "old"]


def test_a_dicom_series_of_several_files_is_one_slide(folder: Path) -> None:
    def dicom(name: str, uid: bytes, size: int) -> None:
        element = b"\x20\x00\x0e\x00UI" + len(uid).to_bytes(2, "little") + uid
        (folder / "dicom" / name).write_bytes(bytes(128) + b"DICM" + element + bytes(size))

    (folder / "dicom").mkdir()
    for name, uid, size in (("1.dcm", b"1.2", 9), ("2.dcm", b"1.2", 99), ("3.dcm", b"1.3\0", 9)):
        dicom(name, uid, size)
    (folder / "dicom" / "4.dcm").write_bytes(b"damaged")
    assert [sample.slide_id for sample in read_samples(folder / "dicom")] == ["2", "3", "4"]


@pytest.mark.parametrize("name", ["nowhere", "nowhere.csv"])
def test_nothing_there_is_said_so(folder: Path, name: str) -> None:
    with pytest.raises(SampleSheetError, match="there is no"):
        read_samples(str(folder / name))


def test_a_folder_without_slides_is_refused(folder: Path) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(SampleSheetError, match="without slides"):
        read_samples(str(folder / "empty"))


def test_slides_in_folders_of_their_own_are_found_as_the_gdc_client_writes_them(folder: Path) -> None:
    for name, slide in (("0a", "TCGA-1.svs"), ("1b", "TCGA-2.svs"), ("2c", "TCGA-2.svs")):
        (folder / "gdc" / name / "logs").mkdir(parents=True)
        (folder / "gdc" / name / slide).write_text("x")
        (folder / "gdc" / name / "annotations.txt").write_text("x")
        (folder / "gdc" / name / "preview.png").write_text("x")
    (folder / "gdc" / "MANIFEST.txt").write_text("x")
    assert [sample.slide_id for sample in read_samples(folder / "gdc")] == [
        "TCGA-1",
        "1b-TCGA-2",
        "2c-TCGA-2",
    ]
    (folder / "gdc" / "1b" / "other.svs").write_text("x")
    with pytest.raises(SampleSheetError, match="holds no slides, and several in one of its folders"):
        read_samples(folder / "gdc")


def test_folders_with_slides_beside_slides_are_named(folder: Path) -> None:
    for name in ("more", "a", "masks"):
        (folder / "slides" / name).mkdir()
        (folder / "slides" / name / ("b.png" if name == "masks" else "b.svs")).write_text("x")
    with pytest.warns(SlideWarning, match=r"folders with slides .*: more$"):
        assert [sample.slide_id for sample in read_samples(folder / "slides")] == ["a", "b"]
