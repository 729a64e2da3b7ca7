"""Sections in memory with a planted linear signal."""

import numpy as np
from scipy import sparse

from histosge.data.sections import Patches, Section, Spots

GRID = (17, 13)
N_GENES, DIM = 23, 11
PATCH_UM = 53.0


def make_section(slide_id: str, seed: int, signal: float = 1.0, n_genes: int = N_GENES) -> Section:
    """One spot per patch; rates follow the embedding linearly, by `signal`."""
    rng = np.random.default_rng(seed)
    rows, cols = (index.ravel() for index in np.indices(GRID))
    embedding = rng.standard_normal((rows.size, DIM)).astype(np.float32)
    patches = Patches(slide_id, rows, cols, embedding, PATCH_UM, PATCH_UM)
    weights = np.random.default_rng(101).standard_normal((DIM, n_genes)) * signal / np.sqrt(DIM)
    rates = np.exp(embedding @ weights + rng.standard_normal((rows.size, n_genes)) * 0.3)
    depth = rng.lognormal(7, 0.4, rows.size)
    counts = rng.poisson(rates / rates.sum(axis=1, keepdims=True) * depth[:, None])
    spots = Spots(
        slide_id,
        "d1",
        np.array([f"b{i}" for i in range(rows.size)]),
        patches.xy_um,
        43.0,
        sparse.csr_matrix(counts.astype(np.float32)),
        tuple(f"G{i}" for i in range(n_genes)),
    )
    thumbnail = rng.integers(120, 220, (*GRID, 3)).astype(np.uint8)
    return Section(patches, spots, sparse.eye(rows.size, format="csr", dtype=np.float32), thumbnail)
