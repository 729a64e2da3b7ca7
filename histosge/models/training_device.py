"""Where networks are trained: one choice for a whole training, whatever model it is of.

It is not a setting of a model: the same model comes out on any device, up to rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_CHOSEN: ContextVar[str] = ContextVar("training_device", default="auto")


@contextmanager
def training_device(name: str) -> Iterator[None]:
    """Train on this device within the context: ``auto`` (a GPU where there is one), ``cpu`` or ``cuda``.

    Raises
    ------
    EncoderError
        If the name is unknown, or CUDA is requested where torch sees none.
    """
    if name != "auto":
        # Here, not at the first network: a cohort may be read for an hour before. `auto` is always possible, and needs no
        # torch, which models without a network do not load.
        from featurestore.encoders.device import pick_device

        pick_device(name)
    token = _CHOSEN.set(name)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def chosen_device() -> "torch.device":
    """Return where a network is to be trained."""
    from featurestore.encoders.device import pick_device

    return pick_device(_CHOSEN.get())
