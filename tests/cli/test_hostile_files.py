"""What a user sees of a store or model that somebody else has damaged: one line and exit code 2, never a traceback."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

Histosge = Callable[..., NamedTuple]
ARCHIVE = Path(__file__).parents[1] / "contracts" / "data" / "written_by_6995a84.zip"
GRID = "mpp1.0000_px48_stride24"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(tmp_path)
    return tmp_path


def _set(file: Path, *keys: str, to: object) -> None:
    document = json.loads(file.read_text())
    holder: Any = document
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = to
    file.write_text(json.dumps(document))


def test_a_damaged_slide_is_a_line_of_ls_and_stops_what_needs_it(histosge: Histosge, old: Path) -> None:
    store = old / "store.zarr"
    _set(store / "S1" / GRID / "zarr.json", "attributes", "grid", "effective_mpp", to=1e-9)
    _set(store / "S1" / "zarr.json", "consolidated_metadata", to=None)
    listed = histosge("ls", store, "--json")
    assert listed.code == 0
    assert [row["state"] for row in json.loads(listed.out)] == ["failed", "done"]
    checked = histosge("validate", store)
    assert checked.code == 1
    assert "attributes.grid.effective_mpp is 1e-09" in checked.out
    for command in (
        ("predict", store, old / "models" / "dense", old / "out", "--slide", "S1"),
        ("analyse", store, "summary"),
        ("export", store, old / "x.h5ad", "--to", "h5ad", "--slide", "S1"),
    ):
        ran = histosge(*command)
        assert ran.code == 2, command
        assert len(ran.err.strip().splitlines()) == 1, ran.err
        assert "effective_mpp is 1e-09" in ran.err
    assert histosge("predict", store, old / "models" / "dense", old / "out", "--slide", "S2").code == 0


def test_a_model_that_names_a_module_is_refused(histosge: Histosge, old: Path) -> None:
    _set(old / "models" / "dense" / "config.json", "card", "preset", to="os:system")
    ran = histosge("predict", old / "store.zarr", old / "models" / "dense", old / "out")
    assert ran.code == 2
    assert len(ran.err.strip().splitlines()) == 1
    assert not (old / "out").exists()


def test_maps_are_listed_and_validated(histosge: Histosge, old: Path) -> None:
    listed = histosge("ls", old / "maps.zarr")
    assert listed.code == 0
    assert "done" in listed.out
    (row,) = json.loads(histosge("ls", old / "maps.zarr", "--json").out)
    assert (row["slide"], row["genes"], row["state"]) == ("S1", 13, "done")
    assert histosge("validate", old / "maps.zarr", "--deep")[:2] == (0, "whole\n")
    lost = next(
        file for file in (old / "maps.zarr" / "S1" / GRID / "expression" / "c").rglob("*") if file.is_file()
    )
    lost.unlink()
    ran = histosge("validate", old / "maps.zarr")
    assert ran.code == 1
    assert "the block is missing. Fix: run the same histosge predict again" in ran.out


@pytest.mark.parametrize("slide", ["..", "../..", "a/b", "/etc", "S1/../S2"])
def test_no_slide_id_leads_out_of_a_store(histosge: Histosge, old: Path, slide: str) -> None:
    for command in (
        ("predict", old / "store.zarr", old / "models" / "dense", old / "out"),
        ("rm", old / "store.zarr"),
        ("export", old / "maps.zarr", old / "x.h5ad", "--to", "h5ad"),
    ):
        ran = histosge(*command, "--slide", slide)
        assert ran.code == 2, command
        assert len(ran.err.strip().splitlines()) == 1, ran.err
