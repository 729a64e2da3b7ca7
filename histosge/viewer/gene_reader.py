"""One gene of a map at a time. The objects of its gene group are kept, as the next gene is likely in the same group."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.byte_cache import ByteCache
from featurestore.location import Location
from featurestore.storage.zarr_metadata import read_values
from histosge.prediction.expression_store import GENE_GROUP, StoredMap, open_optional

GridValues = NDArray[np.float16]
"""Values of one gene, or of a group, over a grid: ``(n_rows, n_cols)`` or ``(n_rows, n_cols, n_genes)``."""
GROUPS_BYTES = 1_000_000_000
"""Gene groups held at once, over all slides. A group larger than half of it is read gene by gene."""


def new_gene_cache() -> ByteCache[GridValues]:
    """Return the cache that the maps of one page share."""
    return ByteCache(GROUPS_BYTES, lambda values: int(values.nbytes))


class GeneReader:
    """The genes of one map.

    Parameters
    ----------
    stored
        The map, opened.
    cache
        Shared by all maps of a page.
    """

    def __init__(self, stored: StoredMap, cache: ByteCache[GridValues]) -> None:
        self._stored, self._cache = stored, cache
        # One cache serves the maps of all slides. Not `id(self)`, which a later reader may get once this one is gone,
        # and with it this one's values: the cache keeps the object alive.
        self._key = object()
        self._rows, self._cols = (0, stored.grid.n_rows), (0, stored.grid.n_cols)
        group_bytes = stored.grid.n_rows * stored.grid.n_cols * min(GENE_GROUP, len(stored.genes)) * 2
        self._by_group = group_bytes <= GROUPS_BYTES // 2

    def read(self, gene: int) -> GridValues:
        """Return a gene over the grid, ``(n_rows, n_cols)``; NaN where nothing was predicted.

        Raises
        ------
        LookupError
            If there is no such gene.
        """
        if not 0 <= gene < len(self._stored.genes):
            raise LookupError(f"there is no gene {gene}")
        if not self._by_group:
            return self._cache.get((self._key, "gene", gene), lambda: self._read(gene, gene + 1))[..., 0]
        first = gene // GENE_GROUP * GENE_GROUP
        group = self._cache.get((self._key, first), lambda: self._read(first, first + GENE_GROUP))
        return group[..., gene - first]

    def _read(self, first: int, stop: int) -> GridValues:
        step = self._stored.array.block_shape[0]
        if self._by_group:
            return self._stored.array.read(self._rows, self._cols, slice(first, stop)).astype(
                np.float16, copy=False
            )
        # Objects hold a whole gene group, of which one gene is used: read by rows of blocks, the rest stays small.
        strips = [
            self._stored.array.read((row, min(row + step, self._rows[1])), self._cols, slice(first, stop))
            for row in range(0, self._rows[1], step)
        ]
        return np.concatenate(strips).astype(np.float16, copy=False)


def per_gene(location: Location, path: str, n_genes: int) -> dict[str, Any]:
    """Return what an expression store holds of each gene beside its map.

    Returns
    -------
    dict
        ``half_width`` (of the calibrated interval) and ``trust``, lists with None where unknown, and ``coverage`` of
        the interval, as far as the store has them.
    """
    found: dict[str, Any] = {}
    for name in ("half_width", "trust"):
        array = open_optional(location, f"{path}/{name}")
        # A store from elsewhere may hold anything under this name.
        if array is None or array.shape != (n_genes,):
            continue
        values = read_values(array, f"{location.label}/{path}/{name}", (n_genes,), "fiu").astype(np.float64)
        found[name] = [round(float(v), 4) if np.isfinite(v) else None for v in values]
        if "coverage" in array.attrs:
            found["coverage"] = array.attrs["coverage"]
    return found
