"""Spatially variable genes of maps: Moran's I over neighbouring patches.

It ranks genes. It is no test: a map is smooth by construction, since neighbouring patches share pixels and models pool
around each patch, so nearly all genes have a high I.

Terms
    neighbour  a patch that shares a side, with a value; weights are 1 / number of neighbours (row-standardised)
"""

from collections.abc import Iterator

import numpy as np
import polars as pl
from numpy.typing import NDArray

from histosge.analysis.cohort_maps import CohortMaps
from histosge.exporting.patch_table import PatchTable
from histosge.prediction.expression_store import GENE_GROUP

Floats = NDArray[np.float64]


def moran_table(maps: CohortMaps) -> pl.DataFrame:
    """Return Moran's I of each gene on each slide: ``slide``, ``gene``, ``moran``, ``sd``, by slide from high to low.

    `moran` is NaN for a gene that is constant on a slide. Memory holds a few rows of patches of `GENE_GROUP` genes.
    """
    frames = []
    genes = maps.genes
    for start in range(0, len(genes), GENE_GROUP):
        for table in maps.tables(genes[start : start + GENE_GROUP]):
            index, sd = _moran(table)
            frames.append(
                pl.DataFrame(
                    {
                        "slide": [table.slide_id] * len(index),
                        "gene": list(table.names),
                        "moran": index,
                        "sd": sd,
                    }
                )
            )
    # NaN last: a constant gene is not the most variable one.
    order = pl.col("moran").fill_nan(None)
    return pl.concat(frames).sort(
        pl.col("slide"), order, descending=[False, True], nulls_last=True, maintain_order=True
    )


def _moran(table: PatchTable) -> tuple[Floats, Floats]:
    """Return Moran's I and the standard deviation of each gene, ``(n_genes,)``."""
    n, mean = 0, np.zeros(len(table.names))
    for _, values in table.chunks():
        n += len(values)
        mean += values.sum(axis=0, dtype=np.float64)
    mean /= n
    squares, cross, weight = np.zeros(len(mean)), np.zeros(len(mean)), 0
    for rows in _windows(table):
        known: NDArray[np.bool_] = np.asarray(np.isfinite(rows).any(axis=2))
        z = np.where(known[..., None], rows - mean, 0.0)
        padded = np.pad(known.astype(np.int64), ((0, 0), (1, 1)))
        count = padded[1:-1, :-2] + padded[1:-1, 2:] + padded[:-2, 1:-1] + padded[2:, 1:-1]
        beside = np.pad(z[1:-1], ((0, 0), (1, 1), (0, 0)))
        lag = beside[:, :-2] + beside[:, 2:] + z[:-2] + z[2:]
        here = known[1:-1] & (count > 0)
        middle = z[1:-1]
        squares += (middle**2).sum(axis=(0, 1))
        cross += (middle[here] * lag[here] / count[here][:, None]).sum(axis=0)
        weight += int(here.sum())
    index = np.divide(
        n * cross, weight * squares, out=np.full_like(squares, np.nan), where=(squares > 0) & (weight > 0)
    )
    return index, np.sqrt(squares / n)


def _windows(table: PatchTable) -> Iterator[NDArray[np.float32]]:
    """Yield bands of grid rows with one row more above and below, NaN beyond the grid; each row is read once."""
    n_rows, n_cols = table.grid.shape
    empty = np.full((1, n_cols, len(table.names)), np.nan, np.float32)
    held = empty
    step = table.array.block_shape[0]
    for start in range(0, n_rows, step):
        band = table.read_grid_rows((start, min(start + step, n_rows)))
        rows = np.concatenate([held, band])
        if len(rows) > 2:
            yield rows
        held = rows[-2:]
    yield np.concatenate([held, empty])
