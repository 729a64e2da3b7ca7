"""Visium HD output of a synthetic section: what its bins count follows the section's dense truth."""

import json
from pathlib import Path

import h5py
import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import sparse

from histosge.synthetic import Truth, truth_at
from histosge.synthetic.spec import LATTICE_UM


def write_hd(
    folder: Path, truth: Truth, mpp: float, *, counts_per_bin: float, side_um: int = 8, seed: int = 3
) -> tuple[Path, sparse.csr_matrix, NDArray[np.int64]]:
    """Write an ``outs`` with one size of bins, whole lattice positions of the truth, those under tissue alone.

    Parameters
    ----------
    counts_per_bin
        Median of the expected total counts.

    Returns
    -------
    folder, counts, place
        Of the output; what was counted, ``(n_bins, n_genes)``; and ``(row, col)`` of each bin.
    """
    step = side_um // int(LATTICE_UM)
    n_rows, n_cols = (n // step for n in truth.label.shape)
    place = np.stack(np.meshgrid(np.arange(n_rows), np.arange(n_cols), indexing="ij"), axis=-1).reshape(-1, 2)
    xy_um = (place[:, ::-1] + 0.5) * side_um
    rates = truth_at(truth, xy_um, side_um)
    on = np.isfinite(rates).all(axis=1)
    place, xy_um, rates = place[on], xy_um[on], rates[on]
    depth = truth.depth[place[:, 0] * step, place[:, 1] * step]
    depth = np.nan_to_num(depth, nan=float(np.nanmedian(truth.depth)))
    expected = rates / 1e4 * (depth / np.median(depth) * counts_per_bin)[:, None]
    counts = sparse.csr_matrix(np.random.default_rng(seed).poisson(expected).astype(np.int32))
    home = folder / "binned_outputs" / f"square_{side_um:03d}um"
    (home / "spatial").mkdir(parents=True)
    barcodes = [f"s_{side_um:03d}um_{r:05d}_{c:05d}-1" for r, c in place.tolist()]
    pl.DataFrame(
        {
            "barcode": barcodes,
            "in_tissue": np.ones(len(place), np.int64),
            "array_row": place[:, 0],
            "array_col": place[:, 1],
            "pxl_row_in_fullres": xy_um[:, 1] / mpp,
            "pxl_col_in_fullres": xy_um[:, 0] / mpp,
        }
    ).write_parquet(home / "spatial" / "tissue_positions.parquet")
    scale = {"bin_size_um": float(side_um), "microns_per_pixel": mpp, "spot_diameter_fullres": side_um / mpp}
    (home / "spatial" / "scalefactors_json.json").write_text(json.dumps(scale))
    genes = [name.encode() for name in truth.genes]
    with h5py.File(home / "filtered_feature_bc_matrix.h5", "w") as h5:
        matrix = h5.create_group("matrix")
        matrix["barcodes"] = np.array(barcodes, dtype="S")
        for key in ("data", "indices", "indptr"):
            matrix[key] = getattr(counts, key)
        matrix["shape"] = np.array([len(genes), len(barcodes)], dtype=np.int32)
        matrix["features/name"] = np.array(genes)
        matrix["features/id"] = np.array(genes)
        matrix["features/feature_type"] = np.array([b"Gene Expression"] * len(genes))
        matrix["features/genome"] = np.array([b"x"] * len(genes))
    return folder, counts, place
