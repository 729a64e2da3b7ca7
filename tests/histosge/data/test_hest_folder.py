"""`samples --from hest` on a folder in the published layout."""

import csv
import json
import shutil
import warnings
from pathlib import Path

import pytest
from make_hest import SPEC, TABLE, write_hest

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.errors import SampleSheetError
from featurestore.grid import GridSpec
from featurestore.slides.sample_sheet import read_samples
from featurestore.storage.store import Store
from histosge.data.hest_folder import HestFilter, list_hest
from histosge.data.section_loading import Selection, load_sections
from histosge_cli import main

BREAST = {"organ": "Breast", "species": "Homo sapiens", "oncotree_code": "IDC", "st_technology": "Visium"}
BRAIN = {"organ": "Brain", "species": "Mus musculus", "oncotree_code": None, "st_technology": "Xenium"}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hest")
    write_hest(
        folder,
        {
            "TENX99": {**BREAST, "dataset_title": "Study A", "patient": "Patient 1"},
            "NCBI7": {**BREAST, "dataset_title": "Study B", "patient": None},
            "SPA3": {**BRAIN, "dataset_title": "Study B", "patient": None},
        },
    )
    return folder


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "hest"))


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["histosge", "samples", *map(str, arguments), "--from", "hest"])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    return int(stopped.value.code or 0), *capsys.readouterr()


def test_the_sheet_is_what_embedding_and_training_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = folder / "sheet.csv"
    code, printed, _ = run(monkeypatch, capsys, folder, sheet)
    assert code == 0
    assert "3 slides of 2 donors" in printed
    with sheet.open() as file:
        rows = {row["slide_id"]: row for row in csv.DictReader(file)}
    assert rows["TENX99"] == {
        "slide_id": "TENX99",
        "slide": "wsis/TENX99.tif",
        "expression": "st/TENX99.h5ad",
        "mpp": str(SPEC.mpp),
        "donor": "Study A: Patient 1",
        "mask": "tissue_seg/TENX99_contours.geojson",
    }
    # The authors count a study without patients as one patient: its sections are never split.
    assert rows["NCBI7"]["donor"] == rows["SPA3"]["donor"] == "Study B: Patient 1"
    spec = GridSpec(1.0, 56, 56)
    embed(sheet, folder / "store", EmbedSettings(("colour",), spec))
    tissue = Store.open(folder / "store").grid_attrs("NCBI7", spec.key)["tissue"]
    assert (tissue["name"], tissue["region"]["kind"]) == ("mask", "geojson")
    loaded = load_sections(str(sheet), str(folder / "store"), Selection())
    assert [item.section.slide_id for item in loaded] == ["NCBI7", "SPA3", "TENX99"]
    for item in loaded:
        assert len(item.section.spots) > 40
        assert item.section.spots.diameter_um == pytest.approx(SPEC.spot_diameter_um)
    code, printed, _ = run(monkeypatch, capsys, folder, sheet)
    assert (code, "nothing to do" in printed) == (0, True)


def test_samples_are_chosen_by_their_metadata_whatever_the_case(folder: Path) -> None:
    def ids(**chosen: str) -> list[str]:
        return [row["slide_id"] for row in list_hest(folder, HestFilter(**chosen)).rows]

    assert ids(organ="breast") == ["NCBI7", "TENX99"]
    assert ids(species="Mus musculus") == ["SPA3"]
    assert ids(oncotree="idc", technology="VISIUM") == ["NCBI7", "TENX99"]
    with pytest.raises(SampleSheetError, match=r"has organ 'Brest'; there is Breast"):
        ids(organ="Brest")
    with pytest.raises(SampleSheetError, match="none has all of the wanted values"):
        ids(organ="Brain", oncotree="IDC")


def test_a_sample_without_metadata_or_with_a_broken_mpp_is_left_out_by_name(folder: Path) -> None:
    (folder / TABLE).unlink()
    (folder / "metadata" / "NCBI7.json").unlink()
    (folder / "wsis" / "SPA3.tif").unlink()
    found = list_hest(folder, HestFilter())
    assert [row["slide_id"] for row in found.rows] == ["TENX99"]
    assert found.left_out[0].startswith("NCBI7: there is no metadata/NCBI7.json")
    assert found.left_out[1] == "SPA3: there is no slide wsis/SPA3.tif; download it"


def test_the_table_stands_in_for_a_sample_s_own_metadata(folder: Path) -> None:
    (folder / "metadata" / "SPA3.json").unlink()
    rows = {row["slide_id"]: row for row in list_hest(folder, HestFilter()).rows}
    assert rows["SPA3"]["mpp"] == str(SPEC.mpp)
    assert rows["SPA3"]["donor"] == "Study B: Patient 1"


@pytest.mark.parametrize("mpp", [None, 0, -0.5, "half", float("nan"), 4000, [0.5]])
def test_a_broken_mpp_is_never_guessed(folder: Path, mpp: object) -> None:
    (folder / TABLE).unlink()
    file = folder / "metadata" / "TENX99.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pixel_size_um_estimated": mpp}))
    found = list_hest(folder, HestFilter())
    assert len(found.rows) == 2
    assert found.left_out[0].startswith("TENX99: pixel_size_um_estimated is ")


def test_nothing_usable_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (folder / "metadata").iterdir():
        file.write_text("{")
    code, printed, message = run(monkeypatch, capsys, folder, tmp_path / "s.csv")
    assert (code, printed, message.count("\n")) == (2, "", 1)
    assert "can be used: NCBI7: " in message
    code, _, message = run(monkeypatch, capsys, tmp_path, tmp_path / "s.csv")
    assert (code, message.count("\n")) == (2, 1)
    assert "is no HEST-1k folder: it has no folder st" in message
    assert not (tmp_path / "s.csv").exists()


def test_a_sheet_elsewhere_names_whole_paths(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    sheet = tmp_path / "elsewhere" / "s.csv"
    assert run(monkeypatch, capsys, folder, sheet, "--organ", "Breast")[0] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = read_samples(sheet)
    assert [row.slide for row in rows] == [
        str(folder / "wsis" / f"{name}.tif") for name in ("NCBI7", "TENX99")
    ]
    assert rows[0].mask == str(folder / "tissue_seg" / "NCBI7_contours.geojson")
