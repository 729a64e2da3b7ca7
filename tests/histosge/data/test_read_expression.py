import json
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from histosge.data.expression.find_expression import read_expression
from histosge.data.expression.loaded_expression import VISIUM_SPOT_UM
from histosge.errors import ExpressionError

N_SPOTS, N_GENES, MPP = 7, 5, 0.25


def _data(counts: np.ndarray | None = None) -> anndata.AnnData:
    rng = np.random.default_rng(2)
    if counts is None:
        counts = rng.poisson(3, (N_SPOTS, N_GENES)).astype(np.float32)
    obs = pd.DataFrame(index=[f"s{i}" for i in range(N_SPOTS)])
    var = pd.DataFrame(index=["A", "B", "A", "C", "A"][:N_GENES])
    data = anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=var)
    data.obsm["spatial"] = np.stack([np.arange(N_SPOTS) * 100.0, np.arange(N_SPOTS) * 10.0], axis=1)
    return data


@pytest.fixture(autouse=True)
def _repeated_gene_names_are_meant(recwarn: pytest.WarningsRecorder) -> None:
    import warnings

    warnings.filterwarnings("ignore", message="Variable names are not unique")


def _write(data: anndata.AnnData, folder: Path) -> str:
    data.write_h5ad(folder / "a.h5ad")
    return str(folder / "a.h5ad")


def test_coordinates_become_microns_x_first(tmp_path: Path) -> None:
    spots = read_expression(_write(_data(), tmp_path), "S", "D", MPP)
    np.testing.assert_allclose(spots.xy_um[3], (75.0, 7.5))
    assert spots.counts.shape == (N_SPOTS, N_GENES)
    assert spots.diameter_um == VISIUM_SPOT_UM


def test_anndata_in_zarr_is_the_same(tmp_path: Path) -> None:
    data = _data()
    data.write_zarr(tmp_path / "a.zarr", convert_strings_to_categoricals=False)
    zarr, h5ad = (
        read_expression(p, "S", "D", MPP) for p in (str(tmp_path / "a.zarr"), _write(data, tmp_path))
    )
    np.testing.assert_array_equal(zarr.counts.toarray(), h5ad.counts.toarray())
    np.testing.assert_array_equal(zarr.xy_um, h5ad.xy_um)


def test_genes_that_share_a_name_are_told_apart(tmp_path: Path) -> None:
    assert read_expression(_write(_data(), tmp_path), "S", "D", MPP).genes == ("A", "B", "A-1", "C", "A-2")


def test_the_spots_own_diameter_is_used(tmp_path: Path) -> None:
    data = _data()
    data.uns["spatial"] = {"lib": {"scalefactors": {"spot_diameter_fullres": 89.0}}}
    assert read_expression(_write(data, tmp_path), "S", "D", MPP).diameter_um == 89.0 * MPP


def test_raw_counts_in_a_layer_win_over_a_normalised_x(tmp_path: Path) -> None:
    data = _data()
    counts = data.X.toarray()
    data.layers["counts"] = data.X.copy()
    data.X = sparse.csr_matrix(np.log1p(counts))
    np.testing.assert_array_equal(
        read_expression(_write(data, tmp_path), "S", "D", MPP).counts.toarray(), counts
    )


def test_spots_off_tissue_or_without_coordinates_are_left_out(tmp_path: Path) -> None:
    data = _data()
    data.obs["in_tissue"] = [1, 1, 0, 1, 1, 1, 1]
    data.obsm["spatial"][5] = np.nan
    assert list(read_expression(_write(data, tmp_path), "S", "D", MPP).barcodes) == [
        "s0",
        "s1",
        "s3",
        "s4",
        "s6",
    ]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d.obsm.pop("spatial"), r'no obsm\["spatial"\] \(obsm holds nothing\)'),
        (lambda d: setattr(d, "X", sparse.csr_matrix(np.full((N_SPOTS, N_GENES), 0.5))), "look normalised"),
        (lambda d: setattr(d, "X", sparse.csr_matrix(-np.ones((N_SPOTS, N_GENES)))), "negative"),
        (lambda d: setattr(d, "X", sparse.csr_matrix((N_SPOTS, N_GENES))), "all counts are zero"),
        (lambda d: d.obsm.__setitem__("spatial", np.full((N_SPOTS, 2), np.nan)), "none of 7 spots"),
    ],
)
def test_what_is_no_measured_section_is_refused(tmp_path: Path, spoil, message: str) -> None:  # type: ignore[no-untyped-def]  # any callable
    data = _data()
    spoil(data)
    with pytest.raises(ExpressionError, match=message):
        read_expression(_write(data, tmp_path), "S", "D", MPP)


def _space_ranger(folder: Path, version: int) -> Path:
    """Write the documented layout of Space Ranger 1.x or 2.x."""
    (folder / "spatial").mkdir(parents=True)
    rng = np.random.default_rng(3)
    barcodes = [f"BC{i}-1" for i in (4, 2, 0, 1, 3)]
    rows = [(f"BC{i}-1", int(i != 2), i, 2 * i, 100 + i, 1000 + i) for i in range(6)]
    lines = [",".join(map(str, row)) for row in rows]
    header = "barcode,in_tissue,array_row,array_col,pxl_row_in_fullres,pxl_col_in_fullres"
    name = "tissue_positions_list.csv" if version == 1 else "tissue_positions.csv"
    (folder / "spatial" / name).write_text("\n".join(lines if version == 1 else [header, *lines]) + "\n")
    scale = {"spot_diameter_fullres": 91.0, "tissue_hires_scalef": 0.2, "fiducial_diameter_fullres": 1.0}
    (folder / "spatial" / "scalefactors_json.json").write_text(json.dumps(scale))
    counts = sparse.csr_matrix(rng.poisson(2, (5, 3)))
    with h5py.File(folder / "filtered_feature_bc_matrix.h5", "w") as h5:
        matrix = h5.create_group("matrix")
        matrix["barcodes"] = np.array(barcodes, dtype="S")
        for key in ("data", "indices", "indptr"):
            matrix[key] = getattr(counts, key)
        matrix["shape"] = (3, 5)
        matrix["features/name"] = np.array(["G1", "AB", "G2"], dtype="S")
        matrix["features/id"] = np.array(["E1", "E2", "E3"], dtype="S")
        matrix["features/feature_type"] = np.array(
            ["Gene Expression", "Antibody Capture", "Gene Expression"], dtype="S"
        )
        matrix["features/genome"] = np.array(["x"] * 3, dtype="S")
    return folder


@pytest.mark.parametrize("version", [1, 2])
def test_a_space_ranger_folder_is_read_in_the_matrix_order(tmp_path: Path, version: int) -> None:
    folder = _space_ranger(tmp_path / "outs", version)
    spots = read_expression(str(folder), "S", "D", 0.5)
    assert list(spots.barcodes) == ["BC4-1", "BC0-1", "BC1-1", "BC3-1"]  # BC2 is off tissue
    np.testing.assert_allclose(spots.xy_um[0], (502.0, 52.0))
    assert spots.genes == ("G1", "G2")
    assert spots.diameter_um == VISIUM_SPOT_UM  # the chip's, not the 65 µm of spot_diameter_fullres
    assert read_expression(str(tmp_path), "S", "D", 0.5).genes == spots.genes  # the folder above outs/


@pytest.mark.parametrize("version", [1, 2])
def test_space_ranger_counts_equal_scanpys(tmp_path: Path, version: int) -> None:
    import scanpy

    folder = _space_ranger(tmp_path, version)
    oracle = scanpy.read_10x_h5(folder / "filtered_feature_bc_matrix.h5")
    spots = read_expression(str(folder), "S", "D", 0.5)
    np.testing.assert_array_equal(spots.counts.toarray(), oracle[spots.barcodes].X.toarray())


@pytest.mark.parametrize(
    "gone",
    ["spatial/tissue_positions.csv", "spatial/scalefactors_json.json", "filtered_feature_bc_matrix.h5"],
)
def test_a_missing_piece_is_named(tmp_path: Path, gone: str) -> None:
    folder = _space_ranger(tmp_path, 2)
    (folder / gone).unlink()
    with pytest.raises(ExpressionError, match=Path(gone).name):
        read_expression(str(folder), "S", "D", 0.5)


@pytest.mark.data
@pytest.mark.parametrize(("name", "n_spots"), [("v1.0.0", 100), ("seurat", 2695)])
def test_real_space_ranger_folders_are_read(data_dir: Path, name: str, n_spots: int) -> None:
    spots = read_expression(str(data_dir / "spaceranger" / name), "S", "D", 0.5)
    assert len(spots) == n_spots
    assert spots.counts.shape == (n_spots, len(spots.genes))
    assert np.isfinite(spots.xy_um).all()
