"""Which alignment places the cells of a Xenium run on its H&E."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from write_layouts import ALIGNMENT, XENIUM_PIXEL_UM, xenium

from histosge.data.expression.find_expression import find_expression
from histosge.data.expression.loaded_expression import LoadedExpression, SlideFrame
from histosge.errors import ExpressionError

MPP = XENIUM_PIXEL_UM * float(np.sqrt(1.2**2 + 0.3**2))
OTHER = np.array([[0.9, 0.0, -30.0], [0.0, 0.9, 11.0], [0.0, 0.0, 1.0]])


def find(path: Path | str, slide_id: str = "S") -> LoadedExpression:
    return find_expression(path, SlideFrame(slide_id, "D", MPP))


def write(file: Path, matrix: np.ndarray) -> None:
    file.parent.mkdir(exist_ok=True)
    np.savetxt(file, matrix, delimiter=",")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return xenium(tmp_path / "run", aligned=False)


@pytest.fixture
def truth(tmp_path: Path) -> np.ndarray:
    return find(xenium(tmp_path / "truth")).spots.xy_um


@pytest.mark.parametrize(
    "name",
    [
        "slide1_matrix.csv",
        "matrix.csv",
        "slide1_alignment_files/matrix.csv",
        "x_imagealignment.csv",
        "H&E_matrix.csv",
    ],
)
def test_alignments_are_found_as_xenium_explorer_names_them(home: Path, truth: np.ndarray, name: str) -> None:
    write(home / name, ALIGNMENT)
    write(home / "slide1_keypoints.csv", OTHER)
    write(home / "slide1_alignment_files" / "keypoints.csv", OTHER)
    found = find(home)
    np.testing.assert_allclose(found.spots.xy_um, truth)
    assert f"placed by {name}" in found.describe(MPP)


@pytest.mark.parametrize("he", ["a_he_imagealignment.csv", "a_HE_matrix.csv", "plain_matrix.csv"])
@pytest.mark.parametrize(
    "other", ["a_if_imagealignment.csv", "a_IF_alignment_files/matrix.csv", "DAPI_matrix.csv"]
)
def test_the_alignment_of_a_fluorescence_picture_is_not_taken(
    home: Path, truth: np.ndarray, he: str, other: str
) -> None:
    write(home / he, ALIGNMENT)
    write(home / other, OTHER)
    np.testing.assert_allclose(find(home).spots.xy_um, truth)
    (home / he).unlink()
    found = find(home)
    assert found.implied_mpp is None
    assert f"{other} is of a fluorescence picture and not used" in found.describe(MPP)


def test_of_several_the_slide_s_own_is_taken_or_the_list_is_shown(home: Path, truth: np.ndarray) -> None:
    write(home / "scan1_matrix.csv", OTHER)
    write(home / "scan2_alignment_files" / "matrix.csv", ALIGNMENT)
    with pytest.raises(
        ExpressionError, match=r"several alignments .*scan1_matrix\.csv, scan2_alignment_files/matrix\.csv"
    ):
        find(home)
    for found in (
        find(home, "scan2"),
        find(f"{home}#scan2"),
        find(f"{home}#scan2_alignment_files/matrix.csv"),
    ):
        np.testing.assert_allclose(found.spots.xy_um, truth)
    with pytest.raises(ExpressionError, match="has no alignment 'scan3'"):
        find(f"{home}#scan3")
    write(home / "scan1_matrix.csv", ALIGNMENT)  # the same numbers twice leave no doubt
    np.testing.assert_allclose(find(home).spots.xy_um, truth)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1,2,3\n4,5,6\n",
        "1,0,0\n1,0,0\n0,0,1\n",
        "nan,0,0\n0,1,0\n0,0,1\n",
        "a,b,c\n",
        "1e9,0,0\n0,1e9,0\n0,0,1\n",
    ],
)
def test_what_is_no_alignment_is_one_line(home: Path, text: str) -> None:
    (home / "he_matrix.csv").write_text(text)
    with pytest.raises(ExpressionError, match="is no alignment matrix") as refused:
        find(home)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("size", [-1, 0, "x", None, [1, 2]])
def test_an_absurd_pixel_size_is_refused_and_a_missing_one_is_the_instrument_s(
    home: Path, truth: np.ndarray, size: object
) -> None:
    write(home / "he_matrix.csv", ALIGNMENT)
    (home / "experiment.xenium").write_text(json.dumps({"pixel_size": size}))
    if size in (0, None):
        np.testing.assert_allclose(find(home).spots.xy_um, truth)
        return
    with pytest.raises(ExpressionError, match=r"pixel_size is .* should be a positive number"):
        find(home)


def test_files_with_a_prefix_belong_together(tmp_path: Path) -> None:
    home = xenium(tmp_path / "a")
    plain = find(home).spots
    for name in ("cell_feature_matrix.h5", "cells.parquet", "experiment.xenium"):
        (home / name).rename(home / f"V1_{name}")
    np.testing.assert_array_equal(find(home).spots.xy_um, plain.xy_um)
    other = xenium(tmp_path / "b", aligned=False)
    for file in other.iterdir():
        file.rename(home / f"V2_{file.name}")
    with pytest.raises(ExpressionError, match=r"matrices of several samples: V1, V2"):
        find(home)
    np.testing.assert_array_equal(find(home, "V1").spots.xy_um, plain.xy_um)


def test_cells_of_another_run_are_refused(home: Path) -> None:
    cells = pl.read_parquet(home / "cells.parquet")
    cells.with_columns(pl.col("cell_id") + "x").write_parquet(home / "cells.parquet")
    with pytest.raises(ExpressionError, match=r"none of 11 cells of .*give the files of one run"):
        find(home)
    pl.concat([cells, cells[:1]]).write_parquet(home / "cells.parquet")
    with pytest.raises(ExpressionError, match="names a cell twice"):
        find(home)
    cells[3:].write_parquet(home / "cells.parquet")
    assert "3 spots without a position left out" in find(home).describe(MPP)


@pytest.mark.parametrize("kept", [0, 50, 200])
@pytest.mark.parametrize("name", ["cells.parquet", "cells.csv.gz"])
def test_a_cut_table_of_cells_is_one_line(tmp_path: Path, name: str, kept: int) -> None:
    home = xenium(tmp_path, cells=name)
    (home / name).write_bytes((home / name).read_bytes()[:kept])
    with pytest.raises(ExpressionError, match="cannot be read as a table of cells") as refused:
        find(home)
    assert "\n" not in str(refused.value)
