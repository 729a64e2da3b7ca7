"""A network on the CPU by OpenVINO instead of torch: an option, faster at the same arithmetic.

Its vectors are those of torch up to the last bits (cosine above 0.9999), so the engine is part of the identity.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featurestore.errors import EncoderError, first_line

PRECISIONS = {"fp32": "f32", "bf16": "bf16"}


class _Traced(nn.Module):
    def __init__(self, model: nn.Module, network: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.network = model, network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


def compile_with_openvino(
    model: nn.Module, network: Callable[[Tensor], Tensor], input_px: int, precision: str
) -> Callable[[Tensor], Tensor]:
    """Compile a network for the CPU.

    Parameters
    ----------
    model
        Holds the weights that `network` uses.
    network
        Images ``(n, 3, input_px, input_px)`` -> vectors.
    input_px
        Side of an image.
    precision
        ``fp32`` or ``bf16``.

    Raises
    ------
    EncoderError
        If OpenVINO is not installed, or cannot convert the network.
    """
    try:
        import openvino
    except ImportError as error:
        raise EncoderError(
            "--engine openvino needs an extra package; install it with: pip install 'histosge[openvino]'"
        ) from error
    example = torch.zeros(2, 3, input_px, input_px)
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # tracing warns of every check of a shape
            converted: Any = openvino.convert_model(_Traced(model, network), example_input=example)
        # Traced with two patches; -1 frees that dimension, the others stay fixed, which OpenVINO uses.
        converted.reshape([-1, 3, input_px, input_px])
        settings = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
            # As many as torch would use: a worker among several has fewer than the machine.
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = openvino.Core().compile_model(converted, "CPU", settings)
    except RuntimeError as error:
        raise EncoderError(f"OpenVINO cannot run this network: {first_line(error)}") from error
    return lambda images: torch.from_numpy(np.array(compiled(images.contiguous().numpy())[0]))
