"""What low-rank targets need of many sections: sums that add, so that no two sections are in memory together.

Patterns come from at most `MAX_BASIS` genes. Every further gene gets its loadings by a regression on the patterns, so that
predicting all genes of a genome costs no matrix of genes by genes. With no more genes than that, the patterns are those of
`LowRankTargets.fit`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from histosge.models.linear_algebra import Floats, Indices
from histosge.models.low_rank_targets import LowRankTargets, gene_moments, leading_axes, standardise

MAX_BASIS = 2000
"""Genes that patterns are computed from: as many as are usually called highly variable; their products take 32 MB."""
_GENES_AT_ONCE = 512


@dataclass(frozen=True)
class GeneMoments:
    """Mean and spread of genes within sections, over some sections.

    Parameters
    ----------
    n
        Spots.
    mean, variance
        Of each section times its spots, added up, ``(n_genes,)``.
    highest
        Of all spots, ``(n_genes,)``.
    log_library
        Sum of the logs of the spots' total counts.
    """

    n: int
    mean: Floats
    variance: Floats
    highest: Floats
    log_library: float

    @classmethod
    def from_section(cls, target: sparse.csr_matrix, library: Floats) -> Self:
        """Measure one section: log1p(CP10k), ``(n_spots, n_genes)``, and total counts, ``(n_spots,)``."""
        n, n_genes = target.shape
        mean, variance = np.empty(n_genes), np.empty(n_genes)
        highest = np.empty(n_genes)
        for some in gene_slices(n_genes):
            part = target[:, some].toarray()
            mean[some], variance[some] = gene_moments(part)
            highest[some] = part.max(axis=0)
        return cls(n, n * mean, n * variance, highest, float(log_library(library).sum()))

    @classmethod
    def merge(cls, parts: Sequence["GeneMoments"]) -> Self:
        """Add up at least one."""
        return cls(
            sum(part.n for part in parts),
            np.sum([part.mean for part in parts], axis=0),
            np.sum([part.variance for part in parts], axis=0),
            np.max([part.highest for part in parts], axis=0),
            sum(part.log_library for part in parts),
        )

    @property
    def mean_log_library(self) -> float:
        """Return the pooled mean of the logs of total counts."""
        return self.log_library / self.n

    def choose_basis(self) -> Indices:
        """Return the columns of the genes that patterns are computed from: the most variable within sections, in order."""
        if len(self.variance) <= MAX_BASIS:
            return np.arange(len(self.variance))
        # Rounded, so that equal variances do not hang on the last bit of a machine's sums.
        order = np.argsort(-np.round(self.variance / self.n, 12), kind="stable")
        return np.sort(order[:MAX_BASIS])


def log_library(library: Floats) -> Floats:
    """Return the logs of total counts; at least one count, for the logarithm of 0 would spoil a fit."""
    return np.log(np.maximum(library, 1.0))


def gene_slices(n_genes: int) -> list[slice]:
    """Return genes a few at a time, so that no dense copy of all is made."""
    return [slice(start, start + _GENES_AT_ONCE) for start in range(0, n_genes, _GENES_AT_ONCE)]


def gene_products(target: sparse.csr_matrix, basis: Indices) -> Floats:
    """Return the products of one section's standardised genes with each other, ``(n_basis, n_basis)``."""
    values = standardise(target[:, basis].toarray())
    return np.asarray(values.T @ values)


@dataclass(frozen=True)
class TargetBasis:
    """The patterns of some genes.

    Parameters
    ----------
    columns
        Of the genes that they are computed from, ``(n_basis,)``.
    axes
        Orthonormal, ``(n_basis, n_patterns)``.
    """

    columns: Indices
    axes: Floats

    @classmethod
    def fit(cls, products: Floats, columns: Indices, n_patterns: int) -> Self:
        """Compute the patterns from `gene_products`, added up over sections."""
        return cls(columns, leading_axes(products, n_patterns))

    def patterns(self, target: sparse.csr_matrix) -> Floats:
        """Return the patterns of one section's spots, ``(n_spots, n_patterns)``; each has mean 0."""
        return standardise(target[:, self.columns].toarray()) @ self.axes

    def loading_products(self, target: sparse.csr_matrix, patterns: Floats) -> Floats:
        """Return the products of one section's standardised genes with its patterns, ``(n_genes, n_patterns)``."""
        parts = [standardise(target[:, some].toarray()).T @ patterns for some in gene_slices(target.shape[1])]
        return np.concatenate(parts)

    def targets(self, moments: GeneMoments, loadings: tuple[Floats, Floats] | None) -> LowRankTargets:
        """Return the targets of all genes.

        Parameters
        ----------
        loadings
            `loading_products` of all sections, added up, and the sum of the squares of each pattern over all spots,
            ``(n_patterns,)``; None where all genes are in the basis.
        """
        axes = np.zeros((len(moments.mean), self.axes.shape[1]))
        if loadings is not None:
            # Patterns of one set of spots are uncorrelated: a regression on all of them is one on each.
            products, squares = loadings
            axes = np.divide(products, squares, out=axes, where=squares > 0)
        axes[self.columns] = self.axes
        n = moments.n
        return LowRankTargets(moments.mean / n, np.sqrt(moments.variance / n), axes, moments.highest)


def read_rows(target: sparse.csr_matrix, rows: Indices) -> NDArray[np.float32]:
    """Return some spots' targets as an array, ``(n, n_genes)``."""
    return np.asarray(target[rows].toarray(), dtype=np.float32)
