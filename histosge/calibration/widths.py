"""Half widths of prediction intervals from errors at held-out spots: arithmetic only.

Which rule applies follows from the number of donors:

    one             ``cross-conformal``: the quantile of all folds' errors. Spots of a donor resemble each other more than
                    those of two donors do, so nothing follows for another donor
    fewer than 9    ``donor-weighted``: the quantile of errors of donors left out, each donor weighing the same. Empirical:
                    no rule gives 90 % intervals for a new donor from fewer than 9 without assuming how donors differ
    9 and more      ``hierarchical``: the quantile within each donor, then the conformal quantile of these over donors
                    (Dunn, Wasserman and Ramdas, 2023; Lee, Barber and Willett, 2023)
"""

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32]
Labels = NDArray[np.int64]

CROSS_CONFORMAL, DONOR_WEIGHTED, HIERARCHICAL = "cross-conformal", "donor-weighted", "hierarchical"
# Genes that are sorted together: the order of 300,000 errors takes eight bytes each.
_GENES_AT_ONCE = 64


def least_donors(level: float) -> int:
    """Return the number of donors from which on a conformal quantile over donors exists: 9 for 90 %."""
    # The rank ceil((n + 1) level) must not exceed n. 1e-9: 0.9 / 0.1 is a little more than 9.
    return int(np.ceil(level / (1 - level) - 1e-9))


def width_method(n_donors: int, level: float) -> str:
    """Return the name of the rule that `half_width` uses."""
    if n_donors < 2:
        return CROSS_CONFORMAL
    return HIERARCHICAL if n_donors >= least_donors(level) else DONOR_WEIGHTED


def half_width(error: Values, donor: Labels, level: float) -> Values:
    """Return half widths, ``(n_genes,)``, from absolute errors ``(n_spots, n_genes)`` and donors ``(n_spots,)`` of spots."""
    method = width_method(len(np.unique(donor)), level)
    if method == CROSS_CONFORMAL:
        return conformal_width(error, level)
    return (donor_weighted_width if method == DONOR_WEIGHTED else hierarchical_width)(error, donor, level)


def conformal_width(error: Values, level: float) -> Values:
    """Return per gene the smallest width that covers ceil((n + 1) level) of ``(n, n_genes)`` errors, ``(n_genes,)``."""
    # n + 1, for the new spot is one more among equals: with n alone, intervals cover less than the level (Vovk et al.,
    # 2005). With few spots the rank may exceed n; the largest error is the best there is.
    rank = min(int(np.ceil((len(error) + 1) * level - 1e-9)), len(error)) - 1
    # A copy: a view of one row would keep the errors of all spots.
    return np.array(np.partition(error, rank, axis=0)[rank], dtype=np.float32)


def donor_weighted_width(error: Values, donor: Labels, level: float) -> Values:
    """Return per gene the smallest width that covers the level of errors, each donor weighing the same, ``(n_genes,)``."""
    _, number, counts = np.unique(donor, return_inverse=True, return_counts=True)
    weight = 1 / (len(counts) * counts[number])
    width = np.empty(error.shape[1], np.float32)
    for start in range(0, len(width), _GENES_AT_ONCE):
        some = error[:, start : start + _GENES_AT_ONCE]
        order = np.argsort(some, axis=0)
        covered = np.cumsum(weight[order], axis=0)
        # A little less than the level: weights are sums of rounded fractions.
        first = (covered >= level - 1e-9).argmax(axis=0)
        columns = np.arange(some.shape[1])
        width[start : start + _GENES_AT_ONCE] = some[order[first, columns], columns]
    return width


def hierarchical_width(error: Values, donor: Labels, level: float) -> Values:
    """Return per gene the conformal quantile over donors of the conformal quantile within each, ``(n_genes,)``.

    For donors that are exchangeable, the intervals cover the level's share of spots in at least that share of new donors.
    """
    return conformal_width(
        np.stack([conformal_width(error[donor == d], level) for d in np.unique(donor)]), level
    )


def coverage_by_donor(error: Values, donor: Labels, level: float) -> dict[int, float]:
    """Return donor -> share of its errors, mean over genes, that widths from the other donors cover; empty for one donor."""
    donors = np.unique(donor)
    if len(donors) < 2:
        return {}
    return {
        int(d): float((error[donor == d] <= half_width(error[donor != d], donor[donor != d], level)).mean())
        for d in donors
    }
