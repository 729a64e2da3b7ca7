"""Rescale a map so that the patches under each measured spot have the rate estimated for that spot.

The estimated rates come from `models.empirical_bayes`: near the measured rate where a spot has many counts, near the
predicted one where it has few. The patches under a disc are multiplied by factors until their mean rate is the
estimated one. Rates are per 10,000.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from histosge.data.sections import Patches
from histosge.data.spot_overlap import find_patches
from histosge.models.linear_algebra import Floats

# One sweep is exact where discs share no patch. Discs that do undo a part of each other's correction, so it is repeated;
# two that share all their patches and differ cannot both be met, and end at the limit with their geometric mean.
MAX_SWEEPS = 50
TOLERANCE = 2e-3
"""Sweeps end when the mean rate of every disc is this close to the wanted one, relatively."""
# Rates are floored before factors are computed: a factor cannot raise a rate of 0.
_MIN_RATE = 1e-6


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
        cls, patches: Patches, overlap: sparse.csr_matrix, log_covered: NDArray[np.float32], wanted: Floats
    ) -> Self:
        """Compute factors that give every disc its wanted mean rate, by repeated multiplicative corrections.

        Where discs share patches and cannot all be met, each gets a part of its correction.

        Parameters
        ----------
        log_covered
            log1p(CP10k) of the patches under discs, in the order of ``numpy.unique(overlap.indices)``.
        wanted
            Rates of the spots, ``(n_spots, n_genes)``.
        """
        covered = np.unique(overlap.indices)
        weight = sparse.csr_matrix(overlap[:, covered])
        base = np.maximum(np.expm1(log_covered.astype(np.float64)), _MIN_RATE)
        # Of the discs over a patch, the share of each in it.
        share = sparse.diags(1 / np.asarray(weight.sum(axis=0)).ravel()) @ weight.T
        rates, wanted = base.copy(), np.maximum(wanted, _MIN_RATE)
        for _ in range(MAX_SWEEPS):
            ratio = wanted / (weight @ rates)
            if np.abs(ratio - 1).max() < TOLERANCE:
                break
            # A geometric mean over the discs: rates stay positive whatever the ratios are.
            rates *= np.exp(share @ np.log(ratio))
        return cls(patches.rows[covered], patches.cols[covered], (rates / base).astype(np.float32))

    def apply(self, patches: Patches, log_patches: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return log1p(CP10k) with the factors applied, ``(n_patches, n_genes)``; `patches` may be a part of the slide."""
        found = find_patches(patches, self.rows, self.cols)
        present = found >= 0
        out = log_patches.copy()
        rates = np.maximum(np.expm1(out[found[present]].astype(np.float64)), _MIN_RATE)
        out[found[present]] = np.log1p(rates * self.factor[present])
        return out
