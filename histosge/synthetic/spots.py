"""Visium-like spots on a synthetic section: where they lie, what they count, and the ``.h5ad``.

Terms
    depth   expected total counts of a spot; it follows the density of nuclei mildly, and varies by chance
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from histosge.errors import ExpressionError
from histosge.synthetic.fields import Field
from histosge.synthetic.spec import LATTICE_UM, SyntheticSpec
from histosge.synthetic.truth import Truth

MIN_TISSUE_SHARE = 0.5
"""A spot counts as on tissue from this share of its disc on."""
DEPTH_POWER = 0.3
DEPTH_SD = 0.25
"""Of the natural logarithm of a spot's depth, by chance alone."""
OVERDISPERSION = 0.02
"""Variance beyond Poisson, relative to the squared mean."""


@dataclass(frozen=True)
class SpotTable:
    """Spots with their counts.

    Parameters
    ----------
    row, col
        Visium's array positions: columns are even on even rows and odd on odd ones.
    xy_um
        Centres, ``(n_spots, 2)``.
    counts
        Sparse int32, ``(n_spots, n_genes)``.
    """

    row: NDArray[np.int64]
    col: NDArray[np.int64]
    xy_um: NDArray[np.float64]
    counts: sparse.csr_matrix


def depth_field(nuclei_mm2: Field, tissue: NDArray[np.bool_], median_counts: float) -> Field:
    """Return a whole spot's expected total counts over the lattice, NaN on background."""
    # 500: where nuclei are few, depth falls gently and not to zero.
    crowded = (np.maximum(nuclei_mm2, 0) + 500) ** DEPTH_POWER
    middle = float(np.median(crowded[tissue]))
    return np.where(tissue, median_counts * crowded / middle, np.nan).astype(np.float32)


def measure_spots(spec: SyntheticSpec, truth: Truth) -> SpotTable:
    """Lay spots over the tissue and count.

    Raises
    ------
    ExpressionError
        If no spot lies on tissue.
    """
    rng = spec.rng(8)
    row, col, xy_um = hexagonal(spec)
    discs = disc_weights(xy_um, spec.spot_diameter_um, truth.label.shape)
    tissue = truth.label > 0
    share = discs @ tissue.ravel().astype(np.float64)
    on = share >= MIN_TISSUE_SHARE
    if not on.any():
        raise ExpressionError(
            f"none of {len(on)} spots lies on tissue: give a slide larger than "
            f"{spec.size_px[0]} x {spec.size_px[1]} px or a smaller spot pitch"
        )
    discs = discs[on][:, tissue.ravel()]
    # Rates average over the tissue under a disc; counts also fall with the share of the disc that is tissue.
    per_tissue = sparse.diags_array(1 / share[on]) @ discs
    mean_rates = per_tissue @ truth.rates[:, tissue].T.astype(np.float64)
    depth = (discs @ truth.depth[tissue].astype(np.float64)) * np.exp(
        DEPTH_SD * rng.standard_normal(int(on.sum()))
    )
    expected = mean_rates / mean_rates.sum(axis=1, keepdims=True) * depth[:, None]
    # Gamma-Poisson: the variance is the mean plus OVERDISPERSION times its square.
    shape = 1 / OVERDISPERSION
    counts = rng.poisson(expected * rng.gamma(shape, 1 / shape, expected.shape)).astype(np.int32)
    return SpotTable(row[on], col[on], xy_um[on], sparse.csr_matrix(counts))


def hexagonal(spec: SyntheticSpec) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return array rows, array columns and centres ``(x, y)`` of all spots that fit on the slide."""
    width, height = (side * spec.mpp for side in spec.size_px)
    pitch, edge = spec.spot_pitch_um, spec.spot_diameter_um / 2
    step = pitch * np.sqrt(3) / 2
    # As Space Ranger counts: columns in half steps, of which every other one is used in a row.
    n_rows, n_cols = int((height - 2 * edge) // step) + 1, int((width - 2 * edge) // (pitch / 2)) + 1
    row, col = (a.ravel() for a in np.mgrid[:n_rows, :n_cols])
    used = (row + col) % 2 == 0
    row, col = row[used], col[used]
    return row, col, np.column_stack([edge + col * pitch / 2, edge + row * step])


def disc_weights(xy_um: NDArray[np.float64], diameter_um: float, shape: tuple[int, ...]) -> sparse.csr_matrix:
    """Return how much of each disc lies on each lattice position, ``(n_spots, n_y * n_x)``.

    Rows sum to 1 for discs inside the lattice. Areas are counted on a grid of 2 microns or finer.
    """
    step = min(2.0, diameter_um / 25)
    axis = np.arange(-diameter_um / 2 + step / 2, diameter_um / 2, step)
    dy, dx = (a.ravel() for a in np.meshgrid(axis, axis, indexing="ij"))
    inside = np.hypot(dx, dy) <= diameter_um / 2
    dy, dx = dy[inside], dx[inside]
    rows = np.floor((xy_um[:, 1:] + dy) / LATTICE_UM).astype(np.int64)
    cols = np.floor((xy_um[:, :1] + dx) / LATTICE_UM).astype(np.int64)
    there = (rows >= 0) & (cols >= 0) & (rows < shape[0]) & (cols < shape[1])
    spot = np.broadcast_to(np.arange(len(xy_um))[:, None], rows.shape)[there]
    place = (rows * shape[1] + cols)[there]
    weight = np.full(len(spot), 1 / len(dx))
    return sparse.csr_matrix((weight, (spot, place)), shape=(len(xy_um), shape[0] * shape[1]))


def write_h5ad(
    path: Path, table: SpotTable, truth: Truth, spec: SyntheticSpec, picture: tuple[str, NDArray[np.uint8]]
) -> None:
    """Write spots as AnnData, with what scanpy needs to plot them.

    Parameters
    ----------
    picture
        The slide's id and a small RGB picture of it.
    """
    import anndata
    import pandas as pd

    slide_id, hires = picture
    family = {gene: name for name, genes in truth.families.items() for gene in genes}
    obs = pd.DataFrame(
        {"in_tissue": np.ones(len(table.row), np.int64), "array_row": table.row, "array_col": table.col},
        index=[f"{r:03d}x{c:03d}" for r, c in zip(table.row, table.col, strict=True)],
    )
    var = pd.DataFrame({"family": [family[gene] for gene in truth.genes]}, index=list(truth.genes))
    data = anndata.AnnData(table.counts, obs=obs, var=var, obsm={"spatial": table.xy_um / spec.mpp})
    data.uns["spatial"] = {
        slide_id: {
            "images": {"hires": hires},
            "scalefactors": {
                "spot_diameter_fullres": spec.spot_diameter_um / spec.mpp,
                "tissue_hires_scalef": hires.shape[1] / spec.size_px[0],
            },
            "metadata": {
                "mpp": spec.mpp,
                "spot_diameter_um": spec.spot_diameter_um,
                "spot_pitch_um": spec.spot_pitch_um,
            },
        }
    }
    data.write_h5ad(path, compression="gzip")
