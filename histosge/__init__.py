"""Embeddings in, expression out. Knows nothing of slide file formats.

Importing this loads neither torch nor dask: what is named below is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from histosge.data.expression.find_expression import find_expression as find_expression
    from histosge.data.expression.loaded_expression import SlideFrame as SlideFrame
    from histosge.data.genes import read_gene_list as read_gene_list
    from histosge.data.load_settings import LoadSettings as LoadSettings
    from histosge.data.loader import Loader as Loader
    from histosge.data.loader import stream_batches as stream_batches
    from histosge.data.section_loading import Selection as Selection
    from histosge.data.sections import Spots as Spots
    from histosge.data.spot_targets import SpotTargets as SpotTargets
    from histosge.evaluation.evaluate import EvaluateSettings as EvaluateSettings
    from histosge.evaluation.evaluate import evaluate as evaluate
    from histosge.exporting.export import export as export
    from histosge.prediction.predict import PredictSettings as PredictSettings
    from histosge.prediction.predict import predict as predict
    from histosge.training.saved_model import load_model as load_model
    from histosge.training.train import TrainSettings as TrainSettings
    from histosge.training.train import train as train

    __version__: str

_HOMES = {
    "EvaluateSettings": "evaluation.evaluate",
    "LoadSettings": "data.load_settings",
    "Loader": "data.loader",
    "PredictSettings": "prediction.predict",
    "Selection": "data.section_loading",
    "SlideFrame": "data.expression.loaded_expression",
    "SpotTargets": "data.spot_targets",
    "Spots": "data.sections",
    "TrainSettings": "training.train",
    "evaluate": "evaluation.evaluate",
    "export": "exporting.export",
    "find_expression": "data.expression.find_expression",
    "load_model": "training.saved_model",
    "predict": "prediction.predict",
    "read_gene_list": "data.genes",
    "stream_batches": "data.loader",
    "train": "training.train",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        # Read when it is asked for: looking through the installed packages takes longer than this import.
        from featurestore.software import version

        return version("histosge")
    if name not in _HOMES:
        raise AttributeError(f"module 'histosge' has no attribute {name!r}")
    return getattr(import_module(f"histosge.{_HOMES[name]}"), name)
