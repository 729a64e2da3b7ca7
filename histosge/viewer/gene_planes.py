"""One gene of a map, fast: the objects of its gene group are read once and kept, since the next gene is likely in them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.byte_cache import ByteCache
from featurestore.location import Location
from histosge.prediction.expression_store import GENE_GROUP, StoredMap, open_optional

Plane = NDArray[np.float16]
GROUPS_BYTES = 1_000_000_000
"""Gene groups held at once, over all slides; what is larger than half of it is read gene by gene."""


def new_cache() -> ByteCache[Plane]:
    """Return the cache that the maps of one page share."""
    return ByteCache(GROUPS_BYTES, lambda values: int(values.nbytes))


class GenePlanes:
    """The genes of one map.

    Parameters
    ----------
    stored
        The map, opened.
    cache
        Shared by all maps of a page.
    """

    def __init__(self, stored: StoredMap, cache: ByteCache[Plane]) -> None:
        self._stored, self._cache = stored, cache
        self._rows, self._cols = (0, stored.grid.n_rows), (0, stored.grid.n_cols)
        group_bytes = stored.grid.n_rows * stored.grid.n_cols * min(GENE_GROUP, len(stored.genes)) * 2
        self._by_group = group_bytes <= GROUPS_BYTES // 2

    def plane(self, gene: int) -> Plane:
        """Return a gene over the grid, ``(n_rows, n_cols)``; NaN where nothing was predicted.

        Raises
        ------
        LookupError
            If there is no such gene.
        """
        if not 0 <= gene < len(self._stored.genes):
            raise LookupError(f"there is no gene {gene}")
        if not self._by_group:
            return self._cache.get((id(self), "gene", gene), lambda: self._read(gene, gene + 1))[..., 0]
        first = gene // GENE_GROUP * GENE_GROUP
        group = self._cache.get((id(self), first), lambda: self._read(first, first + GENE_GROUP))
        return group[..., gene - first]

    def _read(self, first: int, stop: int) -> Plane:
        step = self._stored.array.block_shape[0]
        if self._by_group:
            return self._stored.array.read(self._rows, self._cols, slice(first, stop)).astype(
                np.float16, copy=False
            )
        # Objects hold a whole gene group: a row of blocks at a time keeps what is thrown away small.
        strips = [
            self._stored.array.read((row, min(row + step, self._rows[1])), self._cols, slice(first, stop))
            for row in range(0, self._rows[1], step)
        ]
        return np.concatenate(strips).astype(np.float16, copy=False)


def per_gene(location: Location, path: str, n_genes: int) -> dict[str, Any]:
    """Return what an expression store knows of each gene beside its map.

    Returns
    -------
    dict
        ``half_width`` (of the calibrated interval) and ``trust``, lists with None where unknown, and ``coverage`` of
        the interval, as far as the store has them.
    """
    found: dict[str, Any] = {}
    for name in ("half_width", "trust"):
        array = open_optional(location, f"{path}/{name}")
        if array is None or array.shape != (n_genes,):
            continue
        values = np.asarray(array[...], dtype=np.float64)
        found[name] = [round(float(v), 4) if np.isfinite(v) else None for v in values]
        if "coverage" in array.attrs:
            found["coverage"] = array.attrs["coverage"]
    return found
