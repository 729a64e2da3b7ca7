"""The preset `attention`: declared apart from its model, whose module needs torch."""

from histosge.models.protocol import Model
from histosge.models.registry import ModelRecord


def _load() -> type[Model]:
    from histosge.models.block_attention import AttentionModel

    return AttentionModel


RECORD = ModelRecord(
    "attention",
    "dense, plus a transformer over blocks of tissue, kept only where held-out sections gain; needs 6 sections",
    _load,
)
