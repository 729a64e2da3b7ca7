"""The preset `triplex`: declared apart from its model, whose module needs torch."""

from histosge.models.protocol import Model
from histosge.models.registry import ModelRecord


def _load() -> type[Model]:
    from histosge.models.triplex import TriplexModel

    return TriplexModel


RECORD = ModelRecord(
    "triplex",
    "multi-resolution transformer over patch, neighbourhood and slide (after Chung et al. 2024)",
    _load,
)
