"""Measure a truth as Visium would: discs on a hexagonal lattice, counts of limited depth.

Terms
    disc   the round area that one spot measures
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from histosge.synthetic.fields import LATTICE_UM
from histosge.synthetic.spec import SyntheticSpec
from histosge.synthetic.truth import Truth

DEPTH_SD = 0.3
"""Standard deviation of the log of a spot's depth that nothing in the tissue explains."""


@dataclass(frozen=True)
class Measured:
    """Spots on tissue and their counts.

    Parameters
    ----------
    xy_um
        Centres in microns from the slide's top-left, ``(n_spots, 2)``.
    array
        ``(array_row, array_col)`` as Space Ranger numbers them, ``(n_spots, 2)``.
    counts
        Shape ``(n_spots, n_genes)``.
    """

    xy_um: NDArray[np.float64]
    array: NDArray[np.int64]
    counts: NDArray[np.int64]


def measure(spec: SyntheticSpec, truth: Truth) -> Measured:
    """Count the transcripts under every disc that is at least half on tissue."""
    rng = np.random.default_rng([spec.seed, 4])
    xy_um, array = _hexagonal(spec)
    overlap, share = _discs(xy_um, spec.spot_diameter_um / 2, truth.label > 0)
    keep = share >= 0.5
    overlap = overlap[keep]
    rates = np.nan_to_num(truth.rates.reshape(len(truth.genes), -1)).T.astype(np.float64)
    mean_rate = overlap @ rates
    depth = overlap @ np.nan_to_num(truth.library.ravel()).astype(np.float64)
    depth = depth * np.exp(DEPTH_SD * rng.standard_normal(len(depth)))
    depth *= spec.median_depth / np.median(depth)
    expected = mean_rate * (depth / mean_rate.sum(axis=1))[:, None]
    if spec.dispersion > 0:
        expected = expected * rng.gamma(1 / spec.dispersion, spec.dispersion, expected.shape)
    return Measured(xy_um[keep], array[keep], rng.poisson(expected))


def _hexagonal(spec: SyntheticSpec) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    width, height = spec.size_um
    pitch, radius = spec.spot_pitch_um, spec.spot_diameter_um / 2
    step = pitch * np.sqrt(3) / 2
    centres, places = [], []
    for row in range(int((height - 2 * radius) // step) + 1):
        shift = (row % 2) * pitch / 2
        cols = np.arange(int((width - 2 * radius - shift) // pitch) + 1)
        centres.append(
            np.stack([radius + shift + cols * pitch, np.full(len(cols), radius + row * step)], axis=1)
        )
        places.append(np.stack([np.full(len(cols), row), 2 * cols + row % 2], axis=1))
    return np.concatenate(centres), np.concatenate(places)


def _discs(
    xy_um: NDArray[np.float64], radius_um: float, tissue: NDArray[np.bool_]
) -> tuple[Any, NDArray[np.float64]]:
    """Return mean weights over the tissue in each disc, sparse ``(n, n_y * n_x)``, and the disc's tissue share."""
    reach = int(np.ceil(radius_um / LATTICE_UM))
    steps = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 2, indexing="ij"), axis=-1).reshape(-1, 2)
    home = np.floor(xy_um[:, ::-1] / LATTICE_UM).astype(int)
    yx = home[:, None] + steps
    distance = np.hypot(*np.moveaxis((yx + 0.5) * LATTICE_UM - xy_um[:, None, ::-1], -1, 0))
    under = distance <= radius_um
    yx = np.clip(yx, 0, np.array(tissue.shape) - 1)
    hit = under & tissue[yx[..., 0], yx[..., 1]]
    n_under, n_hit = under.sum(axis=1), hit.sum(axis=1)
    spot, step = np.nonzero(hit)
    flat = yx[spot, step, 0] * tissue.shape[1] + yx[spot, step, 1]
    weights = 1.0 / n_hit[spot]
    matrix = sparse.csr_matrix((weights, (spot, flat)), shape=(len(xy_um), tissue.size))
    return matrix, n_hit / np.maximum(n_under, 1)


def write_h5ad(path: Path, measured: Measured, truth: Truth, spec: SyntheticSpec, slide_id: str) -> None:
    """Write spots as AnnData in the layout that scanpy and squidpy expect of Visium."""
    import anndata
    import pandas as pd

    family_of = {gene: name for name, genes in truth.families.items() for gene in genes}
    obs = pd.DataFrame(
        {"in_tissue": 1, "array_row": measured.array[:, 0], "array_col": measured.array[:, 1]},
        index=pd.Index([f"{slide_id}-{row:03d}x{col:03d}" for row, col in measured.array], dtype=object),
    )
    var = pd.DataFrame(
        {"family": [family_of[gene] for gene in truth.genes]}, index=pd.Index(truth.genes, dtype=object)
    )
    data = anndata.AnnData(sparse.csr_matrix(measured.counts.astype(np.float32)), obs=obs, var=var)
    data.obsm["spatial"] = measured.xy_um / spec.mpp
    data.uns["spatial"] = {
        slide_id: {
            "scalefactors": {
                "spot_diameter_fullres": spec.spot_diameter_um / spec.mpp,
                "tissue_hires_scalef": 2000 / max(spec.size_px),
            },
            "metadata": {"mpp": spec.mpp},
        }
    }
    data.write_h5ad(path)
