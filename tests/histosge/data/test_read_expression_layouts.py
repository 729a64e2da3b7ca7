"""Each layout of the field, read by us and by the reader that its users know."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from write_layouts import ALIGNMENT, XENIUM_PIXEL_UM, counts, legacy_st, visium, visium_hd, xenium

from histosge.data.alignment_check import AlignmentReport, check_scale
from histosge.data.expression.find_expression import find_expression
from histosge.data.expression.loaded_expression import LoadedExpression, SlideFrame
from histosge.data.expression.pseudo_spots import needs_pooling, pool_spots
from histosge.errors import ExpressionError

MPP = 0.7
POSITIONS = ("tissue_positions_list.csv", "tissue_positions.csv", "tissue_positions.parquet")


def _find(path: Path, mpp: float = MPP, size_px: tuple[int, int] | None = None) -> LoadedExpression:
    return find_expression(str(path), SlideFrame("S", "D", mpp, size_px))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mtx", [False, True])
def test_every_visium_layout_gives_the_same_spots(tmp_path: Path, positions: str, mtx: bool) -> None:
    found = _find(visium(tmp_path / "outs", positions, mtx=mtx))
    spots = found.spots
    assert len(spots) == 41  # one of 42 is off tissue
    assert spots.genes == ("G1", "G2", "G3")
    at = spots.barcodes.tolist().index("BC016-1")  # row 2, column 4
    np.testing.assert_allclose(spots.xy_um[at], (3000 - 2 * 86.6025, 500 + 4 * 50), atol=MPP)
    np.testing.assert_array_equal(spots.counts[at].toarray()[0], counts(42).toarray()[41 - 16][[0, 2, 3]])
    assert (spots.diameter_um, spots.shape, found.layout) == (55.0, "disc", "Visium")
    assert found.implied_mpp == pytest.approx(MPP, rel=0.005)


@pytest.mark.parametrize("positions", POSITIONS[:2])
def test_a_visium_folder_is_read_as_scanpy_reads_it(tmp_path: Path, positions: str) -> None:
    import scanpy

    home = visium(tmp_path, positions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = scanpy.read_visium(home)
    spots = _find(home, mpp=1.0).spots
    oracle = oracle[spots.barcodes].copy()
    np.testing.assert_array_equal(spots.xy_um, oracle.obsm["spatial"].astype(float))
    np.testing.assert_array_equal(spots.counts.toarray(), oracle.X.toarray())
    assert list(spots.genes) == oracle.var_names.tolist()
    written = tmp_path / "as.h5ad"
    oracle.write_h5ad(written)
    again = _find(written)
    assert again.spots.diameter_um == 55.0  # spot_diameter_fullres says 65
    assert again.implied_mpp == pytest.approx(MPP, rel=0.005)


def test_files_with_the_download_page_s_prefix_are_found(tmp_path: Path) -> None:
    home = visium(tmp_path, POSITIONS[1])
    (home / "filtered_feature_bc_matrix.h5").rename(home / "V1_Breast_filtered_feature_bc_matrix.h5")
    assert len(_find(home).spots) == 41
    assert len(_find(home / "V1_Breast_filtered_feature_bc_matrix.h5").spots) == 41


def test_of_several_bin_sizes_8_microns_is_taken_and_said(tmp_path: Path) -> None:
    home = visium_hd(tmp_path / "outs")
    found = _find(home, mpp=0.5)
    assert (found.spots.diameter_um, found.spots.shape, found.implied_mpp) == (8.0, "square", 0.5)
    assert "square_008um taken, of others there: square_002um, square_016um" in found.describe(0.5)
    assert len(found.spots) == 28  # the first of 5 rows is off tissue
    for named in (home / "binned_outputs" / "square_016um", home / "binned_outputs" / "square_002um"):
        assert _find(named).spots.diameter_um == int(named.name[7:10])
    for same in (tmp_path, home / "binned_outputs", home / "binned_outputs" / "square_008um"):
        np.testing.assert_array_equal(_find(same, mpp=0.5).spots.xy_um, found.spots.xy_um)


def test_without_8_micron_bins_the_finest_is_taken(tmp_path: Path) -> None:
    assert _find(visium_hd(tmp_path, sizes=(16, 24))).spots.diameter_um == 16


@pytest.mark.spatialdata
def test_visium_hd_is_read_as_spatialdata_io_reads_it(tmp_path: Path) -> None:
    home = visium_hd(tmp_path / "outs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from spatialdata_io import visium_hd as oracle

        data = oracle(home, dataset_id="d", bin_size=8, bins_as_squares=True, load_segmentations_only=False)
    found = _find(home, mpp=1.0).spots
    table = data.tables["square_008um"]
    table = table[found.barcodes]
    np.testing.assert_array_equal(found.counts.toarray(), table[:, list(found.genes)].X.toarray())
    squares = data.shapes["d_square_008um"].loc[table.obs["location_id"]]
    np.testing.assert_allclose(found.xy_um, np.column_stack([squares.centroid.x, squares.centroid.y]))
    side_px = found.diameter_um / 0.5
    np.testing.assert_allclose(squares.area, side_px**2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.write(tmp_path / "hd.zarr")
    through = _find(tmp_path / "hd.zarr", mpp=0.5, size_px=(4000, 4000))
    np.testing.assert_allclose(through.spots.diameter_um, 8.0)
    assert through.spots.shape == "square"


@pytest.mark.parametrize("cells", ["cells.parquet", "cells.csv.gz"])
def test_xenium_cells_land_on_the_h_and_e_by_its_alignment(tmp_path: Path, cells: str) -> None:
    import scanpy

    home = xenium(tmp_path / "outs", cells=cells)
    mpp = XENIUM_PIXEL_UM * np.sqrt(1.2**2 + 0.3**2)
    found = _find(tmp_path, mpp=mpp)
    assert found.implied_mpp == pytest.approx(mpp)
    oracle = scanpy.read_10x_h5(home / "cell_feature_matrix.h5")
    np.testing.assert_array_equal(found.spots.counts.toarray(), oracle[found.spots.barcodes].X.toarray())
    assert found.spots.diameter_um == pytest.approx(10, rel=0.01)
    he_px = np.column_stack([found.spots.xy_um / mpp, np.ones(len(found.spots))])
    morphology_um = (he_px @ ALIGNMENT.T)[:, :2] * XENIUM_PIXEL_UM
    plain = _find(xenium(tmp_path / "registered", cells=cells, aligned=False), mpp=mpp)
    np.testing.assert_allclose(morphology_um, plain.spots.xy_um)
    assert "taken as registered" in plain.describe(mpp)


@pytest.mark.spatialdata
def test_the_alignment_s_direction_is_spatialdata_io_s(tmp_path: Path) -> None:
    import tifffile

    home = xenium(tmp_path)
    picture = np.zeros((64, 64, 3), np.uint8)
    tifffile.imwrite(tmp_path / "Xenium_he_image.ome.tif", picture, photometric="rgb")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from spatialdata.transformations import get_transformation
        from spatialdata_io import xenium_aligned_image

        image = xenium_aligned_image(
            tmp_path / "Xenium_he_image.ome.tif", home / "Xenium_he_imagealignment.csv"
        )
        matrix = get_transformation(image).to_affine_matrix(("x", "y"), ("x", "y"))
    spots = _find(home, mpp=1.0).spots
    plain = _find(xenium(tmp_path / "plain", aligned=False), mpp=1.0).spots
    through = np.column_stack([spots.xy_um, np.ones(len(spots))]) @ matrix.T
    np.testing.assert_allclose(through[:, :2] * XENIUM_PIXEL_UM, plain.xy_um)


@pytest.mark.parametrize("transposed", [False, True])
def test_legacy_tables_are_placed_by_their_spot_file(tmp_path: Path, transposed: bool) -> None:
    home = legacy_st(tmp_path, transposed=transposed)
    for path in (home, home / "A1_counts.tsv"):
        found = _find(path, mpp=0.67)
        assert len(found.spots) == 19  # one of 20 is not selected
        np.testing.assert_allclose(found.spots.xy_um[0], (500 + 200 * 3, 900 + 200 * 11))
        np.testing.assert_array_equal(found.spots.counts[0].toarray()[0], counts(20).toarray()[0])
        assert (found.spots.diameter_um, found.spots.shape) == (100.0, "disc")
        assert found.implied_mpp == pytest.approx(0.67)


def test_legacy_tables_without_spot_file_take_a_transformation(tmp_path: Path) -> None:
    home = legacy_st(tmp_path)
    (home / "spot_data-selection-A1.tsv").unlink()
    (home / "A1_transformation.txt").write_text("290.2 0 0 0 287.5 0 -200.1 -300.7 1")
    found = _find(home, mpp=1.0)
    np.testing.assert_allclose(found.spots.xy_um[0], (290.2 * 3 - 200.1, 287.5 * 11 - 300.7))


def test_the_right_spot_file_of_a_folder_with_many_sections(tmp_path: Path) -> None:
    legacy_st(tmp_path / "cnts")
    (tmp_path / "spotfiles").mkdir()
    text = (tmp_path / "cnts" / "spot_data-selection-A1.tsv").read_text()
    (tmp_path / "cnts" / "spot_data-selection-A1.tsv").rename(tmp_path / "spotfiles" / "A1_selection.tsv")
    (tmp_path / "spotfiles" / "A10_selection.tsv").write_text(text.replace("\t1\n", "\t0\n"))
    (tmp_path / "spotfiles" / "B1_selection.tsv").write_text(text.replace("\t1\n", "\t0\n"))
    (tmp_path / "cnts" / "B1_counts.tsv").write_text((tmp_path / "cnts" / "A1_counts.tsv").read_text())
    assert len(_find(tmp_path / "cnts" / "A1_counts.tsv").spots) == 19
    with pytest.raises(ExpressionError, match="holds 2 counts tables"):
        _find(tmp_path / "cnts")


@pytest.mark.data
@pytest.mark.parametrize("section", ["MOB1", "MOB2"])
def test_a_real_section_as_legacy_tables_is_read_back_the_same(
    data_dir: Path, tmp_path: Path, section: str
) -> None:
    import anndata

    data = anndata.read_h5ad(data_dir / "mob" / f"{section}.h5ad")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frame = data.to_df().astype(int)
    frame.index = [f"{c}x{r}" for c, r in zip(data.obs["array_col"], data.obs["array_row"], strict=True)]
    frame.to_csv(tmp_path / "counts.tsv", sep="\t")
    spots = data.obs.rename(columns={"array_col": "x", "array_row": "y"}).assign(
        pixel_x=data.obsm["spatial"][:, 0], pixel_y=data.obsm["spatial"][:, 1]
    )
    spots.to_csv(tmp_path / "spots.tsv", sep="\t", index=False)
    found, oracle = _find(tmp_path), _find(data_dir / "mob" / f"{section}.h5ad")
    np.testing.assert_allclose(found.spots.xy_um, oracle.spots.xy_um)
    np.testing.assert_array_equal(found.spots.counts.toarray(), oracle.spots.counts.toarray())


@pytest.mark.data
@pytest.mark.parametrize(("name", "mpp"), [("seurat", 0.727), ("v1.0.0", 0.727)])
def test_the_pitch_of_a_real_chip_says_the_slides_mpp(data_dir: Path, name: str, mpp: float) -> None:
    found = _find(data_dir / "spaceranger" / name, mpp)
    assert found.implied_mpp == pytest.approx(mpp, rel=0.01)
    warned = check_scale(AlignmentReport(1, 1, 1, "ok"), "S", 0.5, found.implied_mpp)
    assert warned.verdict == "warn"
    assert "set mpp 0.72" in warned.message
    assert check_scale(AlignmentReport(1, 1, 1, "ok"), "S", 0.727, found.implied_mpp).verdict == "ok"


@pytest.mark.spatialdata
def test_spatialdata_of_a_visium_run_gives_the_run_s_spots(tmp_path: Path) -> None:
    home = visium(tmp_path / "run", POSITIONS[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from spatialdata_io import visium as oracle

        data = oracle(home, dataset_id="d", counts_file="filtered_feature_bc_matrix.h5")
        data.write(tmp_path / "d.zarr")
    direct = _find(home).spots
    found = _find(tmp_path / "d.zarr", size_px=(4000, 4000))
    order = [found.spots.barcodes.tolist().index(b) for b in direct.barcodes]
    np.testing.assert_allclose(found.spots.xy_um[order], direct.xy_um)
    assert "hires_image' taken as the slide, 100 times smaller" in found.describe(MPP)
    assert found.spots.diameter_um == 55
    with pytest.raises(ExpressionError, match="no picture there is the same or a smaller copy"):
        _find(tmp_path / "d.zarr", size_px=(4000, 3000))


def test_few_counts_in_small_bins_are_pooled(tmp_path: Path) -> None:
    spots = _find(visium_hd(tmp_path), mpp=0.5).spots
    assert needs_pooling(spots, stride_um=32)
    assert not needs_pooling(spots, stride_um=10)
    pooled = pool_spots(spots, 32)
    assert pooled.counts.sum() == spots.counts.sum()
    assert (pooled.shape, pooled.diameter_um) == ("square", 32)
    inside = (np.abs(spots.xy_um - pooled.xy_um[0]) < 16).all(axis=1)
    np.testing.assert_array_equal(pooled.counts[0].toarray()[0], spots.counts[inside].sum(axis=0).A1)


@pytest.mark.parametrize(
    ("write", "gone", "named"),
    [
        (
            lambda p: visium_hd(p, sizes=(8,)),
            "binned_outputs/square_008um/filtered_feature_bc_matrix.h5",
            "feature_bc_matrix",
        ),
        (xenium, "cells.parquet", "cells.csv.gz"),
        (legacy_st, "spot_data-selection-A1.tsv", "no spot file"),
    ],
)
def test_what_is_missing_is_named_in_one_line(
    tmp_path: Path, write: Callable[[Path], Path], gone: str, named: str
) -> None:
    home = write(tmp_path / "x")
    (home / gone).unlink()
    with pytest.raises(ExpressionError, match=named) as caught:
        _find(home)
    assert "\n" not in str(caught.value)


def test_anything_else_is_refused_with_what_would_be_read(tmp_path: Path) -> None:
    (tmp_path / "notes.tsv").write_text("a\tb\n1\t2\n")
    for path in (tmp_path, tmp_path / "notes.tsv", tmp_path / "absent"):
        with pytest.raises(ExpressionError, match="legacy ST tables"):
            _find(path)


def test_a_square_spot_weighs_patches_by_the_area_it_shares_with_them(tmp_path: Path) -> None:
    from scipy import sparse

    from histosge.data.sections import Patches, Spots
    from histosge.data.spot_overlap import spot_overlap

    rows, cols = (a.ravel() for a in np.mgrid[0:5, 0:7])
    patches = Patches("S", rows, cols, np.zeros((35, 1), np.float32), 10.0, 10.0)
    xy = np.array([[31.0, 18.0]])  # x from 25 to 37, y from 12 to 24: columns 2 and 3, rows 1 and 2
    spots = Spots("S", "D", np.array(["b"]), xy, 12.0, sparse.csr_matrix((1, 1)), ("g",), "square")
    weights = spot_overlap(spots, patches).toarray()[0].reshape(5, 7)
    expected = np.zeros((5, 7))
    expected[1:3, 2:4] = np.outer((8, 4), (5, 7)) / 144
    np.testing.assert_allclose(weights, expected)


def test_a_run_on_small_bins_says_what_was_found_pooled_and_odd(tmp_path: Path) -> None:
    from make_slides import tissue_like, write_pyramid

    from featurestore.embedding.embed import EmbedSettings, embed
    from featurestore.grid import GridSpec
    from featurestore.slides.sample_sheet import Sample
    from featurestore.storage.store import Store
    from histosge.data.section_loading import load_section

    slide = write_pyramid(tmp_path / "A.tif", tissue_like(1100, 900, 0.5), 0.5)
    store = str(tmp_path / "store")
    embed(str(slide), store, EmbedSettings(("colour",), GridSpec(1.0, 32, 16)))
    home = visium_hd(tmp_path / "hd", mpp=0.45, corner_um=(220, 220))
    sample = Sample("A", str(slide), str(home), donor="D")
    loaded = load_section(sample, Store.open(store), None, None, min_counts=30)
    assert "Visium HD, 8 µm bins: 28 spots x 3 genes, median" in loaded.description
    assert "side 8 µm, 0.5 µm/px (0.45 by its own files); square_008um taken" in loaded.description
    assert "pooled into" in loaded.description
    assert loaded.section.spots.shape == "square"
    np.testing.assert_allclose(loaded.section.overlap.sum(axis=1), 1)
    assert loaded.alignment.verdict == "warn"
    assert "set mpp 0.45 in the sample sheet" in loaded.alignment.message


def test_a_cytassist_run_says_whose_pixels_its_positions_are(tmp_path: Path) -> None:
    home = visium(tmp_path, POSITIONS[1])
    (home / "spatial" / "cytassist_image.tiff").write_bytes(b"")
    found = _find(home)
    assert found.layout == "Visium, CytAssist"
    assert "positions are of the microscope's picture" in found.describe(MPP)


def test_damaged_json_is_one_line(tmp_path: Path) -> None:
    home = visium(tmp_path, POSITIONS[1])
    (home / "spatial" / "scalefactors_json.json").write_text("{")
    with pytest.raises(ExpressionError, match=r"scalefactors_json\.json is damaged"):
        _find(home)


@pytest.mark.data
def test_a_real_folder_without_positions_is_refused(data_dir: Path) -> None:
    with pytest.raises(ExpressionError, match="none of the layouts"):
        _find(data_dir / "spaceranger" / "v2.1.0")
