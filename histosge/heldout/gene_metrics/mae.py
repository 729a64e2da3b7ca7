"""Mean absolute error."""

import numpy as np

from histosge.heldout.metric_registry import Floats, Metric, ScoredSpots


def score(truth: Floats, predicted: Floats, spots: ScoredSpots) -> Floats:
    """Return the mean over spots of the absolute error, in log1p(CP10k), ``(n_genes,)``."""
    return np.asarray(np.abs(predicted - truth).mean(axis=0))


RECORD = Metric("mae", "mean absolute error of log1p(CP10k)", score, "MAE", "mae")
