"""A count likelihood as the last step of `dense`: patterns -> rates, with library size as an offset.

    counts ~ Poisson or negative binomial,  mean = library / 10,000 * exp(b + V z + section's own level)

z are patterns as predicted without the spot itself, so V is not fitted to what the ridge has memorised. Each
gene is a small regression of its own, solved by Newton steps for all genes at once. Rates are positive, and no
gene can die.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np
from numpy.typing import NDArray

from histosge.data.genes import SCALE
from histosge.data.sections import TrainingSection
from histosge.errors import ModelError
from histosge.models.empirical_bayes import dispersion
from histosge.models.linear_algebra import Floats
from histosge.models.protocol import State

LOSSES = ("mse", "poisson", "nb")
STEPS = 25
PRIOR = 1.0
"""Pull of the slopes towards 0, in units of one count's worth of information."""
_LIMIT = 12.0
_FLOOR = 0.01
_CHUNK = 512


@dataclass(frozen=True)
class CountHead:
    """log1p(CP10k) = log1p(exp(offset + patterns @ weight)).

    Parameters
    ----------
    weight, offset
        ``(n_patterns, n_genes)`` and ``(n_genes,)``.
    """

    weight: Floats
    offset: Floats

    @classmethod
    def fit(cls, loss: str, sections: Sequence[TrainingSection], patterns: Sequence[Floats]) -> Self:
        """Fit to the sections' counts.

        Parameters
        ----------
        loss
            ``poisson`` or ``nb``.
        patterns
            Per section, predicted without each spot, ``(n_spots, n_patterns)``.

        Raises
        ------
        ModelError
            If the sections come without total counts.
        """
        library = [s.library for s in sections if s.library is not None]
        if len(library) < len(sections):
            raise ModelError(f"--loss {loss} needs each spot's total counts; give raw counts, or --loss mse")
        Z = np.concatenate(patterns)
        Z = np.hstack([np.ones((len(Z), 1)), Z])
        exposure, starts = np.concatenate(library) / SCALE, np.cumsum([0, *map(len, library)])
        solved = np.empty((Z.shape[1], sections[0].target.shape[1]))
        for first in range(0, solved.shape[1], _CHUNK):
            columns = slice(first, first + _CHUNK)
            rates = np.expm1(np.concatenate([s.target[:, columns] for s in sections]).astype(np.float64))
            counts = np.rint(rates * exposure[:, None])
            pooled = np.log(counts.sum(axis=0) / exposure.sum() + _FLOOR)
            level = np.empty_like(counts)
            for a, b in pairwise(starts):
                level[a:b] = np.log(counts[a:b].sum(axis=0) / exposure[a:b].sum() + _FLOOR) - pooled
            solved[:, columns] = _solve(loss, Z, counts, exposure, level)
        return cls(solved[1:], solved[0])

    def __call__(self, patterns: Floats) -> NDArray[np.float32]:
        """Return log1p(CP10k), ``(n, n_genes)``."""
        logs = patterns.astype(np.float32) @ self.weight.astype(np.float32)
        logs += self.offset.astype(np.float32)
        return np.asarray(np.logaddexp(np.float32(0), np.clip(logs, -_LIMIT, _LIMIT)), dtype=np.float32)

    def state(self) -> State:
        """Return the arrays."""
        return {"counts.weight": self.weight, "counts.offset": self.offset}


def _solve(loss: str, Z: Floats, counts: Floats, exposure: Floats, level: Floats) -> Floats:
    """Return coefficients ``(n_patterns + 1, n_genes)``, the intercept first."""
    beta = np.zeros((Z.shape[1], counts.shape[1]))
    beta[0] = np.log(counts.sum(axis=0) / exposure.sum() + _FLOOR)
    beta = _newton(Z, counts, exposure, level, beta, np.zeros(counts.shape[1]))
    if loss == "nb":
        rate = np.exp(np.clip(Z @ beta + level, -_LIMIT, _LIMIT))
        beta = _newton(Z, counts, exposure, level, beta, dispersion(counts, exposure, rate))
    return beta


def _newton(
    Z: Floats, counts: Floats, exposure: Floats, level: Floats, beta: Floats, spread: Floats
) -> Floats:
    k = Z.shape[1]
    pairs = (Z[:, :, None] * Z[:, None, :]).reshape(len(Z), k * k)
    prior = np.full(k, PRIOR)
    prior[0] = 1e-6
    for _ in range(STEPS):
        mean = exposure[:, None] * np.exp(np.clip(Z @ beta + level, -_LIMIT, _LIMIT))
        shrink = 1 / (1 + spread * mean)
        slope = Z.T @ ((counts - mean) * shrink) - prior[:, None] * beta
        curve = (pairs.T @ (mean * shrink)).T.reshape(-1, k, k) + np.diag(prior + 1e-6)
        step = np.linalg.solve(curve, slope.T[:, :, None])[:, :, 0].T
        # Newton overshoots where counts are few: no linear predictor moves by more than 1 at once.
        reach = np.abs(Z @ step).max(axis=0)
        beta = beta + step / np.maximum(reach, 1.0)
        if reach.max() < 1e-6:
            break
    return beta
