"""Rescale a map so that the patches under each measured spot have the spot's estimated rate.

A spot's true rate is taken as gamma-distributed around what the other spots and the picture say of it, its
counts as Poisson. Many counts: the spot's value is the measured one. Few counts: it stays near the
prediction. The map's patches under the disc are scaled until their mean rate is that value.

Terms
    rate        per 10,000
    exposure    a spot's total counts / 10,000: expected counts of a gene are rate x exposure
    dispersion  squared coefficient of variation of true rates around predicted ones, per gene
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from histosge.data.sections import Patches
from histosge.data.spot_overlap import find_patches

Floats = NDArray[np.float64]
SWEEPS = 50
CLOSE = 2e-3
"""Sweeps end when every disc's mean is this close to its value, relatively."""


@dataclass(frozen=True)
class RateFactors:
    """Factors on the rates of the patches under measured discs; all other patches keep theirs.

    Parameters
    ----------
    rows, cols
        Of the patches, ``(n,)``.
    factor
        ``(n, n_genes)``, float32.
    """

    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    factor: NDArray[np.float32]

    @classmethod
    def solve(
        cls, patches: Patches, overlap: sparse.csr_matrix, log_under: NDArray[np.float32], wanted: Floats
    ) -> Self:
        """Find factors that give every disc the rate that is wanted.

        Discs that share a patch are served in turns; where that cannot serve both, each gets a part.

        Parameters
        ----------
        log_under
            log1p(CP10k) of the patches under discs, in the order of ``numpy.unique(overlap.indices)``.
        wanted
            Rates of the spots, ``(n_spots, n_genes)``.
        """
        under = np.unique(overlap.indices)
        weight = sparse.csr_matrix(overlap[:, under])
        base = np.maximum(np.expm1(log_under.astype(np.float64)), 1e-6)
        share = sparse.diags(1 / np.asarray(weight.sum(axis=0)).ravel()) @ weight.T
        rates, wanted = base.copy(), np.maximum(wanted, 1e-6)
        for _ in range(SWEEPS):
            ratio = wanted / (weight @ rates)
            if np.abs(ratio - 1).max() < CLOSE:
                break
            rates *= np.exp(share @ np.log(ratio))
        return cls(patches.rows[under], patches.cols[under], (rates / base).astype(np.float32))

    def apply(self, patches: Patches, log_patches: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return log1p(CP10k) with the factors on, ``(n_patches, n_genes)``."""
        found = find_patches(patches, self.rows, self.cols)
        here = found >= 0
        out = log_patches.copy()
        scaled = np.maximum(np.expm1(out[found[here]].astype(np.float64)), 1e-6) * self.factor[here]
        out[found[here]] = np.log1p(scaled)
        return out
