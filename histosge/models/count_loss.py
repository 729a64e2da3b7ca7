"""A count likelihood as the last step of `dense`: patterns -> rates, with library size as an offset.

    counts ~ Poisson or negative binomial,  mean = library / 10,000 * exp(b + V z + section's own level)

z are out-of-fold predictions of the patterns, so V is not fitted to the noise that a ridge fits at its own training
spots. Each gene is a generalised linear model of its own, solved by Newton steps for all genes at once. Rates are
positive.
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
from histosge.models.nested_state import take
from histosge.models.protocol import State

LOSSES = ("mse", "poisson", "nb")
MAX_STEPS = 25
SLOPE_PENALTY = 1.0
"""Ridge penalty of the slopes: that of one count's worth of information."""
# Limits of the linear predictor: exp(12) is 16 times the scale of 10,000, so no rate of a gene is cut off.
_MAX_LOG_RATE = 12.0
# Added to rates before their logarithm: a gene may have no count in a section.
_MIN_RATE = 0.01
# Genes solved together: each needs a row of (spots) and a small matrix of its own.
_GENES_AT_ONCE = 512


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
            Per section, out-of-fold predictions, ``(n_spots, n_patterns)``.

        Raises
        ------
        ModelError
            If the sections come without total counts.
        """
        library = [s.library for s in sections if s.library is not None]
        if len(library) < len(sections):
            raise ModelError(
                f"--loss {loss} needs each spot's total counts, which {len(sections) - len(library)} of "
                f"{len(sections)} sections lack; give raw counts, or train with --loss mse"
            )
        Z = np.concatenate(patterns)
        Z = np.hstack([np.ones((len(Z), 1)), Z])
        exposure, starts = np.concatenate(library) / SCALE, np.cumsum([0, *map(len, library)])
        solved = np.empty((Z.shape[1], sections[0].target.shape[1]))
        for first in range(0, solved.shape[1], _GENES_AT_ONCE):
            columns = slice(first, first + _GENES_AT_ONCE)
            rates = np.expm1(np.concatenate([s.target[:, columns] for s in sections]).astype(np.float64))
            counts = np.rint(rates * exposure[:, None])
            pooled = np.log(counts.sum(axis=0) / exposure.sum() + _MIN_RATE)
            # A section's level of a gene is an offset: fitted as a slope it would pass for a pattern.
            level = np.empty_like(counts)
            for a, b in pairwise(starts):
                level[a:b] = np.log(counts[a:b].sum(axis=0) / exposure[a:b].sum() + _MIN_RATE) - pooled
            solved[:, columns] = _solve(loss, Z, counts, exposure, level)
        return cls(solved[1:], solved[0])

    def __call__(self, patterns: Floats) -> NDArray[np.float32]:
        """Return log1p(CP10k), ``(n, n_genes)``."""
        logs = patterns.astype(np.float32) @ self.weight.astype(np.float32)
        logs += self.offset.astype(np.float32)
        return np.asarray(
            np.logaddexp(np.float32(0), np.clip(logs, -_MAX_LOG_RATE, _MAX_LOG_RATE)), dtype=np.float32
        )

    def state(self) -> State:
        """Return the arrays."""
        return {"counts.weight": self.weight, "counts.offset": self.offset}

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Rebuild."""
        offset = take(state, "counts.offset", None)
        return cls(take(state, "counts.weight", None, len(offset)), offset)


def _solve(loss: str, Z: Floats, counts: Floats, exposure: Floats, level: Floats) -> Floats:
    """Return coefficients ``(n_patterns + 1, n_genes)``, the intercept first."""
    beta = np.zeros((Z.shape[1], counts.shape[1]))
    # From the mean rate and slopes of 0: the solution of a gene that follows no pattern.
    beta[0] = np.log(counts.sum(axis=0) / exposure.sum() + _MIN_RATE)
    beta = _newton(Z, counts, exposure, level, beta, np.zeros(counts.shape[1]))
    if loss == "nb":
        # Moments around the Poisson fit; then one more fit with these dispersions.
        rate = np.exp(np.clip(Z @ beta + level, -_MAX_LOG_RATE, _MAX_LOG_RATE))
        beta = _newton(Z, counts, exposure, level, beta, dispersion(counts, exposure, rate))
    return beta


def _newton(
    Z: Floats, counts: Floats, exposure: Floats, level: Floats, beta: Floats, overdispersion: Floats
) -> Floats:
    """Maximise the penalised likelihood of each gene, from coefficients `beta`, ``(n_patterns + 1, n_genes)``."""
    k = Z.shape[1]
    pairs = (Z[:, :, None] * Z[:, None, :]).reshape(len(Z), k * k)
    penalty = np.full(k, SLOPE_PENALTY)
    penalty[0] = 1e-6  # the intercept is free
    for _ in range(MAX_STEPS):
        mean = exposure[:, None] * np.exp(np.clip(Z @ beta + level, -_MAX_LOG_RATE, _MAX_LOG_RATE))
        weight = 1 / (1 + overdispersion * mean)
        gradient = Z.T @ ((counts - mean) * weight) - penalty[:, None] * beta
        hessian = (pairs.T @ (mean * weight)).T.reshape(-1, k, k) + np.diag(penalty + 1e-6)
        step = np.linalg.solve(hessian, gradient.T[:, :, None])[:, :, 0].T
        # Newton overshoots where counts are few: no linear predictor changes by more than 1 in a step.
        change = np.abs(Z @ step).max(axis=0)
        beta = beta + step / np.maximum(change, 1.0)
        if change.max() < 1e-6:
            break
    return beta
