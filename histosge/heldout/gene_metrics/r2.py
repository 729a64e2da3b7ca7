"""Share of the variance within sections that is explained."""

import numpy as np

from histosge.heldout.metric_registry import Floats, Metric, ScoredSpots
from histosge.heldout.metrics import varies, within_sections


def score(truth: Floats, predicted: Floats, spots: ScoredSpots) -> Floats:
    """Return 1 - squared error / squared deviation from each section's own mean, ``(n_genes,)``.

    0 where truth is constant.
    """
    # Against each section's own mean: against the mean of all, knowing the section would already explain something.
    squared = ((predicted - truth) ** 2).sum(axis=0)
    deviation = (within_sections(truth, spots.section) ** 2).sum(axis=0)
    share = np.divide(squared, deviation, out=np.ones_like(squared), where=varies(deviation, truth))
    return np.asarray(1 - share)


RECORD = Metric("r2", "share of the variance within sections that is explained", score, "R²", "r2")
