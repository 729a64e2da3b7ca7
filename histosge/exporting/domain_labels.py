"""A domain for every patch: from a table, from the map, or else by k-means on the components of its values."""

from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2, vq

from histosge.errors import ExportError
from histosge.exporting.patch_table import PatchTable

STORED = "domain"
"""Array of a map that holds its domains already."""
COLUMNS = ("domain", "cluster")
"""Of a table, the first found."""
SAMPLE = 20_000
COMPONENTS = 20


def domain_labels(table: PatchTable, n_domains: int, seed: int = 0) -> NDArray[np.int64]:
    """Return a label per patch of the grid, ``(n_rows, n_cols)``; -1 where a patch has no values.

    Components and centres come from a sample of patches; all are then assigned band by band. Label 0 is the
    largest domain. A map that holds domains gives its own.
    """
    labels = np.full(table.grid.shape, -1, dtype=np.int64)
    if STORED in table.per_patch:
        stored = np.asarray(table.per_patch[STORED], dtype=np.float64)
        given = table.kept & np.isfinite(stored) & (stored >= 0)
        labels[given] = stored[given]
        return labels
    rng = np.random.default_rng(seed)
    share = min(1.0, SAMPLE / len(table))
    parts = [values[rng.random(len(values)) < share] for _, values in table.chunks()]
    sample = np.nan_to_num(np.concatenate(parts))
    mean, spread = sample.mean(axis=0, dtype=np.float64), sample.std(axis=0, dtype=np.float64)
    scale = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 0)
    sample = (sample - mean.astype(np.float32)) * scale.astype(np.float32)
    _, axes = np.linalg.eigh((sample.T @ sample).astype(np.float64))
    strongest = axes[:, ::-1][:, :COMPONENTS]
    turn = strongest * scale[:, None]
    places = (sample @ strongest).astype(np.float64)
    n = min(n_domains, len(np.unique(places, axis=0)))
    centres, _ = kmeans2(places, n, minit="++", seed=rng)
    flat = np.empty(len(table), dtype=np.int64)
    for rows, values in table.chunks():
        flat[rows], _ = vq((np.nan_to_num(values.astype(np.float64)) - mean) @ turn, centres)
    order = np.argsort(-np.bincount(flat, minlength=n), kind="stable")
    labels[table.kept] = np.argsort(order)[flat]
    return labels


def read_labels(table: PatchTable, folder: Path) -> NDArray[np.int64]:
    """Return the labels in ``<folder>/<slide id>.parquet``, as ``histosge analyse ... --labels`` writes them.

    Raises
    ------
    ExportError
        If there is no such table, it lacks `row`, `col` and one of `COLUMNS`, or is of another grid.
    """
    file = folder / f"{table.slide_id}.parquet"
    if not file.is_file():
        raise ExportError(f"there is no {file}; give a number of domains, or a folder with a table per slide")
    frame = pl.read_parquet(file)
    name = next((name for name in COLUMNS if name in frame.columns), None)
    if name is None or not {"row", "col"} <= set(frame.columns):
        held = ", ".join(frame.columns)
        raise ExportError(f"{file} needs columns row, col and one of {', '.join(COLUMNS)}; it has {held}")
    frame = frame.filter(pl.col(name).is_not_null())
    rows, cols = frame["row"].to_numpy(), frame["col"].to_numpy()
    labels = np.full(table.grid.shape, -1, dtype=np.int64)
    if len(rows) and (rows.max() >= labels.shape[0] or cols.max() >= labels.shape[1]):
        raise ExportError(f"{file} has patches beyond grid {table.grid.spec.key}; make it on that grid")
    labels[rows, cols] = frame[name].to_numpy()
    return labels
