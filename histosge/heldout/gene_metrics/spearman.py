"""Rank correlation within sections."""

import numpy as np

from histosge.heldout.metric_registry import Floats, Metric, ScoredSpots
from histosge.heldout.metrics import correlate, is_undefined, rank_within


def score(truth: Floats, predicted: Floats, spots: ScoredSpots) -> Floats:
    """Return Pearson's correlation of ranks within sections, ``(n_genes,)``; 0 where Pearson is not defined."""
    section = spots.section
    ranked, _ = correlate(rank_within(truth, section), rank_within(predicted, section), section)
    # Ranks of a constant prediction are those of its rounding errors: they would correlate by chance.
    return np.where(is_undefined(truth, predicted, section), 0.0, ranked)


RECORD = Metric("spearman", "correlation of ranks within sections", score, "Spearman")
