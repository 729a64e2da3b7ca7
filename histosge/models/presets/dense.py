"""The preset `dense`, the default: declared apart from its model, which other presets build on."""

from histosge.models.dense import DenseModel
from histosge.models.registry import ModelRecord

RECORD = ModelRecord(
    "dense",
    "stacked ridge regressions and a Gaussian process on multiscale features, low-rank targets (the default)",
    lambda: DenseModel,
)
