"""The preset `paper`: declared apart from its model, whose module needs torch."""

from histosge.models.protocol import Model
from histosge.models.registry import ModelRecord


def _load() -> type[Model]:
    from histosge.models.paper import PaperModel

    return PaperModel


RECORD = ModelRecord("paper", "the published HisToSGE network, trained for 100 epochs", _load)
