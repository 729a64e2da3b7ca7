"""What every oracle needs: random tensors, a plain vision transformer in a file, and files as transformers writes them."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from featurestore.encoders.records import PublishedConfig
from featurestore.encoders.timm_import import define_torchvision_operators
from featurestore.encoders.verification.plain_vit import Shapes, tensor_shapes, tokens
from featurestore.errors import EncoderError

BLOCKS = 2
"""In a stand-in: the fewest in which a token's content reaches the class token through the patches."""

Oracle = tuple[Path, Shapes, int, Callable[[Tensor], Tensor]]
"""File, shapes, parameters and tokens of a `StandIn`."""


def random_state(shapes: Shapes) -> dict[str, Tensor]:
    """Return tensors of these names and shapes, filled by `fill`."""
    return {name: fill(name, torch.empty(shape)) for name, shape in shapes.items()}


def fill(name: str, tensor: Tensor) -> Tensor:
    """Return random numbers of a size that keeps signals near 1; nothing is zero, one, or the same twice."""
    if name.endswith("running_var"):
        return torch.rand(tensor.shape) + 0.5
    if tensor.ndim >= 2 and not any(part in name for part in ("token", "pos", "bias_table")):
        return torch.randn(tensor.shape) / math.sqrt(tensor[0].numel())
    # Norms' and scales' factors around 1, all else around 0.
    centre = (
        1.0 if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma", "lambda1")) else 0.0
    )
    filled: Tensor = torch.randn(tensor.shape) * 0.3 + centre
    return filled


def plain(config: PublishedConfig, folder: Path) -> Oracle:
    """Write a plain vision transformer in timm's names."""
    state = random_state(tensor_shapes(config, BLOCKS))
    save_file(state, folder / "stand-in.safetensors")
    whole = tensor_shapes(config, config.depth)
    parameters = sum(torch.Size(shape).numel() for shape in whole.values())
    return (folder / "stand-in.safetensors", whole, parameters, lambda images: tokens(config, state, images))


def deepened(state: dict[str, Tensor], depth: int, blocks: str = "layer") -> Shapes:
    """Return the shapes of a file with `depth` blocks, of which `state` has the first `BLOCKS`.

    `blocks` is what the file calls them: their names are ``....blocks.0....``.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    last = f".{blocks}.{BLOCKS - 1}."
    for i in range(BLOCKS, depth):
        shapes |= {
            name.replace(last, f".{blocks}.{i}."): shape
            for name, shape in list(shapes.items())
            if last in name
        }
    return shapes


@torch.no_grad()
def randomise(model: Any) -> None:
    """Fill a model's parameters by `fill`."""
    for name, parameter in model.named_parameters():
        parameter.copy_(fill(name, parameter))


def saved(module: Any, model: Any, folder: Path) -> Path:
    """Write a model as transformers does: in memory its tensors have other names than in a file."""
    progress = module.utils.logging
    shown = progress.is_progress_bar_enabled()
    progress.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            progress.enable_progress_bar()
    return folder / "model.safetensors"


def import_transformers() -> Any:
    """Return the module `transformers`.

    Raises
    ------
    EncoderError
        If it is not installed.
    """
    define_torchvision_operators()
    try:
        import transformers
    except ImportError as error:
        raise EncoderError(
            "comparing with the published classes needs transformers: pip install 'histosge[check]'"
        ) from error
    return transformers
