"""Half widths of intervals by predicted depth: a spot with few expected counts is noisier, so its interval is wider.

Mondrian conformal prediction: spots are put into strata by the depth that the model itself predicts, which is known
wherever it predicts, and each stratum has the width of its own held-out errors. Whether that is better than
one width for all is decided on folds left out in turn, by the interval score (Gneiting and Raftery, 2007).

Terms
    depth           predicted log of total counts, as a map stores it (float16)
    interval score  width, plus 2 / (1 - level) times the distance of a miss from the interval; lower is better. It is a
                    proper score: intervals that are too wide and intervals that are too narrow both score worse
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from histosge.calibration.values_on_disk import ValuesOnDisk
from histosge.calibration.widths import Labels, half_width
from histosge.threads import prefetch

Values = NDArray[np.float32]

N_STRATA = 3
MIN_SPOTS = 30
"""Held-out spots in a stratum: with fewer, the 90th percentile of its errors is mostly chance."""
_VALUES_AT_ONCE = 1 << 22
"""Values of spots and genes that are worked on together: 16 MB, of which a dozen arrays is alive at once."""
MAX_GENES_OF_CHOICE = 500
"""Genes that the choice between strata and one width is made on, at most, spread evenly over all."""


@dataclass(frozen=True)
class DepthStrata:
    """Half widths for each stratum of predicted depth.

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
    def fit(cls, error: Values, depth: NDArray[np.floating], donor: Labels, level: float) -> Self | None:
        """Take strata of equal numbers of spots, and the half width of each.

        Parameters
        ----------
        error
            Absolute errors of held-out spots, ``(n_spots, n_genes)``.
        depth, donor
            Predicted for them, and their donor, ``(n_spots,)``.
        level
            Share of spots that the intervals must cover.

        Returns
        -------
        DepthStrata or None
            None where so many depths are equal that a stratum has fewer than `MIN_SPOTS` spots.
        """
        # Rounded first: edges between depths that a map cannot tell apart would sort a spot and its patch differently.
        depth = to_stored_precision(depth)
        edges = np.quantile(depth, np.arange(1, N_STRATA) / N_STRATA).astype(np.float32)
        stratum = np.searchsorted(edges, depth)
        if np.bincount(stratum, minlength=N_STRATA).min() < MIN_SPOTS:
            return None
        parts = [stratum == k for k in range(N_STRATA)]
        return cls(edges, np.stack([half_width(error[part], donor[part], level) for part in parts]))

    def half_width_at(self, depth: NDArray[np.floating]) -> Values:
        """Return the half widths at predicted depths, ``(*depth.shape, n_genes)``."""
        return self.half_width[self.stratum_at(depth)]

    def stratum_at(self, depth: NDArray[np.floating]) -> NDArray[np.int64]:
        """Return the stratum of each predicted depth, 0 for the lowest, ``(*depth.shape,)``."""
        return np.searchsorted(self.edges, to_stored_precision(depth))

    def take(self, columns: list[int]) -> "DepthStrata":
        """Return the half widths of some genes."""
        return replace(self, half_width=self.half_width[:, columns])


def to_stored_precision(depth: NDArray[np.floating]) -> Values:
    """Round depth to float16, as a map stores it, so that a prediction and its map fall into the same stratum."""
    return depth.astype(np.float16).astype(np.float32)


def choose_strata(
    truth: Values | ValuesOnDisk,
    predicted: Values | ValuesOnDisk,
    depth: NDArray[np.floating],
    fold: Labels,
    level: float,
    donor: Labels | None = None,
    *,
    threads: int = 1,
) -> DepthStrata | None:
    """Return strata if they have a better interval score than one width on folds left out in turn, else None.

    Parameters
    ----------
    truth, predicted
        Of held-out spots, ``(n_spots, n_genes)``.
    depth
        Predicted for them, ``(n_spots,)``.
    fold
        Which spots were held out together, ``(n_spots,)``.
    donor
        Of each spot; None for one donor.
    threads
        That work on genes side by side.
    """
    donor = np.zeros(len(truth), np.int64) if donor is None else donor
    columns = np.unique(np.linspace(0, truth.shape[1] - 1, MAX_GENES_OF_CHOICE).round().astype(np.int64))
    score_pooled = score_by_depth = 0.0

    def compared(some: NDArray[np.int64]) -> tuple[float, float] | None:
        return _scores(truth[:, some], predicted[:, some], depth, fold, level, donor)

    for scores in prefetch(compared, gene_parts(columns, len(truth)), threads):
        if scores is None:
            return None
        score_pooled += scores[0]
        score_by_depth += scores[1]
    if score_by_depth >= score_pooled:
        return None

    def fitted(some: NDArray[np.int64]) -> DepthStrata | None:
        return DepthStrata.fit(np.abs(truth[:, some] - predicted[:, some]), depth, donor, level)

    found = list(prefetch(fitted, gene_parts(np.arange(truth.shape[1]), len(truth)), threads))
    parts = [part for part in found if part is not None]
    if len(parts) < len(found):
        return None
    return replace(parts[0], half_width=np.concatenate([part.half_width for part in parts], axis=1))


def _scores(
    truth: Values,
    predicted: Values,
    depth: NDArray[np.floating],
    fold: Labels,
    level: float,
    donor: Labels,
) -> tuple[float, float] | None:
    """Return the interval scores of one width and of strata on folds left out in turn; None without strata."""
    error = np.abs(truth - predicted)
    score_pooled = score_by_depth = 0.0
    for k in np.unique(fold):
        # Widths from the other folds: on their own errors, three widths always score better than one.
        out = fold == k
        pooled = half_width(error[~out], donor[~out], level)
        strata = DepthStrata.fit(error[~out], depth[~out], donor[~out], level)
        if strata is None:
            return None
        score_pooled += float(interval_score(truth[out], predicted[out], pooled, level).sum())
        by_depth = strata.half_width_at(depth[out])
        score_by_depth += float(interval_score(truth[out], predicted[out], by_depth, level).sum())
    return score_pooled, score_by_depth


def gene_parts(columns: NDArray[np.int64], n_spots: int) -> list[NDArray[np.int64]]:
    """Return columns a few at a time, so that arrays of all spots that lie on disk are never read whole."""
    step = max(1, _VALUES_AT_ONCE // max(n_spots, 1))
    return [columns[start : start + step] for start in range(0, len(columns), step)]


def interval_bounds(predicted: Values, half_width: Values) -> tuple[Values, Values]:
    """Return lower and upper ends, of the shape of `predicted`; expression is not negative, so neither is an end."""
    return np.maximum(predicted - half_width, 0), predicted + half_width


def interval_score(truth: Values, predicted: Values, half_width: Values, level: float) -> Values:
    """Return the interval score of each prediction, ``(n_spots, n_genes)``: lower is better."""
    lower, upper = interval_bounds(predicted, half_width)
    outside = np.maximum(lower - truth, 0) + np.maximum(truth - upper, 0)
    return np.asarray(upper - lower + 2 / (1 - level) * outside, dtype=np.float32)
