"""GDC manifests: which slide of a patient is taken, and what is said of the others."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from featurestore.errors import SampleSheetError
from featurestore.slides.gdc_manifest import list_tcga
from featurestore.slides.sample_sheet import read_samples
from histosge_cli.main import app

IDS = [f"{k:08d}-1111-2222-3333-{k:012d}" for k in range(12)]
NAMES = [
    "TCGA-A1-A0SB-01Z-00-DX2.AAAA.svs",
    "TCGA-A1-A0SB-01Z-00-DX1.BBBB.svs",
    "TCGA-A1-A0SB-01A-01-TS1.CCCC.svs",
    "TCGA-A2-A04P-11A-00-DX1.DDDD.svs",  # normal tissue of a patient who has a tumour, too
    "TCGA-A2-A04P-01Z-00-DX1.EEEE.svs",
    "TCGA-A7-A0CE-01Z-00-DX1.FFFF.svs",  # not downloaded
    "TCGA-A8-A06N-01Z-00-DX1.GGGG.svs",  # cut
    "C3L-00001-21.svs",
    "TCGA-A1-A0SB.clinical.xml",
]


def write(folder: Path, *, absent: tuple[int, ...] = (5,)) -> Path:
    manifest = folder / "gdc_manifest.2024.txt"
    lines = ["id\tfilename\tmd5\tsize\tstate"]
    for number, (file_id, name) in enumerate(zip(IDS, NAMES, strict=False)):
        lines.append(f"{file_id}\t{name}\tabc\t7\treleased")
        if number not in absent:
            (folder / file_id).mkdir(exist_ok=True)
            (folder / file_id / name).write_bytes(b"cut" if number == 6 else b"a slide")
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


def test_one_diagnostic_slide_of_each_patient_is_taken(tmp_path: Path) -> None:
    found = list_tcga(write(tmp_path))
    rows = {row["slide_id"]: row for row in found.rows}
    assert list(rows) == ["TCGA-A1-A0SB-01Z-00-DX1", "TCGA-A2-A04P-01Z-00-DX1"]
    first = rows["TCGA-A1-A0SB-01Z-00-DX1"]
    assert first["donor"] == "TCGA-A1-A0SB"
    assert first["slide"] == str(tmp_path / IDS[1] / NAMES[1])
    assert first["known"] == f"file {IDS[1]}, {NAMES[1]}"
    assert found.left_out == (
        "C3L-00001-21.svs: its name does not begin with the barcode of a TCGA slide",
        f"{NAMES[5]}: not downloaded",
        f"{NAMES[6]}: has 3 of 7 bytes; download it again",
        "1 frozen sections (TS, BS, MS)",
        "1 files that are no .svs",
        "2 further diagnostic slides of the same patients",
    )


def test_the_next_slide_of_a_patient_is_taken_where_the_first_is_not_there(tmp_path: Path) -> None:
    found = list_tcga(write(tmp_path, absent=(1, 5)))
    assert found.rows[0]["slide_id"] == "TCGA-A1-A0SB-01Z-00-DX2"
    assert f"{NAMES[1]}: not downloaded" in found.left_out


def test_the_folder_of_the_downloads_is_enough(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    by_manifest = list_tcga(manifest)
    assert list_tcga(tmp_path) == by_manifest
    manifest.unlink()
    assert [row["slide_id"] for row in list_tcga(tmp_path).rows] == [
        *(row["slide_id"] for row in by_manifest.rows),
        "TCGA-A8-A06N-01Z-00-DX1",  # no manifest says how long it should be
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it has no columns id and filename"),
        ("id,filename\n1,2\n", "it has no columns id and filename"),
        ("id\tfilename\n../x\tA.svs\n", "line 2: '../x' and 'A.svs' are no file id"),
        (f"id\tfilename\n{IDS[0]}\t../../A.svs\n", "line 2: .* are no file id and file name"),
        (
            f"id\tfilename\n{IDS[0]}\tTCGA-A1-A0SB-01A-01-TS1.C.svs\n",
            r"no diagnostic slide of TCGA \(DX\): 1 frozen",
        ),
        (
            f"id\tfilename\n{IDS[0]}\t{NAMES[0]}\n",
            "none is there .* fetch them with: gdc-client download -m m.txt",
        ),
    ],
)
def test_manifests_that_give_no_slide_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.txt").write_text(text)
    with pytest.raises(SampleSheetError, match=message) as refused:
        list_tcga(tmp_path / "m.txt")
    assert "\n" not in str(refused.value)


def test_the_command_writes_a_sheet_that_is_read_back(tmp_path: Path) -> None:
    manifest, sheet = write(tmp_path), tmp_path / "sheet.csv"
    result = CliRunner().invoke(app, ["samples", str(manifest), str(sheet), "--from", "tcga"])
    assert result.exit_code == 0, result.output
    assert "2 slides of 2 donors" in result.output
    assert [row.donor for row in read_samples(sheet)] == ["TCGA-A1-A0SB", "TCGA-A2-A04P"]
