"""State arrays of a model's parts: kept under names with a prefix, and checked when they are taken from a file."""

from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from featurestore.documents import convert
from histosge.errors import ModelError
from histosge.models.protocol import State

T = TypeVar("T")


class KnownSlides(msgspec.Struct):
    """Configuration of a model that knows the slides that it was trained on."""

    slides: tuple[str, ...]


def nest(prefix: str, state: State) -> State:
    """Return arrays under ``prefix.name``."""
    return {f"{prefix}.{name}": array for name, array in state.items()}


def unnest(prefix: str, state: State) -> State:
    """Return the arrays of a prefix under their own names; empty where there are none."""
    return {
        name.removeprefix(f"{prefix}."): array
        for name, array in state.items()
        if name.startswith(f"{prefix}.")
    }


def take(state: State, name: str, *shape: int | None) -> NDArray[Any]:
    """Return an array of a saved state, after its shape was compared.

    Without that a row of length 1 would be broadcast over all genes, and predict without an error.

    Parameters
    ----------
    shape
        That it must have; None for a length that is not known before.

    Raises
    ------
    ModelError
        If there is no such array, or it has another shape or no numbers.
    """
    if name not in state:
        raise ModelError(f"tensor {name!r} is missing")
    array = state[name]
    fits = array.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, array.shape, strict=True))
    if not fits:
        expected = ", ".join("any" if n is None else str(n) for n in shape)
        raise ModelError(f"tensor {name!r} has shape {array.shape}, and should have ({expected})")
    if array.dtype.kind not in "fiu":
        raise ModelError(f"tensor {name!r} is {array.dtype}, and should hold numbers")
    return np.asarray(array)


def read_config(config: Any, schema: type[T]) -> T:
    """Return a model's configuration as its schema's type; entries that the schema does not name are left out.

    Raises
    ------
    DocumentError
        Naming the entry and its value.
    """
    return convert(config, schema, "the configuration", at="model")
