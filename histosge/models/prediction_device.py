"""Where the products of a prediction are computed: one choice for a whole run, whatever model it is of.

On a GPU is what costs most: the projection of embeddings, which is one product, and the network of `attention`. Pooling,
the step to genes and writing stay on the CPU, and so do models that have neither.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from histosge.errors import ModelError

if TYPE_CHECKING:
    import torch

Values = NDArray[np.float32]

# The CPU is the default, unlike for training: its maps have the same bytes everywhere, and go on from each other.
_CHOSEN: ContextVar[str] = ContextVar("prediction_device", default="cpu")


@contextmanager
def prediction_device(name: str) -> Iterator[None]:
    """Project on this device within the context: ``auto`` (a GPU where there is one), ``cpu`` or ``cuda``.

    Raises
    ------
    EncoderError
        If the name is unknown, or CUDA is requested where torch sees none.
    """
    if name != "cpu":  # which is always possible, and needs no torch
        from featurestore.encoders.device import pick_device

        name = pick_device(name).type
    token = _CHOSEN.set(name)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def chosen_device_name() -> str:
    """Return what was chosen for this thread: ``cpu`` or ``cuda``."""
    return _CHOSEN.get()


def project(values: Values, weight: Values) -> Values:
    """Return the product ``(n, dim) @ (dim, k)``, on the device that was chosen for this thread.

    Raises
    ------
    ModelError
        If the GPU has too little free memory.
    """
    name = _CHOSEN.get()
    if name == "cpu":
        return np.asarray(values @ weight)
    import torch

    return multiply_on(torch.device(name), values, weight)


def multiply_on(device: "torch.device", values: Values, weight: Values) -> Values:
    """Return a product that torch computes on a device, ``(n, k)``."""
    import torch

    try:
        with torch.inference_mode():
            on_device = (torch.tensor(array, device=device) for array in (values, weight))
            product = torch.matmul(*on_device)
            return np.asarray(product.cpu().numpy())
    except torch.cuda.OutOfMemoryError as error:
        raise ModelError(
            f"the GPU has too little free memory to project {len(values)} patches of {values.shape[1]} numbers; "
            "use --device cpu, or free the GPU"
        ) from error
