"""Half widths by predicted depth: where few counts are expected a spot is noisier, and its interval wider.

Mondrian conformal: spots are put into strata by the depth that the model itself predicts, which is known wherever
it predicts, and each stratum has the conformal width of its own held-out errors. Whether that is better than one
width for all is decided on folds left out in turn, by the interval score (Gneiting and Raftery, 2007).

Terms
    depth           predicted log of total counts, as a map stores it (float16)
    interval score  width, plus 2 / (1 - level) times what a miss lies outside by; lower is better, and a proper
                    score: neither wider nor narrower than right pays
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32]

STRATA = 3
MIN_SPOTS = 30
"""Held-out spots in a stratum: with fewer, the 90th percentile of its errors is mostly chance."""
JUDGED = 500
"""Genes that the choice looks at, at most: evenly over all."""


@dataclass(frozen=True)
class DepthStrata:
    """Half widths of each stratum.

    Parameters
    ----------
    edges
        Depths between strata, ascending, ``(n_strata - 1,)``, float32.
    half_width
        From the shallowest to the deepest, ``(n_strata, n_genes)``, float32.
    """

    edges: Values
    half_width: Values

    @classmethod
    def of(cls, error: Values, depth: NDArray[np.floating], level: float) -> Self | None:
        """Take strata of equal counts; errors are ``(n_spots, n_genes)``, depths ``(n_spots,)``.

        None where depths are so much alike that a stratum has fewer than `MIN_SPOTS` spots.
        """
        depth = to_stored_precision(depth)
        edges = np.quantile(depth, np.arange(1, STRATA) / STRATA).astype(np.float32)
        stratum = np.searchsorted(edges, depth)
        if np.bincount(stratum, minlength=STRATA).min() < MIN_SPOTS:
            return None
        return cls(edges, np.stack([conformal_width(error[stratum == k], level) for k in range(STRATA)]))

    def at(self, depth: NDArray[np.floating]) -> Values:
        """Return the half widths where these depths are predicted, ``(*depth.shape, n_genes)``."""
        return self.half_width[np.searchsorted(self.edges, to_stored_precision(depth))]

    def take(self, columns: list[int]) -> "DepthStrata":
        """Return those of some genes."""
        return replace(self, half_width=self.half_width[:, columns])


def to_stored_precision(depth: NDArray[np.floating]) -> Values:
    """Round as a map stores depth, so that a prediction and its map fall into the same stratum."""
    return depth.astype(np.float16).astype(np.float32)


def conformal_width(error: Values, level: float) -> Values:
    """Return per gene the smallest width that covers ceil((n + 1) level) of n errors, ``(n_genes,)``."""
    rank = min(int(np.ceil((len(error) + 1) * level)), len(error)) - 1
    return np.asarray(np.partition(error, rank, axis=0)[rank], dtype=np.float32)


def choose_strata(
    truth: Values, predicted: Values, depth: NDArray[np.floating], fold: NDArray[np.int64], level: float
) -> DepthStrata | None:
    """Return strata if they score better than one width on folds that had no say in either, else None.

    Parameters
    ----------
    truth, predicted
        Of held-out spots, ``(n_spots, n_genes)``.
    depth
        Predicted for them, ``(n_spots,)``.
    fold
        Which spots were held out together, ``(n_spots,)``.
    """
    columns = np.unique(np.linspace(0, truth.shape[1] - 1, JUDGED).round().astype(np.int64))
    some, guess = truth[:, columns], predicted[:, columns]
    error = np.abs(some - guess)
    one = by_depth = 0.0
    for k in np.unique(fold):
        out = fold == k
        pooled = conformal_width(error[~out], level)
        strata = DepthStrata.of(error[~out], depth[~out], level)
        if strata is None:
            return None
        one += float(interval_score(some[out], guess[out], pooled, level).sum())
        by_depth += float(interval_score(some[out], guess[out], strata.at(depth[out]), level).sum())
    if by_depth >= one:
        return None
    return DepthStrata.of(np.abs(truth - predicted), depth, level)


def interval_score(truth: Values, predicted: Values, half_width: Values, level: float) -> Values:
    """Return the score of each interval, ``(n_spots, n_genes)``: lower is better."""
    lower, upper = np.maximum(predicted - half_width, 0), predicted + half_width
    outside = np.maximum(lower - truth, 0) + np.maximum(truth - upper, 0)
    return np.asarray(upper - lower + 2 / (1 - level) * outside, dtype=np.float32)
