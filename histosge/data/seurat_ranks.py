"""Genes by variance in excess of what their mean predicts, as Seurat's version 3 and scanpy's ``seurat_v3`` rank them.

Raw counts, section by section: the trend of variance over mean is fitted in each section, counts are standardised by
it and clipped, and genes go by the variance that is left. Over sections they go by their median rank (Stuart et al., 2019;
scanpy's ``batch_key``).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from histosge.data.loess import loess_fit
from histosge.data.sections import Spots
from histosge.errors import ExpressionError

SPAN = 0.3
"""Of the trend: Seurat's and scanpy's default."""


class SeuratRanks:
    """Ranks of genes over sections that are handed in one after the other.

    It keeps one number per gene and section. A section's trend is fitted to all genes that it measured, so that it does
    not depend on the other sections; ranks are those among the genes that all sections share.

    Parameters
    ----------
    among
        Genes to choose from; those that all sections share if None.
    """

    def __init__(self, among: Sequence[str] | None = None) -> None:
        self._among = None if among is None else tuple(among)
        self._sections: list[tuple[tuple[str, ...], NDArray[np.float64]]] = []
        self._n_spots = 0

    @property
    def genes(self) -> tuple[str, ...]:
        """Genes that can be chosen: those of `among`, or those that all sections so far share."""
        if self._among is not None or not self._sections:
            return self._among or ()
        common = set.intersection(*(set(genes) for genes, _ in self._sections))
        return tuple(gene for gene in self._sections[0][0] if gene in common)

    def add(self, spots: Spots) -> None:
        """Count the spots of one section.

        Raises
        ------
        ExpressionError
            If too few of its genes vary for a trend.
        """
        try:
            excess = excess_variance(spots.counts)
        except ValueError as error:
            raise ExpressionError(
                f"section {spots.slide_id!r}: no trend of variance over mean for seurat_v3 ({error}); choose by the "
                "variance of log counts instead: --genes N"
            ) from error
        self._sections.append((spots.genes, excess))
        self._n_spots += len(spots)

    def merge(self, other: "SeuratRanks") -> None:
        """Count the sections that another one counted, after its own; it may be of another process."""
        self._sections += other._sections
        self._n_spots += other._n_spots

    def choose(self, n: int) -> tuple[str, ...]:
        """Return the `n` genes of least median rank; fewer if fewer vary.

        A section counts for the genes that are among its own first `n`. Ties go to genes that are so in more sections,
        then by name.

        Raises
        ------
        ExpressionError
            If `n` is below 1, the sections share no gene, or none varies.
        """
        if n < 1:
            raise ExpressionError(f"cannot choose {n} genes; ask for at least 1")
        genes = self.genes
        if not genes:
            raise ExpressionError(
                "the sections share no gene; are their names of one kind (symbols or Ensembl ids)?"
            )
        ranks = np.stack([_ranks(genes, *section) for section in self._sections])
        varies = np.asarray(np.isfinite(ranks).any(axis=0))
        if not varies.any():
            raise ExpressionError(f"none of {len(genes)} genes varies over {self._n_spots} spots")
        ranks[ranks >= n] = np.nan
        counted = np.isfinite(ranks)
        sections = counted.sum(axis=0)
        # Never chosen by any section: they come last, as many as are needed to fill up. Infinity, since nanmedian warns.
        median = np.full(len(genes), np.inf)
        median[sections > 0] = np.nanmedian(ranks[:, sections > 0], axis=0)
        order = sorted(range(len(genes)), key=lambda i: (median[i], -sections[i], genes[i]))
        return tuple(genes[i] for i in order if varies[i])[:n]


def excess_variance(counts: sparse.csr_matrix) -> NDArray[np.float64]:
    """Return the variance of each gene's standardised, clipped counts, ``(n_genes,)``; NaN where a gene is constant.

    Parameters
    ----------
    counts
        Raw, ``(n_spots, n_genes)``.

    Raises
    ------
    ValueError
        If too few genes vary for a trend.
    """
    n = counts.shape[0]
    columns = counts.astype(np.float64).tocsc()
    sums, squares = _sums(columns)
    mean = sums / n
    variance = (squares / n - mean**2) * n / max(n - 1, 1)
    varies = variance > 1e-12 * np.maximum(mean**2, 1e-12)
    expected = np.full(len(mean), np.nan)
    expected[varies] = 10 ** loess_fit(np.log10(mean[varies]), np.log10(variance[varies]), SPAN)
    # A single spot full of one gene should not make it variable: nothing counts for more than the root of their number.
    most = np.sqrt(expected * n) + mean
    columns.data = np.minimum(columns.data, np.repeat(np.nan_to_num(most), np.diff(columns.indptr)))
    sums, squares = _sums(columns)
    return np.asarray((n * mean**2 + squares - 2 * sums * mean) / (max(n - 1, 1) * expected))


def _sums(columns: sparse.csc_matrix) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    total, squares = columns.sum(axis=0), columns.power(2).sum(axis=0)
    return np.asarray(total, np.float64).ravel(), np.asarray(squares, np.float64).ravel()


def _ranks(genes: Sequence[str], measured: Sequence[str], excess: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rank of each gene among `genes` in one section, 0 the first; infinite where it is constant."""
    column = {gene: i for i, gene in enumerate(measured)}
    values = excess[[column[gene] for gene in genes]]
    order = sorted(range(len(genes)), key=lambda i: (np.nan_to_num(-values[i], nan=np.inf), genes[i]))
    ranks = np.empty(len(genes))
    ranks[order] = np.arange(len(genes))
    ranks[np.isnan(values)] = np.inf
    return ranks
