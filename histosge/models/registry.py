"""Which presets there are, and the class behind each name; loading one imports it and nothing else."""

from importlib import import_module

from histosge.errors import ModelError
from histosge.models.protocol import Model

_CLASSES = {
    "dense": ("histosge.models.presets.dense", "DenseModel"),
    "dense+attention": ("histosge.models.presets.dense_attention", "DenseAttentionModel"),
    "dense+spots": ("histosge.models.presets.dense_spots", "DenseSpotsModel"),
    "paper": ("histosge.models.presets.paper", "PaperModel"),
    "ridge": ("histosge.models.presets.ridge", "RidgeModel"),
    "gp": ("histosge.models.presets.gp", "GaussianProcessModel"),
    "knn": ("histosge.models.presets.knn", "NeighbourModel"),
    "mean": ("histosge.models.presets.mean", "MeanModel"),
}

PRESETS: tuple[str, ...] = tuple(_CLASSES)
DEFAULT_PRESET = "dense"


def load_preset(name: str) -> type[Model]:
    """Return the model class of a preset.

    Raises
    ------
    ModelError
        If there is no such preset; the message names those that there are.
    """
    if name not in _CLASSES:
        raise ModelError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    module, attribute = _CLASSES[name]
    preset: type[Model] = getattr(import_module(module), attribute)
    return preset
