"""Expression stores are listed and validated as feature stores are, and hostile ones refused in one line."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from featurestore.errors import StoreError
from histosge.prediction.expression_catalogue import expression_catalogue
from histosge.prediction.expression_store import ExpressionStore, is_expression_store
from histosge.prediction.expression_validation import validate_expression

ARCHIVE = Path(__file__).parents[2] / "contracts" / "data" / "written_by_6995a84.zip"
GRID = "mpp1.0000_px48_stride24"


@pytest.fixture
def maps(tmp_path: Path) -> Path:
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(tmp_path, [name for name in archive.namelist() if name.startswith("maps.zarr/")])
    return tmp_path / "maps.zarr"


def _change(maps: Path, name: str, *keys: str | int, to: object) -> None:
    file = maps / "S1" / GRID / name / "zarr.json"
    document = json.loads(file.read_text())
    holder: Any = document
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = to
    file.write_text(json.dumps(document))


def test_a_whole_store_has_no_problems_and_one_row(maps: Path) -> None:
    assert is_expression_store(str(maps))
    assert not is_expression_store(str(maps / "S1"))
    assert not is_expression_store(str(maps.parent / "absent"))
    assert validate_expression(str(maps), deep=True) == []
    (row,) = expression_catalogue(str(maps)).to_dicts()
    objects = [file for file in (maps / "S1" / GRID / "expression" / "c").rglob("*") if file.is_file()]
    assert (row["slide"], row["grid"], row["genes"], row["state"]) == ("S1", GRID, 13, "done")
    assert row["done"] == row["planned"] == len(objects)
    assert row["bytes"] == sum(file.stat().st_size for file in objects)
    made_by = ExpressionStore.open(str(maps)).map("S1", GRID).array.attrs["made_by"]
    assert row["model"] == made_by["model"]


@pytest.mark.parametrize("name", ["expression", "depth"])
def test_a_missing_and_a_damaged_block_are_named(maps: Path, name: str) -> None:
    objects = sorted(file for file in (maps / "S1" / GRID / name / "c").rglob("*") if file.is_file())
    objects[3].unlink()
    damaged = bytearray(objects[5].read_bytes())
    damaged[7] ^= 1
    objects[5].write_bytes(damaged)
    (problem,) = validate_expression(str(maps))
    assert problem.what == "the block is missing"
    assert problem.path == str(objects[3].parent.relative_to(maps))
    assert "histosge predict" in problem.fix
    found = validate_expression(str(maps), deep=True)
    assert [p.path for p in found] == [str(objects[i].parent.relative_to(maps)) for i in (3, 5)]
    (row,) = expression_catalogue(str(maps)).to_dicts()
    assert row["state"] == ("partial" if name == "expression" else "done")


@pytest.mark.parametrize(
    ("name", "keys", "value", "message"),
    [
        ("", ("attributes", "grid", "effective_mpp"), 1e-9, "effective_mpp is 1e-09"),
        ("", ("attributes", "grid", "shape"), [10**9, 10**9], "patches"),
        ("expression", ("shape",), [22, 24, 10**9], "channels"),
        ("expression", ("shape",), [10**9, 10**9, 13], "patches"),
        ("expression", ("shape", 0), 23, "and the grid has 22 x 24"),
        ("expression", ("shape", 2), 11, "gene is damaged: it is"),
        ("expression", ("attributes", "made_by"), [], "made_by is no object"),
        ("tissue", ("shape", 0), 23, "tissue is damaged: it is uint8"),
        ("gene", ("codecs", 0, "name"), "numcodecs.pickle", "codec 'numcodecs.pickle' is not opened"),
        ("gene", ("data_type",), "object", "dtype 'object' is not opened"),
        ("trust", ("shape",), [7], "trust is damaged"),
        ("depth", ("shape", 2), 2, "depth is damaged"),
    ],
)
def test_a_wrong_value_is_one_line_a_problem_and_a_failed_row(
    maps: Path, name: str, keys: tuple[str | int, ...], value: object, message: str
) -> None:
    _change(maps, name, *keys, to=value)
    with pytest.raises(StoreError, match=rf"^[^\n]*{message}[^\n]*$"):
        ExpressionStore.open(str(maps)).map("S1", GRID)
    (row,) = expression_catalogue(str(maps)).to_dicts()
    assert row["state"] == "failed"
    assert validate_expression(str(maps))


def test_folders_of_other_programs_are_left_alone(maps: Path) -> None:
    for below in (maps, maps / "S1"):
        for name in (".ipynb_checkpoints", "__MACOSX"):
            (below / name).mkdir()
    assert list(ExpressionStore.open(str(maps)).maps()) == [("S1", GRID)]
    problems = {problem.path for problem in validate_expression(str(maps))}
    assert problems == {f"{at}{name}" for at in ("", "S1/") for name in (".ipynb_checkpoints", "__MACOSX")}


def test_a_map_whose_creation_was_interrupted_is_a_problem(maps: Path) -> None:
    shutil.rmtree(maps / "S1" / GRID / "expression")
    (problem,) = validate_expression(str(maps))
    assert "not created completely" in problem.what
