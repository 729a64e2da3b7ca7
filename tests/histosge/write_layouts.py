"""Expression in the layouts that instruments write, small: what the documentation of each says, no more."""

import gzip
import io
import json
from pathlib import Path

import h5py
import numpy as np
import polars as pl
from PIL import Image
from scipy import io as scipy_io
from scipy import sparse

GENES = ("G1", "AB", "G2", "G3")
KINDS = ("Gene Expression", "Antibody Capture", "Gene Expression", "Gene Expression")


def tenx_h5(
    path: Path, barcodes: list[str], counts: sparse.csr_matrix, kinds: tuple[str, ...] = KINDS
) -> None:
    """Write ``(n_barcodes, 4)`` counts as a 10x HDF5 matrix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as h5:
        h5.attrs.update(
            {"library_ids": np.array([b"lib"]), "chemistry_description": "Visium", "software_version": "x"}
        )
        matrix = h5.create_group("matrix")
        matrix["barcodes"] = np.array(barcodes, dtype="S")
        for key in ("data", "indices", "indptr"):
            matrix[key] = getattr(counts, key)
        matrix["shape"] = np.array([len(GENES), len(barcodes)], dtype=np.int32)
        matrix["features/name"] = np.array(GENES, dtype="S")
        matrix["features/id"] = np.array([f"E{g}" for g in GENES], dtype="S")
        matrix["features/feature_type"] = np.array(kinds, dtype="S")
        matrix["features/genome"] = np.array(["x"] * len(GENES), dtype="S")


def tenx_mtx(folder: Path, barcodes: list[str], counts: sparse.csr_matrix) -> None:
    """Write the same as the Matrix Market folder that stands beside the HDF5 file."""
    folder.mkdir(parents=True, exist_ok=True)
    features = "".join(f"E{g}\t{g}\t{k}\n" for g, k in zip(GENES, KINDS, strict=True))
    held = io.BytesIO()
    scipy_io.mmwrite(held, sparse.coo_matrix(counts.T.astype(int)))
    for name, text in (
        ("barcodes.tsv.gz", "\n".join(barcodes).encode() + b"\n"),
        ("features.tsv.gz", features.encode()),
        ("matrix.mtx.gz", held.getvalue()),
    ):
        with gzip.open(folder / name, "wb") as stream:
            stream.write(text)


def _pictures(spatial: Path) -> None:
    for name, side in (("hires", 40), ("lowres", 12)):
        Image.fromarray(np.full((side, side, 3), 255, np.uint8)).save(spatial / f"tissue_{name}_image.png")


def counts(n: int, seed: int = 3) -> sparse.csr_matrix:
    """Return random counts of `GENES`."""
    return sparse.csr_matrix(np.random.default_rng(seed).poisson(5, (n, len(GENES))).astype(np.int32))


def visium(folder: Path, positions: str, *, mtx: bool = False, mpp: float = 0.7) -> Path:
    """Write a Space Ranger folder: a hexagonal lattice, turned by a quarter, the last spot off tissue.

    Parameters
    ----------
    positions
        File name: ``tissue_positions_list.csv`` (1.x), ``tissue_positions.csv`` (2.x on) or ``.parquet``.
    """
    spatial = folder / "spatial"
    spatial.mkdir(parents=True)
    rows, cols = (a.ravel() for a in np.mgrid[0:6, 0:14])
    keep = (rows + cols) % 2 == 0
    rows, cols = rows[keep], cols[keep]
    x = np.rint((3000 - rows * 100 * np.sqrt(3) / 2) / mpp).astype(int)
    y = np.rint((500 + cols * 50) / mpp).astype(int)
    barcodes = [f"BC{i:03d}-1" for i in range(len(rows))]
    frame = pl.DataFrame(
        {
            "barcode": barcodes,
            "in_tissue": (np.arange(len(rows)) < len(rows) - 1).astype(int),
            "array_row": rows,
            "array_col": cols,
            "pxl_row_in_fullres": y,
            "pxl_col_in_fullres": x,
        }
    )
    if positions.endswith(".parquet"):
        frame.write_parquet(spatial / positions)
    else:
        frame.write_csv(spatial / positions, include_header="list" not in positions)
    scale = {
        "spot_diameter_fullres": 65 / mpp,
        "tissue_hires_scalef": 0.01,
        "tissue_lowres_scalef": 0.003,
        "fiducial_diameter_fullres": 105 / mpp,
    }
    (spatial / "scalefactors_json.json").write_text(json.dumps(scale))
    _pictures(spatial)
    order = barcodes[::-1]  # the matrix has its own order
    if mtx:
        tenx_mtx(folder / "filtered_feature_bc_matrix", order, counts(len(order)))
    else:
        tenx_h5(folder / "filtered_feature_bc_matrix.h5", order, counts(len(order)))
    return folder


def visium_hd(
    folder: Path,
    mpp: float = 0.5,
    sizes: tuple[int, ...] = (2, 8, 16),
    corner_um: tuple[int, int] = (300, 100),
) -> Path:
    """Write a Visium HD ``outs``: one folder per bin size, positions as parquet."""
    for size in sizes:
        home = folder / "binned_outputs" / f"square_{size:03d}um"
        (home / "spatial").mkdir(parents=True)
        rows, cols = (a.ravel() for a in np.mgrid[0:5, 0:7])
        barcodes = [f"s_{size:03d}um_{r:05d}_{c:05d}-1" for r, c in zip(rows, cols, strict=True)]
        pl.DataFrame(
            {
                "barcode": barcodes,
                "in_tissue": (rows > 0).astype(np.int64),
                "array_row": rows,
                "array_col": cols,
                "pxl_row_in_fullres": (corner_um[1] + (rows + 0.5) * size) / mpp,
                "pxl_col_in_fullres": (corner_um[0] + (cols + 0.5) * size) / mpp,
            }
        ).write_parquet(home / "spatial" / "tissue_positions.parquet")
        scale = {
            "spot_diameter_fullres": size / mpp,
            "bin_size_um": float(size),
            "microns_per_pixel": mpp,
            "regist_target_img_scalef": 0.1,
            "tissue_lowres_scalef": 0.003,
            "fiducial_diameter_fullres": 100.0,
            "tissue_hires_scalef": 0.01,
        }
        (home / "spatial" / "scalefactors_json.json").write_text(json.dumps(scale))
        _pictures(home / "spatial")
        tenx_h5(home / "filtered_feature_bc_matrix.h5", barcodes, counts(len(barcodes), size))
    (folder / "spatial").mkdir()
    _pictures(folder / "spatial")
    with h5py.File(folder / "feature_slice.h5", "w") as h5:
        eye = np.eye(3).ravel().tolist()
        matrices = {
            f"{a}_colrow_to_{b}_colrow": eye
            for a, b in (
                ("cytassist", "spot"),
                ("spot", "cytassist"),
                ("microscope", "spot"),
                ("spot", "microscope"),
            )
        }
        layout = json.dumps({"file_format": "1.0", "transform": eye})
        h5.attrs["metadata_json"] = json.dumps({"hd_layout_json": layout, "transform_matrices": matrices})
    return folder


XENIUM_PIXEL_UM = 0.2125
ALIGNMENT = np.array([[1.2, 0.3, 40.0], [-0.3, 1.2, 700.0], [0.0, 0.0, 1.0]])
"""H&E pixels -> morphology pixels: scaled, turned, shifted."""


def xenium(folder: Path, *, cells: str = "cells.parquet", aligned: bool = True) -> Path:
    """Write a Xenium output folder of 11 cells."""
    rng = np.random.default_rng(5)
    ids = [f"aaaa{c}-1" for c in "abcdefghijk"]
    frame = pl.DataFrame(
        {
            "cell_id": ids,
            "x_centroid": rng.uniform(300, 900, len(ids)),
            "y_centroid": rng.uniform(300, 900, len(ids)),
            "transcript_counts": np.full(len(ids), 20),
            "cell_area": np.full(len(ids), 78.5),
            "nucleus_area": np.full(len(ids), 20.0),
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    if cells.endswith(".parquet"):
        frame.write_parquet(folder / cells)
    else:
        with gzip.open(folder / cells, "wb") as stream:
            stream.write(frame.write_csv().encode())
    kinds = ("Gene Expression", "Negative Control Probe", "Gene Expression", "Gene Expression")
    tenx_h5(folder / "cell_feature_matrix.h5", ids[::-1], counts(len(ids)), kinds)
    (folder / "experiment.xenium").write_text(json.dumps({"pixel_size": XENIUM_PIXEL_UM, "region_name": "r"}))
    if aligned:
        np.savetxt(folder / "Xenium_he_imagealignment.csv", ALIGNMENT, delimiter=",")
    return folder


def legacy_st(folder: Path, *, mpp: float = 0.67, transposed: bool = False) -> Path:
    """Write ST tables: counts by array place, and the spot file that the spot detector exports."""
    folder.mkdir(parents=True, exist_ok=True)
    places = [(x, y) for x in range(3, 8) for y in range(11, 15)]
    table = counts(len(places)).toarray()
    names = [f"{x}x{y}" for x, y in places]
    head, rows = ("\t".join(["", *GENES]), zip(names, table, strict=True))
    if transposed:
        head, rows = "\t".join(["gene", *names]), zip(GENES, table.T, strict=True)
    lines = [head, *("\t".join([name, *map(str, row)]) for name, row in rows)]
    (folder / "A1_counts.tsv").write_text("\n".join(lines) + "\n")
    lines = ["x\ty\tnew_x\tnew_y\tpixel_x\tpixel_y\tselected"]
    for x, y in places[::-1]:
        px, py = (500 + 200 * x) / mpp, (900 + 200 * y) / mpp
        lines.append(f"{x}\t{y}\t{x + 0.013}\t{y - 0.021}\t{px}\t{py}\t{int((x, y) != (5, 12))}")
    (folder / "spot_data-selection-A1.tsv").write_text("\n".join(lines) + "\n")
    return folder
