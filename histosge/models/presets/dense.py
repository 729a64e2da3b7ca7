"""The preset `dense`, the default: declared apart from its model, which other presets build on."""

from histosge.models.dense import DenseModel
from histosge.models.registry import ModelRecord

RECORD = ModelRecord(
    "dense",
    "mean of ridge regressions on embeddings pooled at five scales and on their differences, low-rank targets (the default)",
    lambda: DenseModel,
)
