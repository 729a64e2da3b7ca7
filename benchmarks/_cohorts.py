"""Cohorts of any size without slides: embeddings written as the embedding writes them, and spots whose genes follow them.

A few smooth fields lie on each slide. They add to the embedding along directions of their own, and genes follow them; the
rest of both is noise.
"""

import csv
import warnings
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from _stores import SPEC, Made, add_slide
from numpy.typing import NDArray
from scipy import ndimage, sparse

from featurestore.storage.store import Store

N_FIELDS = 6
SPOT_UM = 55.0


@dataclass(frozen=True)
class MadeCohort:
    """What a cohort should look like.

    Parameters
    ----------
    sections
        How many.
    shape, dim
        Patches of a slide, ``(rows, cols)``, and numbers of an embedding.
    spots, genes
        Of each section.
    donors
        Sections are of these in turn; 0 names none.
    block
        Patches in a block.
    frame
        So many patches on the left and the top are background.
    """

    sections: int
    shape: tuple[int, int] = (100, 100)
    dim: int = 1536
    spots: int = 3000
    genes: int = 1000
    donors: int = 0
    block: tuple[int, int] = (32, 32)
    frame: int = 0


def write_cohort(folder: Path, made: MadeCohort) -> tuple[Path, Path]:
    """Write a store, an ``.h5ad`` for each section and a sample sheet; what is there is left as it is.

    Returns
    -------
    sheet, store
        Their paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    store = Store.open_or_create(str(folder / "store"))
    for number in range(made.sections):
        # Its last file: a section that was interrupted is written again.
        if not (folder / f"{section_name(number)}.h5ad").exists():
            write_section(folder, store, made, number)
    sheet = write_sheet(folder, folder / "cohort.csv", made, range(made.sections))
    return sheet, folder / "store"


def write_sheet(folder: Path, sheet: Path, made: MadeCohort, numbers: range) -> Path:
    """Write a sample sheet of some sections."""
    with sheet.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["slide_id", "slide", "expression", "donor"])
        for number in numbers:
            donor = f"D{number % made.donors}" if made.donors else ""
            name = section_name(number)
            # A sheet's slides must exist; training opens none.
            (folder / f"{name}.tif").touch()
            writer.writerow([name, str(folder / f"{name}.tif"), str(folder / f"{name}.h5ad"), donor])
    return sheet


def section_name(number: int) -> str:
    """Return the slide id of a section."""
    return f"S{number:03}"


def write_section(folder: Path, store: Store, made: MadeCohort, number: int) -> None:
    """Write one section's embedding and expression."""
    name, rng = section_name(number), np.random.default_rng([7, number])
    fields = _fields(rng, made.shape)
    array, is_tissue = add_slide(store, name, Made(made.shape, made.dim, made.block, made.frame))
    directions = np.random.default_rng(3).standard_normal((N_FIELDS, made.dim)).astype(np.float32)
    # One block's worth of noise, shuffled for each block: drawing a normal costs more than writing it.
    noise = rng.standard_normal((*made.block, made.dim), dtype=np.float32)
    for block in store.grid(name, SPEC.key).planned(made.block):
        noise = np.roll(rng.permutation(noise, axis=0), int(rng.integers(made.dim)), axis=2)
        values = noise[: block.shape[0], : block.shape[1]] + fields[block.slices] @ directions
        values[~is_tissue[block.slices]] = np.nan
        array.write(block, values.astype(np.float16))
    store.consolidate(name)
    _write_expression(folder / f"{name}.h5ad", rng, fields, made)


def _fields(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Return smooth fields of standard deviation 1, ``(*shape, N_FIELDS)``."""
    found = []
    for k in range(N_FIELDS):
        field = ndimage.gaussian_filter(rng.standard_normal(shape), 1 + 2 * k, mode="wrap")
        found.append(field / field.std())
    return np.stack(found, axis=-1).astype(np.float32)


def _write_expression(
    file: Path, rng: np.random.Generator, fields: NDArray[np.float32], made: MadeCohort
) -> None:
    """Write Poisson counts of spots on a square lattice over the tissue."""
    stride_um, low = SPEC.stride_px * SPEC.mpp, (made.frame + 1.5) * SPEC.stride_px * SPEC.mpp
    high = [low + (n - made.frame - 2) * stride_um for n in made.shape]
    n_rows = int(np.ceil(np.sqrt(made.spots)))
    n_cols = -(-made.spots // n_rows)
    y, x = np.meshgrid(np.linspace(low, high[0], n_rows), np.linspace(low, high[1], n_cols), indexing="ij")
    xy_um = np.stack([x.ravel(), y.ravel()], axis=1)[: made.spots]
    at = np.clip(np.rint((xy_um - 112 * SPEC.mpp) / stride_um).astype(int), 0, None)
    near = fields[np.minimum(at[:, 1], made.shape[0] - 1), np.minimum(at[:, 0], made.shape[1] - 1)]
    truth = np.random.default_rng(5)
    base, loadings = truth.normal(0, 1.2, made.genes), truth.normal(0, 0.4, (N_FIELDS, made.genes))
    rates = np.exp(base + near @ loadings)
    depth = rng.lognormal(np.log(1500), 0.3, len(xy_um))
    counts = rng.poisson(rates / rates.sum(axis=1, keepdims=True) * depth[:, None])
    table = ad.AnnData(
        sparse.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame(index=[f"B{i:05}" for i in range(len(xy_um))]),
        var=pd.DataFrame(index=[f"G{i:05}" for i in range(made.genes)]),
    )
    table.obsm["spatial"] = xy_um / SPEC.mpp
    scales = {"spot_diameter_fullres": SPOT_UM / SPEC.mpp, "tissue_hires_scalef": 0.1}
    table.uns["spatial"] = {"made": {"scalefactors": scales}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table.write_h5ad(file)
