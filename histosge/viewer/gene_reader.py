"""One gene of a map at a time. The objects of its gene group are kept, as the next gene is likely in the same group."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.byte_cache import ByteCache
from histosge.calibration.conformal import TRUSTED
from histosge.calibration.wording import half_width_text, interval_name
from histosge.prediction.expression_store import GENE_GROUP
from histosge.prediction.stored_map import StoredMap

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


def per_gene(stored: StoredMap) -> dict[str, Any]:
    """Return what a map holds of each gene beside its values, as far as it has it.

    Returns
    -------
    dict
        ``trust``, a number a gene, None where unknown, and ``trust_scope``, on what it was measured; ``abstained``, whether
        trust is so low that a gene's prediction should not be used; ``half_widths``, per
        gene a list with one for each stratum of predicted depth, or a single one, and None where unknown;
        ``half_width_texts``, the same in words; ``interval``, the interval's name with its level and for whom it holds;
        ``strata``, whether half widths differ by depth.
    """
    found: dict[str, Any] = {}
    n_genes = len(stored.genes)
    # A store from elsewhere may hold arrays of any shape under these names.
    if stored.trust is not None and stored.trust.shape == (n_genes,):
        found["trust_scope"] = stored.scope or stored.claim
        found["abstained"] = [not trust >= TRUSTED for trust in stored.trust.tolist()]
        found["trust"] = [round(float(v), 4) if np.isfinite(v) else None for v in stored.trust]
    has_strata = has_depth_strata(stored)
    if has_strata or (stored.half_width is not None and stored.half_width.shape == (n_genes,)):
        widths = [stored.half_widths(gene) for gene in range(n_genes)]
        known = [bool(np.isfinite(each).all()) for each in widths]
        found["half_widths"] = [
            [round(w, 4) for w in each] if ok else None for each, ok in zip(widths, known, strict=True)
        ]
        found["half_width_texts"] = [
            half_width_text(each) if ok else None for each, ok in zip(widths, known, strict=True)
        ]
        found["interval"] = interval_name(stored.level, stored.claim)
        found["strata"] = has_strata
    return found


def has_depth_strata(stored: StoredMap) -> bool:
    """Tell whether a map has half widths by predicted depth, and the depth that selects them."""
    strata, depth = stored.strata, stored.depth
    if strata is None or depth is None:
        return False
    fits = strata.half_width.shape == (len(strata.edges) + 1, len(stored.genes))
    return fits and tuple(depth.shape) == (*stored.grid.shape, 1)
