"""Adapting `dense` from sums: what `histosge.models.adaptation.adapt_dense` comes to without the spots' rows.

What is left of the genes after an earlier model's patterns follows from products of genes with genes, of genes with
patterns and of patterns with each other, which add up over sections, whatever the loadings are in the end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy import sparse

from histosge.models.adaptation import CAUTION, adapt_loadings
from histosge.models.cohort_ridges import ScaleSolution, Standardised
from histosge.models.dense import N_PATTERNS
from histosge.models.linear_algebra import Affine, Floats, Indices, Standardiser
from histosge.models.low_rank_targets import leading_axes, standardise
from histosge.models.ridge_sums import PENALTIES, RidgeSolver, RidgeSums, standardiser_from_sums, total
from histosge.models.target_sums import TargetBasis, gene_slices


def pattern_sums(target: sparse.csr_matrix, patterns: Floats) -> RidgeSums:
    """Add up an earlier model's patterns about the section's mean, ``(n_spots, n_patterns)``, and its standardised genes."""
    parts = [
        RidgeSums.from_rows(patterns, standardise(target[:, some].toarray()))
        for some in gene_slices(target.shape[1])
    ]
    return RidgeSums(
        len(patterns),
        parts[0].x,
        np.concatenate([part.y for part in parts]),
        parts[0].xx,
        np.hstack([part.xy for part in parts]),
        np.concatenate([part.yy for part in parts]),
    )


@dataclass(frozen=True)
class AdaptedBasis:
    """Genes as an earlier model's patterns and those of the residuals, in units of each gene's spread within a section.

    Parameters
    ----------
    loadings
        Of all genes on the earlier patterns, ``(n_genes, n_earlier)``.
    residual
        Patterns of the residuals, from the genes of the basis.
    anew
        Patterns that a training anew would have: penalties are chosen on them.
    """

    loadings: Floats
    residual: TargetBasis
    anew: TargetBasis

    @classmethod
    def fit(cls, groups: Sequence[RidgeSums], products: Floats, columns: Indices, axes: Floats) -> Self:
        """Compute loadings and patterns.

        Parameters
        ----------
        groups
            `pattern_sums` of what is left out together.
        products
            Of the basis' standardised genes with each other, ``(n_basis, n_basis)``.
        columns
            The genes of the basis, ``(n_basis,)``.
        axes
            Of the earlier model, ``(n_genes, n_earlier)``.
        """
        loadings, _ = adapt_loadings(groups, axes)
        sums, own = total(groups), loadings[columns]
        cross = own @ sums.xy[:, columns]
        residual = products - cross - cross.T + own @ sums.xx @ own.T
        return cls(
            loadings,
            TargetBasis(columns, leading_axes(residual, N_PATTERNS)),
            TargetBasis.fit(products, columns, N_PATTERNS),
        )

    @property
    def n_patterns(self) -> int:
        """Return how many patterns of residuals there are, and of a training anew."""
        return int(self.residual.axes.shape[1])

    def residual_patterns(self, target: sparse.csr_matrix, patterns: Floats) -> Floats:
        """Return the patterns of the residuals at one section's spots, ``(n_spots, n_patterns)``; each has mean 0.

        Parameters
        ----------
        patterns
            Of the earlier model, about the section's mean, ``(n_spots, n_earlier)``.
        """
        shift = self.loadings[self.residual.columns].T @ self.residual.axes
        return self.residual.patterns(target) - patterns @ shift

    def residual_products(self, target: sparse.csr_matrix, patterns: Floats, own: Floats) -> Floats:
        """Return the products of one section's residuals, of all genes, with its own patterns, ``(n_genes, n_patterns)``."""
        return self.residual.loading_products(target, own) - self.loadings @ (patterns.T @ own)

    def residual_axes(self, sums: tuple[Floats, Floats] | None) -> Floats:
        """Return the axes of all genes, ``(n_genes, n_patterns)``.

        Parameters
        ----------
        sums
            `residual_products` and the squares of the patterns over all spots, ``(n_patterns,)``; None where all genes are
            in the basis.
        """
        axes = np.zeros((len(self.loadings), self.n_patterns))
        if sums is not None:
            # As `TargetBasis.targets`: patterns of one set of spots are uncorrelated.
            axes = np.divide(sums[0], sums[1], out=axes, where=sums[1] > 0)
        axes[self.residual.columns] = self.residual.axes
        return axes


def solve_cautiously(
    groups: Sequence[RidgeSums],
    reference: Floats,
    n_stacked: int,
    adjust: Callable[[Standardiser], Standardiser] = lambda found: found,
) -> ScaleSolution:
    """Fit the ridge of one scale to residuals, with penalties that a training anew chooses, times `CAUTION`.

    Parameters
    ----------
    groups
        Sums of each, of pooled embeddings less the reference. The first half of the outputs is that of a training anew, the
        second one of residuals, in the same order.
    n_stacked
        The first outputs of each half, which have one penalty together; each further one has its own.
    adjust
        From mean and standard deviation of the inputs to how they are standardised.
    """
    whole = total(groups)
    n = len(whole.y) // 2
    standardiser = adjust(standardiser_from_sums(whole, reference))
    shift, by = standardiser.mean - reference, 1 / standardiser.scale
    factor, anew = np.repeat([1.0, CAUTION], n), np.arange(n)
    whole = whole.mapped(shift, by)
    error, paths = np.zeros((len(PENALTIES), n)), list[list[Affine]]()
    for held_out in Standardised(groups, shift, by):
        sums = held_out.outputs(anew)
        solutions = RidgeSolver.from_sums(whole - held_out).path([penalty * factor for penalty in PENALTIES])
        error += [sums.error_within(_outputs(solution, slice(0, n))) for solution in solutions]
        paths.append([_outputs(solution, slice(n, n + n_stacked)) for solution in solutions])
    shared = [slice(0, n_stacked), *(slice(i, i + 1) for i in range(n_stacked, n))]
    best = [int(error[:, part].sum(axis=1).argmin()) for part in shared]
    penalties = CAUTION * np.repeat(np.array(PENALTIES)[best], [part.stop - part.start for part in shared])
    ridge = RidgeSolver.from_sums(whole.outputs(n + anew)).solve(penalties)
    return ScaleSolution(
        ridge.after(standardiser),
        [path[best[0]].after(standardiser) for path in paths],
        tuple(float(penalties[part.start]) for part in shared),
        standardiser.mean,
    )


def _outputs(affine: Affine, some: slice) -> Affine:
    return Affine(affine.weight[:, some], affine.offset[some])
