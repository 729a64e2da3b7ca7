"""Which device an encoder computes on: one rule for all encoders.

It changes no torch setting and starts no device: it only decides.
"""

import torch

from featurestore.errors import EncoderError

DEVICES = ("auto", "cpu", "cuda")


def pick_device(name: str) -> torch.device:
    """Choose the device that `EncoderOptions.device` names.

    Parameters
    ----------
    name
        ``cpu``, ``cuda``, or ``auto``: CUDA where there is one, else the CPU.

    Raises
    ------
    EncoderError
        If the name is unknown, or CUDA is requested where torch sees none.
    """
    if name not in DEVICES:
        raise EncoderError(f"unknown device {name!r}: use one of {', '.join(DEVICES)}")
    if name == "cpu":
        return torch.device("cpu")
    # `is_available` starts no CUDA context, which would take memory on a shared GPU.
    if torch.cuda.is_available():
        return torch.device("cuda")
    # Falling back silently would turn hours into weeks.
    if name == "cuda":
        raise EncoderError(
            f"device 'cuda' was asked for, but torch {torch.__version__} sees 0 CUDA devices: use auto or cpu"
        )
    return torch.device("cpu")
