"""Embeddings in, expression out. Knows nothing of slide file formats.

Importing this loads neither torch nor dask: what is named below is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from histosge.data.load_settings import LoadSettings as LoadSettings
    from histosge.data.loader import Loader as Loader
    from histosge.data.loader import stream_batches as stream_batches
    from histosge.data.spot_targets import SpotTargets as SpotTargets
    from histosge.evaluation.evaluate import evaluate as evaluate
    from histosge.exporting.export import export as export
    from histosge.prediction.predict import predict as predict
    from histosge.training.saved_model import load_model as load_model
    from histosge.training.train import TrainSettings as TrainSettings
    from histosge.training.train import train as train

_HOMES = {
    "LoadSettings": "data.load_settings",
    "Loader": "data.loader",
    "SpotTargets": "data.spot_targets",
    "TrainSettings": "training.train",
    "evaluate": "evaluation.evaluate",
    "export": "exporting.export",
    "load_model": "training.saved_model",
    "predict": "prediction.predict",
    "stream_batches": "data.loader",
    "train": "training.train",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'histosge' has no attribute {name!r}")
    return getattr(import_module(f"histosge.{_HOMES[name]}"), name)
