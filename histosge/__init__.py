"""Embeddings in, expression out. Knows nothing of slide file formats.

Importing this loads neither torch nor dask: what is named below is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from histosge.evaluation import evaluate as evaluate
    from histosge.exporting.export import export as export
    from histosge.loader import Loader as Loader
    from histosge.loader import LoadSettings as LoadSettings
    from histosge.loader import stream_batches as stream_batches
    from histosge.prediction import predict as predict
    from histosge.saved import load_model as load_model
    from histosge.training import TrainSettings as TrainSettings
    from histosge.training import train as train

_HOMES = {
    "LoadSettings": "loader",
    "Loader": "loader",
    "TrainSettings": "training",
    "evaluate": "evaluation",
    "export": "exporting.export",
    "load_model": "saved",
    "predict": "prediction",
    "stream_batches": "loader",
    "train": "training",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'histosge' has no attribute {name!r}")
    return getattr(import_module(f"histosge.{_HOMES[name]}"), name)
