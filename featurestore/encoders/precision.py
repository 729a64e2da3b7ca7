"""In which arithmetic a network runs: one rule, given the device, the user's wish and the authors' advice.

The arithmetic is part of an encoder's identity: vectors in bf16 and in fp32 are close, and not the same.
"""

from contextlib import AbstractContextManager, nullcontext

import torch

from featurestore.errors import EncoderError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware; in software it is slower than fp32."""
    cpu = torch.cpu  # private functions: torch 2.13 has no public ones that tell
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


def device_dtypes(device: torch.device) -> tuple[str, ...]:
    """Return the precisions that a device computes fast, the exact one first."""
    # fp16 has no place on a CPU: it is emulated there, and far slower than fp32.
    if device.type == "cpu":
        return ("fp32", "bf16") if cpu_has_bf16() else ("fp32",)
    return ("fp32", "fp16", "bf16") if torch.cuda.is_bf16_supported() else ("fp32", "fp16")


def pick_precision(wanted: str, advised: str, device: torch.device) -> str:
    """Choose the arithmetic.

    Parameters
    ----------
    wanted
        ``auto``, ``fp32``, ``fp16`` or ``bf16``.
    advised
        By the encoder's authors. ``auto`` follows them where the device can; a CPU takes bf16 for either half.
    device
        Where the network runs.

    Raises
    ------
    EncoderError
        If the device does not support the one that is wanted.
    """
    supported = device_dtypes(device)
    if wanted == "auto":
        if advised == "fp32":
            return "fp32"
        half = "bf16" if device.type == "cpu" else advised
        return half if half in supported else "fp32"
    if wanted not in supported:
        raise EncoderError(
            f"{wanted!r} cannot be used on this {device.type}: choose {' or '.join(supported)}"
        )
    return wanted


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return the context in which the network runs."""
    # Not `model.half()`: autocast keeps norms and softmax in fp32.
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])
