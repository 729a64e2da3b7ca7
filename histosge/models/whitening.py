"""Whitening of a network's inputs: what varies little in the embeddings is learned as fast as what varies much.

A gradient step changes a weight in proportion to its input. Features that say how patches are arranged may vary a tenth
as much as those of stain and texture: without whitening a network of few hundred steps learned the latter by heart before
it had found the former.
"""

from typing import NamedTuple

import numpy as np

from histosge.data.spot_blocks import SpotBlocks
from histosge.models.linear_algebra import Floats, Indices, Standardiser, symmetric_eigen

SHRINKAGE = 0.1
"""Added to each variance, as a share of their mean: directions that are rounding or noise stay small."""
SAMPLED_BLOCKS, SAMPLED_PATCHES = 64, 512
"""Blocks that a covariance is computed from, and patches of each, at most."""


class Whitening(NamedTuple):
    """A symmetric matrix that whitens standardised embeddings, and the one that undoes it, ``(dim, dim)`` each."""

    matrix: Floats
    inverse: Floats

    @classmethod
    def from_covariance(cls, covariance: Floats) -> "Whitening | None":
        """Return the symmetric whitening (ZCA; Bell and Sejnowski, 1997) of a covariance, ``(dim, dim)``.

        Symmetric, so that it does not depend on the signs and the order of eigenvectors. The mean squared length of an
        embedding stays as it is. None where nothing varies.
        """
        values, axes = symmetric_eigen(covariance)
        values = np.maximum(values, 0.0)
        if values.sum() <= 0:
            return None
        by = 1 / np.sqrt(values + SHRINKAGE * values.mean())
        by *= np.sqrt(values.sum() / (values * by**2).sum())
        return cls((axes * by) @ axes.T, (axes / by) @ axes.T)

    @classmethod
    def from_blocks(
        cls, blocks: SpotBlocks, numbers: Indices, standardiser: Standardiser
    ) -> "Whitening | None":
        """Return the whitening of the standardised embeddings of some blocks, from a sample of them; see above."""
        dim = len(standardiser.mean)
        covariance, mean, n = np.zeros((dim, dim)), np.zeros(dim), 0
        for block in blocks.read(numbers[:: max(1, -(-len(numbers) // SAMPLED_BLOCKS))].tolist()):
            embedding = block.patches.embedding
            rows = standardiser.apply(embedding[:: max(1, -(-len(embedding) // SAMPLED_PATCHES))])
            covariance += rows.T @ rows
            mean += rows.sum(axis=0)
            n += len(rows)
        if n == 0:
            return None
        return cls.from_covariance(covariance / n - np.outer(mean / n, mean / n))
