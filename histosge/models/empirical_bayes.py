"""Gamma-Poisson empirical Bayes: shrink measured rates of spots towards the rates predicted for them.

A spot's true rate is taken as gamma-distributed around its prediction, its counts as Poisson. With many counts the
posterior mean is the measured rate; with few it stays near the prediction.

Terms
    rate        per 10,000
    exposure    a spot's total counts / 10,000: expected counts of a gene are rate x exposure
    dispersion  squared coefficient of variation of true rates around predicted ones, per gene
"""

import numpy as np

from histosge.models.linear_algebra import Floats


def dispersion(counts: Floats, exposure: Floats, rate: Floats) -> Floats:
    """Estimate each gene's dispersion of true rates around predicted ones, by moments: ``(n_genes,)``, not negative.

    Parameters
    ----------
    counts, rate
        ``(n_spots, n_genes)``; the rate as predicted without the spot's own counts: one that was fitted to them
        would look more certain than it is.
    exposure
        ``(n_spots,)``.
    """
    return dispersion_from_sums(*dispersion_sums(counts, exposure, rate))


def dispersion_sums(counts: Floats, exposure: Floats, rate: Floats) -> tuple[Floats, Floats]:
    """Return what `dispersion_from_sums` needs, ``(n_genes,)`` each; sums of several sets of spots add up."""
    expected = rate * exposure[:, None]
    # Counts vary by their mean (Poisson) and by dispersion x mean squared: what exceeds the former is the latter.
    return ((counts - expected) ** 2 - expected).sum(axis=0), (expected**2).sum(axis=0)


def dispersion_from_sums(excess: Floats, square: Floats) -> Floats:
    """Return each gene's dispersion, ``(n_genes,)``, from `dispersion_sums`."""
    return np.asarray(np.maximum(excess, 0.0) / np.maximum(square, 1e-12))


def posterior_rates(counts: Floats, exposure: Floats, rate: Floats) -> Floats:
    """Return each spot's posterior mean rate given its own counts, ``(n_spots, n_genes)``."""
    spread = dispersion(counts, exposure, rate)
    # Gamma prior of shape 1 / spread and mean `rate`: (1 / spread + counts) / (1 / (spread x rate) + exposure), written
    # so that a dispersion of 0 gives the prediction.
    return np.asarray(rate * (1 + spread * counts) / (1 + spread * rate * exposure[:, None]))
