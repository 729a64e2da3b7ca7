"""The preset `bleep`: declared apart from its model, whose module needs torch."""

from histosge.models.protocol import Model
from histosge.models.registry import ModelRecord


def _load() -> type[Model]:
    from histosge.models.bleep import BleepModel

    return BleepModel


RECORD = ModelRecord(
    "bleep",
    "contrastive embedding of patches and expression, mean of the nearest training spots (Xie et al. 2023)",
    _load,
)
