"""Gamma-Poisson empirical Bayes: shrink measured rates of spots towards what was predicted for them.

A spot's true rate is taken as gamma-distributed around its prediction, its counts as Poisson. With many counts the
posterior mean is the measured rate; with few it stays near the prediction.

Terms
    rate        per 10,000
    exposure    a spot's total counts / 10,000: expected counts of a gene are rate x exposure
    dispersion  squared coefficient of variation of true rates around predicted ones, per gene

"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def dispersion(counts: Floats, exposure: Floats, rate: Floats) -> Floats:
    """Estimate per gene how far true rates stray from predicted ones, by moments: ``(n_genes,)``, not negative.

    Parameters
    ----------
    counts, rate
        ``(n_spots, n_genes)``; the rate as predicted without the spot's own counts.
    exposure
        ``(n_spots,)``.
    """
    expected = rate * exposure[:, None]
    excess = ((counts - expected) ** 2 - expected).sum(axis=0)
    return np.asarray(np.maximum(excess, 0.0) / np.maximum((expected**2).sum(axis=0), 1e-12))


def posterior_rates(counts: Floats, exposure: Floats, rate: Floats) -> Floats:
    """Return each spot's rate given its own counts, ``(n_spots, n_genes)``: between predicted and measured."""
    spread = dispersion(counts, exposure, rate)
    return np.asarray(rate * (1 + spread * counts) / (1 + spread * rate * exposure[:, None]))
