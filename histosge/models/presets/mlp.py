"""The preset `mlp`: declared apart from its model, whose module needs torch."""

from histosge.models.protocol import Model
from histosge.models.registry import ModelRecord


def _load() -> type[Model]:
    from histosge.models.mlp import MlpModel

    return MlpModel


RECORD = ModelRecord(
    "mlp",
    "baseline: a multi-layer perceptron on the embedding under each spot",
    _load,
)
