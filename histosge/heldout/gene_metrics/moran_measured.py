"""Moran's I of the measured map."""

from histosge.heldout.metric_registry import Floats, Metric, ScoredSpots


def score(truth: Floats, predicted: Floats, spots: ScoredSpots) -> Floats:
    """Return how much neighbouring spots agree in what was measured, ``(n_genes,)``."""
    return spots.lattice.moran(truth)


RECORD = Metric(
    "moran_measured",
    "spatial autocorrelation of the measured map over the 6 nearest spots",
    score,
    "Moran's I measured",
    "moran_measured",
)
