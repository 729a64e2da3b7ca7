"""The preset `dense`, the default: declared apart from its model, which other presets build on."""

from histosge.models.dense import DenseModel
from histosge.models.registry import ModelRecord

RECORD = ModelRecord(
    "dense",
    "Means of ridge regressions on Gaussian neighbourhoods of three widths, low-rank targets; the default.",
    lambda: DenseModel,
)
