"""The extension point "model": which presets there are, and the class behind each name.

A preset is one module of `histosge.models.presets`, or of another package that offers it as an entry point of the
group ``histosge.models``; each declares one `ModelRecord`. What a model can do is not repeated here: it is read from
its class, see `histosge.models.protocol.capabilities`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from featurestore.extensions import Registry
from histosge.errors import ModelError
from histosge.models.protocol import Model

DEFAULT_PRESET = "dense"


@dataclass(frozen=True)
class ModelRecord:
    """A model that ``--preset`` and ``--presets`` know by name.

    Parameters
    ----------
    name
        What a user types; it stands in the card of saved models, so it must not change.
    help
        One line for help and documentation.
    load
        Returns the class, and imports what it needs only then.
    """

    name: str
    help: str
    # A function, so that listing presets imports no torch.
    load: Callable[[], type[Model]]


MODELS = Registry("models", "histosge.models.presets", ModelRecord, ModelError)


def load_preset(name: str) -> type[Model]:
    """Return the model class of a registered name.

    Raises
    ------
    ModelError
        If there is no such preset; the message gives the nearest names.
    """
    # Asked first for a message of our own: `get` speaks of a registry, users of presets.
    if name not in MODELS.names():
        raise ModelError(f"unknown preset {name!r}: {MODELS.suggest(name)}")
    return MODELS.get(name).load()


def offered_by(name: str) -> tuple[str, str] | None:
    """Return name and version of the package that offers a preset; None for ours, and for what is not registered."""
    point = MODELS.offered.get(name)
    return None if point is None or point.dist is None else (point.dist.name, point.dist.version)


def __getattr__(name: str) -> tuple[str, ...]:
    # PRESETS is made when it is asked for: the modules that declare records import this one.
    if name == "PRESETS":
        return tuple(MODELS.own)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
