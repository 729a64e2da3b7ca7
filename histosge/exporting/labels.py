"""A domain for every patch where none is given: k-means on the principal components of its values."""

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2, vq

from histosge.exporting.table import PatchTable

STORED = "domain"
"""Array of a map that holds its domains already."""
SAMPLE = 20_000
COMPONENTS = 20


def domain_labels(table: PatchTable, n_domains: int, seed: int = 0) -> NDArray[np.int64]:
    """Return a label per patch of the grid, ``(n_rows, n_cols)``; -1 where a patch has no values.

    Components and centres come from a sample of patches; all are then assigned band by band. Label 0 is the
    largest domain. A map that holds domains gives its own.
    """
    labels = np.full(table.grid.shape, -1, dtype=np.int64)
    if STORED in table.per_patch:
        stored = table.per_patch[STORED]
        labels[table.kept] = stored[table.kept]
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
