"""Signatures: the mean over a set's genes of their z-scores, for every patch.

A z-score is taken over all patches of all slides, so that values of two slides compare.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from histosge.analysis.cohort_maps import CohortMaps
from histosge.errors import ExportError

PLACE = ("row", "col", "x_um", "y_um")


def write_signatures(maps: CohortMaps, sets: Mapping[str, Sequence[str]], folder: Path) -> pl.DataFrame:
    """Write ``<slide id>.parquet`` with a column for each signature; return their mean and spread on each slide.

    Memory holds a few rows of patches and one slide's signatures.

    Parameters
    ----------
    sets
        Name -> genes, all of them in the maps; see `histosge.analysis.gene_sets.present`.

    Returns
    -------
    polars.DataFrame
        ``slide``, ``signature``, ``genes``, ``mean``, ``sd``; a row for each slide and signature.
    """
    if taken := sorted(set(sets) & set(PLACE)):
        raise ExportError(
            f"a signature cannot be called {taken[0]!r}, which is a column of the table; rename it"
        )
    genes = list(dict.fromkeys(gene for listed in sets.values() for gene in listed))
    mean, sd = _moments(maps, genes)
    place = {gene: i for i, gene in enumerate(genes)}
    weights = np.zeros((len(genes), len(sets)))
    for column, listed in enumerate(sets.values()):
        for gene in listed:
            # A gene that is constant has no z-score, and adds nothing.
            weights[place[gene], column] = 0 if sd[place[gene]] == 0 else 1 / (len(listed) * sd[place[gene]])
    rows = []
    for table in maps.tables(genes):
        scores = np.empty((len(table), len(sets)), np.float32)
        for part, values in table.chunks():
            scores[part] = (values.astype(np.float64) - mean) @ weights
        xy_um = table.xy_um
        columns: dict[str, NDArray[np.generic]] = {
            "row": table.rows.astype(np.int32),
            "col": table.cols.astype(np.int32),
            "x_um": xy_um[:, 0],
            "y_um": xy_um[:, 1],
        }
        columns |= dict(zip(sets, scores.T, strict=True))
        pl.DataFrame(columns).write_parquet(folder / f"{table.slide_id}.parquet")
        rows += [
            {
                "slide": table.slide_id,
                "signature": name,
                "genes": len(listed),
                "mean": float(score.mean(dtype=np.float64)),
                "sd": float(score.std(dtype=np.float64)),
            }
            for (name, listed), score in zip(sets.items(), scores.T, strict=True)
        ]
    return pl.DataFrame(rows)


def _moments(maps: CohortMaps, genes: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and standard deviation of genes over all patches of all slides."""
    n, mean, squares = 0, np.zeros(len(genes)), np.zeros(len(genes))
    for table in maps.tables(genes):
        for _, values in table.chunks():
            part = values.astype(np.float64)
            # Chan et al. (1983): sums of squares about the mean, merged; plain sums of squares would cancel.
            shift = part.mean(axis=0) - mean
            squares += ((part - part.mean(axis=0)) ** 2).sum(axis=0) + shift**2 * (
                n * len(part) / (n + len(part))
            )
            n += len(part)
            mean += shift * (len(part) / n)
    return mean, np.sqrt(squares / max(n, 1))
