"""Moran's I of the predicted map."""

from histosge.heldout.metric_registry import Floats, Metric, ScoredSpots


def score(truth: Floats, predicted: Floats, spots: ScoredSpots) -> Floats:
    """Return how much neighbouring spots agree in what was predicted, ``(n_genes,)``."""
    return spots.lattice.moran(predicted)


RECORD = Metric(
    "moran_predicted",
    "spatial autocorrelation of the predicted map over the 6 nearest spots",
    score,
    "Moran's I predicted",
    "moran_predicted",
)
