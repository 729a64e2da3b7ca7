"""Mean squared error."""

import numpy as np

from histosge.heldout.metric_registry import Floats, Metric, ScoredSpots


def score(truth: Floats, predicted: Floats, spots: ScoredSpots) -> Floats:
    """Return the mean over spots of the squared error, in log1p(CP10k) squared, ``(n_genes,)``."""
    return np.asarray(((predicted - truth) ** 2).mean(axis=0))


RECORD = Metric("mse", "mean squared error of log1p(CP10k)", score, "MSE", "mse")
