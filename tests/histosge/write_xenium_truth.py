"""Xenium output of a synthetic section: what its molecules count follows the section's dense truth.

The layout is that of the instrument's documentation: ``transcripts.parquet`` (or ``transcripts.csv.gz`` of early versions,
without `is_gene`), ``cells.parquet``, ``cell_feature_matrix.h5``, ``experiment.xenium``, and the alignment of the H&E, which
lies turned on the run.
"""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import sparse

from histosge.synthetic import Truth, truth_at
from histosge.synthetic.spec import LATTICE_UM

PIXEL_UM = 0.2125
CELL_UM = 14.0
"""Cells stand on a lattice of this step and own what lies within 6 µm of their centre."""
CONTROLS = ("NegControlProbe_00042", "NegControlCodeword_0500", "BLANK_0123", "UnassignedCodeword_0007")


@dataclass(frozen=True)
class XeniumTruth:
    """What was written.

    Parameters
    ----------
    xy_um
        Of every molecule, on the H&E, ``(n, 2)``.
    gene
        Its number, -1 for a control, ``(n,)``.
    qv
        ``(n,)``.
    cell
        Number of its cell, -1 for none, ``(n,)``.
    cell_xy_um
        Centroids on the H&E, ``(n_cells, 2)``.
    """

    folder: Path
    xy_um: NDArray[np.float64]
    gene: NDArray[np.int64]
    qv: NDArray[np.float64]
    cell: NDArray[np.int64]
    cell_xy_um: NDArray[np.float64]

    @property
    def counted(self) -> NDArray[np.bool_]:
        """Molecules of genes with the quality that counts."""
        return (self.gene >= 0) & (self.qv >= 20)


def write_xenium(
    folder: Path,
    truth: Truth,
    mpp: float,
    *,
    counts_per_um2: float,
    name: str = "transcripts.parquet",
    early: bool = False,
    seed: int = 3,
) -> XeniumTruth:
    """Write an output folder whose H&E is turned by 90 degrees and shifted against the run.

    Parameters
    ----------
    counts_per_um2
        Median of the expected molecules of genes with a quality of 20 and more, on a square micron of tissue.
    early
        As early versions write: names as bytes, cells as numbers, no `is_gene`.
    """
    rng = np.random.default_rng(seed)
    n_rows, n_cols = truth.label.shape
    rows, cols = (index.ravel() for index in np.indices((n_rows, n_cols)))
    corner = np.stack([cols, rows], axis=1) * LATTICE_UM
    rates = truth_at(truth, corner + LATTICE_UM / 2, LATTICE_UM)
    on = np.isfinite(rates).all(axis=1)
    depth = truth.depth[rows[on], cols[on]]
    depth = np.nan_to_num(depth, nan=float(np.nanmedian(truth.depth)))
    expected = rates[on] / 1e4 * (depth / np.median(depth) * counts_per_um2 * LATTICE_UM**2)[:, None]
    counts = rng.poisson(expected)
    place, gene = np.nonzero(counts)
    n = counts[place, gene]
    place, gene = np.repeat(place, n), np.repeat(gene, n)
    # A third more: of a low quality, which would blur the truth, since they lie anywhere; and controls.
    n_low, n_control = len(gene) // 4, len(gene) // 12
    xy_um = corner[on][place] + rng.uniform(0, LATTICE_UM, (len(place), 2))
    size_um = np.array([n_cols, n_rows]) * LATTICE_UM
    xy_um = np.concatenate([xy_um, rng.uniform(0, 1, (n_low + n_control, 2)) * size_um])
    gene = np.concatenate([gene, rng.integers(0, len(truth.genes), n_low), np.full(n_control, -1)])
    qv = rng.uniform(20, 40, len(gene))
    qv[len(place) : len(place) + n_low] = rng.uniform(0, 19.99, n_low)
    order = rng.permutation(len(gene))
    xy_um, gene, qv = xy_um[order], gene[order], qv[order]

    centre = (np.floor(xy_um / CELL_UM) + 0.5) * CELL_UM
    inside = np.hypot(*(xy_um - centre).T) < 6.0
    cell_xy, cell = np.unique(centre[inside], axis=0, return_inverse=True)
    cell_of = np.full(len(gene), -1)
    cell_of[inside] = cell.ravel()

    # H&E pixels -> morphology pixels: (x, y) -> (y, -x), scaled, so that what is right on one is below on the other.
    scale = mpp / PIXEL_UM
    matrix = np.array([[0.0, scale, 300.0], [-scale, 0.0, 9000.0], [0.0, 0.0, 1.0]])

    def to_run(found: NDArray[np.float64]) -> NDArray[np.float64]:
        pixels = np.column_stack([found / mpp, np.ones(len(found))]) @ matrix.T
        return np.asarray(pixels[:, :2] * PIXEL_UM)

    folder.mkdir(parents=True)
    np.savetxt(folder / "run_he_imagealignment.csv", matrix, delimiter=",")
    (folder / "experiment.xenium").write_text(json.dumps({"pixel_size": PIXEL_UM}))
    cells = [str(i + 1) if early else f"cell{i:05d}-1" for i in range(len(cell_xy))]
    run_cells, run_um = to_run(cell_xy), to_run(xy_um)
    area = np.full(len(cells), np.pi * 36.0)
    pl.DataFrame(
        {"cell_id": cells, "x_centroid": run_cells[:, 0], "y_centroid": run_cells[:, 1], "cell_area": area}
    ).write_parquet(folder / "cells.parquet")
    names = np.array([*truth.genes, *CONTROLS])
    control = len(truth.genes) + rng.integers(0, len(CONTROLS), len(gene))
    feature = names[np.where(gene >= 0, gene, control)]
    ids = np.array([*cells, "-1" if early else "UNASSIGNED"])[cell_of]
    table = pl.DataFrame(
        {
            "transcript_id": np.arange(len(gene), dtype=np.uint64) + 281474976710656,
            "cell_id": ids,
            "overlaps_nucleus": np.zeros(len(gene), np.uint8),
            "feature_name": feature,
            "x_location": run_um[:, 0].astype(np.float32),
            "y_location": run_um[:, 1].astype(np.float32),
            "z_location": rng.uniform(10, 20, len(gene)).astype(np.float32),
            "qv": qv.astype(np.float32),
        }
    )
    if early:
        table = table.with_columns(pl.col("feature_name").cast(pl.Binary), pl.col("cell_id").cast(pl.Int32))
    else:
        table = table.with_columns(is_gene=pl.Series(gene >= 0))
    if name.endswith(".parquet"):
        table.write_parquet(folder / name, row_group_size=5_000)
    else:
        plain = table.with_columns(pl.col("feature_name").cast(pl.String))
        with gzip.open(folder / name, "wb", compresslevel=1) as stream:
            stream.write(plain.write_csv(quote_style="non_numeric").encode())
    good = (gene >= 0) & (qv >= 20) & (cell_of >= 0)
    ones = np.ones(int(good.sum()), np.int32)
    shape = (len(cells), len(truth.genes))
    _write_matrix(
        folder / "cell_feature_matrix.h5",
        cells,
        truth.genes,
        sparse.csr_matrix((ones, (cell_of[good], gene[good])), shape=shape),
    )
    return XeniumTruth(folder, xy_um, gene, qv, cell_of, cell_xy)


def _write_matrix(file: Path, cells: list[str], genes: tuple[str, ...], counts: sparse.csr_matrix) -> None:
    counts.sum_duplicates()
    # Beside the genes, the controls that such a matrix holds.
    full = sparse.csr_matrix(sparse.hstack([counts, sparse.csr_matrix((len(cells), len(CONTROLS)))]))
    names = [name.encode() for name in (*genes, *CONTROLS)]
    with h5py.File(file, "w") as h5:
        matrix = h5.create_group("matrix")
        matrix["barcodes"] = np.array(cells, dtype="S")
        for key in ("data", "indices", "indptr"):
            matrix[key] = getattr(full, key).astype(np.int32)
        matrix["shape"] = np.array([len(names), len(cells)], dtype=np.int32)
        matrix["features/name"] = np.array(names)
        matrix["features/id"] = np.array(names)
        kinds = [b"Gene Expression"] * len(genes) + [b"Negative Control Probe"] * len(CONTROLS)
        matrix["features/feature_type"] = np.array(kinds)
        matrix["features/genome"] = np.array([b"x"] * len(names))
