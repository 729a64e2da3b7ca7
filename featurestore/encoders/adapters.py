"""Low-rank changes of a network's matrices (LoRA, Hu et al. 2021), as the package peft writes them, added to its weights.

An adapter is two files of one folder: ``adapter_config.json`` and ``adapter_model.safetensors``. Only what changes
matrices by ``scale * B @ A`` is taken; anything else that peft can write is refused, not left out.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from featurestore.encoders.state_layouts import State
from featurestore.encoders.weights import file_sha256, read_state
from featurestore.errors import EncoderError, first_line

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
WRAPPER = "base_model.model."
"""Put before the names of the base's tensors by peft."""
UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "layer_replication",
)
"""Settings that change more than ``scale * B @ A`` says, or say it otherwise."""


@dataclass(frozen=True)
class Adapter:
    """A low-rank change of some matrices.

    Parameters
    ----------
    path
        Of its tensors, for messages.
    factors
        Name of a matrix without ``.weight`` -> ``A (rank, inputs)`` and ``B (outputs, rank)``.
    scale
        Of all products.
    sha256
        Of the file of tensors.
    """

    path: Path
    factors: dict[str, tuple[Tensor, Tensor]]
    scale: float
    sha256: str

    @property
    def fact(self) -> str:
        """What enters an encoder's identity: the tensors and their scale, not their names."""
        return f"adapter sha256 {self.sha256} scale {self.scale:g}"

    def apply(self, raw: State) -> State:
        """Return the tensors of a base's file with the change added.

        Raises
        ------
        EncoderError
            If the base lacks a matrix that the adapter changes, or has another shape of it.
        """
        changed = dict(raw)
        for name, (down, up) in self.factors.items():
            full = f"{name}.weight"
            matrix = raw.get(full)
            shape = (up.shape[0], down.shape[1])
            if matrix is None or tuple(matrix.shape) != shape:
                found = "absent" if matrix is None else tuple(matrix.shape)
                raise EncoderError(
                    f"{self.path.name} does not fit its base: it changes {full} of shape {shape}, which is {found} there"
                )
            # In float32, then back: a sum in half precision would lose a small change.
            changed[full] = (matrix.float() + self.scale * up.float() @ down.float()).to(matrix.dtype)
        return changed


def adapter_folder(path: Path) -> Path | None:
    """Return the folder of an adapter, where a path is one or its file of tensors; None for other weights."""
    folder = path.parent if path.name == TENSORS else path
    return folder if (folder / CONFIG).is_file() else None


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter.

    Raises
    ------
    EncoderError
        If it cannot be read, or is more than a low-rank change.
    """
    config = _config(folder / CONFIG)
    path = folder / TENSORS
    tensors = read_state(path)
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        matrix, _, kind = name.removeprefix(WRAPPER).rpartition(".lora_")
        if not matrix or kind not in ("A.weight", "B.weight") or tensor.ndim != 2:
            raise EncoderError(
                f"{path.name} holds {name} of shape {tuple(tensor.shape)}, which is no part of a low-rank change; merge "
                "the adapter with peft and give the merged weights"
            )
        pairs.setdefault(matrix, {})[kind[0]] = tensor
    single = [name for name, pair in pairs.items() if pair.keys() != {"A", "B"}]
    if single or not pairs:
        raise EncoderError(f"{path.name} lacks a factor of {single[0] if single else 'any matrix'}")
    rank, alpha = config["r"], config["lora_alpha"]
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Adapter(
        path, {name: (pair["A"], pair["B"]) for name, pair in pairs.items()}, scale, file_sha256(path)
    )


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise EncoderError(f"{path} cannot be read: {first_line(error)}") from error
    if (
        not isinstance(config, dict)
        or config.get("peft_type") != "LORA"
        or config.get("bias", "none") != "none"
    ):
        raise EncoderError(
            f"{path} describes no LoRA without biases; merge the adapter with peft and give the merged weights"
        )
    used = [name for name in UNSUPPORTED if config.get(name)]
    if used:
        raise EncoderError(
            f"{path} uses {used[0]}, which is not supported; merge the adapter with peft and give the merged weights"
        )
    if not all(
        isinstance(config.get(name), int | float) and config[name] > 0 for name in ("r", "lora_alpha")
    ):
        raise EncoderError(f"{path} lacks a positive r or lora_alpha")
    return config
