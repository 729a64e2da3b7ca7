"""Files that hold several sections: each row of a sheet gets its own, and never two rows the same."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from make_slides import tissue_like, write_pyramid
from scipy import sparse

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from featurestore.slides.sample_sheet import Sample, read_samples
from histosge.data.distinct_spots import DistinctSpots, spot_marks
from histosge.data.expression.find_expression import find_expression
from histosge.data.expression.loaded_expression import LoadedExpression, SlideFrame
from histosge.data.section_loading import Selection, load_sections
from histosge.data.sections import Spots
from histosge.data.spot_targets import SpotTargets
from histosge.errors import ExpressionError
from histosge.training.made_with import describe_sections

N = {"S1": 31, "S2": 23}
"""Spots of each section."""


def one(seed: int, n: int) -> anndata.AnnData:
    """Return a section of spots in two rows."""
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame(
        {"array_row": np.arange(n) // 20, "array_col": np.arange(n) % 20}, index=[f"B{i}" for i in range(n)]
    )
    data = anndata.AnnData(
        rng.poisson(90, (n, 5)).astype(np.float32), obs=obs, var=pd.DataFrame(index=list("ABCDE"))
    )
    start = 350 + 20 * seed  # within the tissue of `made`
    data.obsm["spatial"] = np.stack(
        [start + np.arange(n) % 20 * 12.0, start + np.arange(n) // 20 * 12.0], axis=1
    )
    return data


def cohort(column: str | None = "library_id", *, libraries: bool = True) -> anndata.AnnData:
    parts = {name: one(seed, n) for seed, (name, n) in enumerate(N.items(), 1)}
    both = anndata.concat(parts, index_unique="-", label=column)
    if libraries:
        both.uns["spatial"] = {
            name: {"scalefactors": {"spot_diameter_fullres": 50.0 + 20 * i}} for i, name in enumerate(parts)
        }
    return both


def write(data: anndata.AnnData, folder: Path) -> Path:
    data.write_h5ad(folder / "cohort.h5ad")
    return folder / "cohort.h5ad"


def find(path: Path | str, slide_id: str = "S1") -> LoadedExpression:
    return find_expression(path, SlideFrame(slide_id, "D", 0.5))


@pytest.mark.parametrize("column", ["library_id", "Sample", "batch", "orig.ident", "made_up"])
def test_each_slide_gets_the_spots_of_its_library(tmp_path: Path, column: str) -> None:
    path = write(cohort(column), tmp_path)
    for i, (name, n) in enumerate(N.items()):
        found = find(path, name)
        assert len(found.spots) == n
        assert all(barcode.endswith(name) for barcode in found.spots.barcodes)
        np.testing.assert_array_equal(found.spots.counts.toarray(), one(i + 1, n).X)
        np.testing.assert_allclose(found.spots.xy_um[0], (370 + 20 * i) * 0.5)
        assert found.spots.diameter_um == (50 + 20 * i) * 0.5  # its own library's
        assert f"{n} of 54 spots" in found.describe(0.5)


@pytest.mark.parametrize("column", ["library_id", "sample", "batch"])
def test_a_slide_of_another_name_is_refused_with_the_list_and_can_be_named(
    tmp_path: Path, column: str
) -> None:
    path = write(cohort(column, libraries=False), tmp_path)
    with pytest.raises(
        ExpressionError, match=f"2 sections .obs '{column}': S1, S2.*none is 'other'"
    ) as refused:
        find(path, "other")
    assert "cohort.h5ad#S1" in str(refused.value)
    assert "\n" not in str(refused.value)
    for place in (f"{path}#S2", f"{path}#{column}=S2", f"file://{path}#S2"):
        assert len(find(place, "other").spots) == N["S2"]
    assert len(find(f"{path}#*", "other").spots) == sum(N.values())
    with pytest.raises(ExpressionError, match="none is 'S3'"):
        find(f"{path}#S3", "S1")


def test_a_slide_id_that_was_made_fit_for_a_store_is_the_library_s(tmp_path: Path) -> None:
    data = cohort()
    data.obs["library_id"] = data.obs["library_id"].map({"S1": "patient 1/a", "S2": "b"}).astype(str)
    del data.uns["spatial"]
    assert len(find(write(data, tmp_path), "patient-1-a").spots) == N["S1"]


def test_several_sections_without_a_column_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExpressionError, match=r"several libraries in uns.*\(S1, S2\).*add obs\[.library_id"):
        find(write(cohort(None), tmp_path))
    with pytest.raises(ExpressionError, match="several sections: 23 places of the array occur again"):
        find(write(cohort(None, libraries=False), tmp_path))
    cells = cohort(None, libraries=False)
    del cells.obs["array_row"], cells.obs["array_col"]
    cells.obs_names = ["ACGTACGTACGTAC" + "ACGT"[i % 4] + "GT"[i // 4 % 2] + f"-1-{i}" for i in range(54)]
    with pytest.raises(ExpressionError, match="several sections: 46 barcodes occur again"):
        find(write(cells, tmp_path))


def test_two_columns_that_name_the_row_for_other_spots_are_refused(tmp_path: Path) -> None:
    data = cohort()
    data.obs["sample"] = np.where(np.arange(54) < 11, "S1", "S9")
    with pytest.raises(ExpressionError, match=r"give one of .*#library_id=S1, .*#sample=S1"):
        find(write(data, tmp_path))
    assert len(find(f"{write(data, tmp_path)}#sample=S1").spots) == 11


def test_one_section_may_be_called_anything_and_have_parts(tmp_path: Path) -> None:
    data = cohort()
    data = data[data.obs["library_id"] == "S2"].copy()  # both libraries stay in uns
    data.obs["region"] = np.where(np.arange(23) < 11, "cortex", "white matter")
    found = find(write(data, tmp_path), "slide 7")
    assert len(found.spots) == 23
    assert found.spots.diameter_um == 35.0


def _sheet(folder: Path, *expressions: str) -> str:
    lines = [f"S{i},S{i}.tif,{expression},D{i}" for i, expression in enumerate(expressions, 1)]
    (folder / "sheet.csv").write_text("\n".join(["slide_id,slide,expression,donor", *lines]) + "\n")
    return str(folder / "sheet.csv")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sections")
    for i in (1, 2):
        write_pyramid(folder / f"S{i}.tif", tissue_like(1100, 900, 0.5, seed=i), 0.5)
    write(cohort(), folder)
    sheet = _sheet(folder, "cohort.h5ad", "cohort.h5ad")
    embed(sheet, str(folder / "store"), EmbedSettings(("colour",), GridSpec(1.0, 32, 16)))
    return folder


def test_two_rows_of_one_file_train_on_their_own_spots(made: Path) -> None:
    sheet = _sheet(made, "cohort.h5ad", "cohort.h5ad")
    loaded = load_sections(sheet, str(made / "store"), Selection())
    assert [item.section.spots.barcodes[0] for item in loaded] == ["B0-S1", "B0-S2"]


@pytest.mark.parametrize("second", ["cohort.h5ad#S1", "copy.h5ad", "part.h5ad"])
def test_two_rows_with_the_same_spots_are_refused(made: Path, second: str) -> None:
    one(1, 31).write_h5ad(made / "copy.h5ad")
    data = anndata.read_h5ad(made / "cohort.h5ad")
    data[data.obs["library_id"] == "S1"][:29].copy().write_h5ad(made / "part.h5ad")
    data.write_h5ad(made / "cohort.h5ad")
    first = "copy.h5ad" if second == "copy.h5ad" else "cohort.h5ad#S1"
    sheet = _sheet(made, first, second)
    for load in (
        lambda: load_sections(sheet, str(made / "store"), Selection()),
        lambda: SpotTargets.from_samples(sheet, made / "store", 3),
    ):
        with pytest.raises(ExpressionError, match="slides 'S1' and 'S2' have the same spots"):
            load()


def test_sections_of_the_same_barcodes_are_distinct() -> None:
    distinct = DistinctSpots()
    for seed in range(5):
        data = one(seed, 700)
        spots = Spots(
            f"S{seed}",
            "D",
            data.obs_names.to_numpy().astype(str),
            np.zeros((700, 2)),
            55.0,
            sparse.csr_matrix(data.X),
            tuple("ABCDE"),
        )
        distinct.add(Sample(f"S{seed}", "a.tif", "a.h5ad"), spot_marks(spots))


def test_a_sheet_names_a_section_behind_its_file(tmp_path: Path) -> None:
    (tmp_path / "S1.tif").write_bytes(b"")
    (tmp_path / "a#b.h5ad").write_bytes(b"")
    (tmp_path / "a.h5ad").write_bytes(b"")
    for given in ("a.h5ad#C 2", "a#b.h5ad", "a#b.h5ad#C"):
        (sample,) = read_samples(_sheet(tmp_path, given))
        assert sample.expression == str(tmp_path / given)


def test_a_record_of_what_a_model_is_made_with_knows_the_section_and_the_file(made: Path) -> None:
    def described(expression: str) -> object:
        sheet = _sheet(made, expression, "cohort.h5ad#S2")
        return describe_sections(sheet, made / "store", Selection())["sections"]["S1"]["expression"]

    first = described("cohort.h5ad#S1")
    assert described("cohort.h5ad#S1") == first
    assert described("cohort.h5ad#library_id=S1") != first
    data = anndata.read_h5ad(made / "cohort.h5ad")
    data.X[0, 0] += 1
    data.write_h5ad(made / "cohort.h5ad")
    assert described("cohort.h5ad#S1") != first
