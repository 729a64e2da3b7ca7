"""The preset `dense+attention`: declared apart from its model, whose module needs torch."""

from histosge.models.protocol import Model
from histosge.models.registry import ModelRecord


def _load() -> type[Model]:
    from histosge.models.dense_attention import DenseAttentionModel

    return DenseAttentionModel


RECORD = ModelRecord(
    "dense+attention",
    "dense, plus attention over neighbouring patches, kept only where held-out sections gain from it",
    _load,
)
