"""Structural similarity of the map."""

from histosge.heldout.metric_registry import Floats, Metric, ScoredSpots


def score(truth: Floats, predicted: Floats, spots: ScoredSpots) -> Floats:
    """Return the structural similarity, mean over spots, ``(n_genes,)``."""
    return spots.lattice.ssim(truth, predicted)


RECORD = Metric("ssim", "structural similarity of the map (Wang et al., 2004)", score, "SSIM", "ssim")
