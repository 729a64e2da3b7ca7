"""An encoder's network without its weights: built from its record, and compared with the record."""

from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from featurestore.encoders.records import EncoderRecord, Projection
from featurestore.encoders.timm_import import import_timm
from featurestore.errors import EncoderError


class ConvStem(nn.Module):
    """The patch embedding of CTransPath: two strided convolutions and a projection, in place of one 4 x 4 patch.

    Source: Wang et al., Medical Image Analysis 2022. Output ``(n, height / 4, width / 4, embed_dim)``.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        norm_layer: type[nn.Module] | None = None,
        **unused: Any,  # timm passes `flatten`, `bias`, ... to whatever embeds the patches
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.img_size, self.patch_size = (height, width), (patch_size, patch_size)
        self.grid_size = (height // patch_size, width // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        # Two strides of 2 and 1/8, 1/4 of the width: as published, or its weights would not fit.
        widths = (in_chans, embed_dim // 8, embed_dim // 4)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
        self.proj = nn.Sequential(*layers, nn.Conv2d(widths[-1], embed_dim, 1))
        self.norm = norm_layer(embed_dim) if norm_layer is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Embed a batch of images, channels first."""
        found: Tensor = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return found


class ProjectionHead(nn.Sequential):
    """The linear layers behind an image tower, ``(n, width)`` -> ``(n, widths[-1])``, float32."""

    def __init__(self, width: int, how: Projection) -> None:
        layers: list[nn.Module] = []
        for before, after in pairwise((width, *how.widths)):
            layers += [nn.GELU()] if layers else []
            layers.append(nn.Linear(before, after, bias=how.bias))
        super().__init__(*layers)
        self._normalised = how.normalised

    def forward(self, vectors: Tensor) -> Tensor:
        """Project a batch of vectors."""
        # In float32: a length in half precision loses digits.
        found: Tensor = super().forward(vectors).float()  # type: ignore[no-untyped-call]
        return normalize(found, dim=-1) if self._normalised else found


def _arguments(record: EncoderRecord) -> dict[str, Any]:
    """Return timm's arguments, with the classes that the record names."""
    layers: Any = import_module("timm.layers")
    classes: dict[str, Any] = {
        "SwiGLUPacked": layers.SwiGLUPacked,
        "SiLU": nn.SiLU,
        "ConvStem": ConvStem,
    }
    found: dict[str, Any] = {
        name: classes.get(value, value) if isinstance(value, str) else value
        for name, value in record.arguments.items()
    }
    # A record is TOML and cannot hold a class with an argument.
    if "norm_eps" in found:
        found["norm_layer"] = partial(nn.LayerNorm, eps=found.pop("norm_eps"))
    return found


def build(record: EncoderRecord) -> Any:
    """Build the network with random weights, without a classifier, on the device of the moment.

    A projection becomes its member ``projection``, so that a file has to fill it like any other part.
    """
    timm = import_timm()
    model = timm.create_model(record.architecture, pretrained=False, num_classes=0, **_arguments(record))
    if record.projection is not None:
        model.projection = ProjectionHead(model.num_features, record.projection)
    return model


def check_against(record: EncoderRecord, model: Any) -> None:
    """Compare the network that was built with its record.

    Raises
    ------
    EncoderError
        If parameters, prefix tokens or width differ; both values are shown.
    """
    # Before the weights are loaded: timm's defaults change between versions, and weights may fit another network.
    built = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "prefix tokens": getattr(model, "num_prefix_tokens", None),
        "dim": _width(record, model),
    }
    recorded = {
        "parameters": record.parameters,
        "prefix tokens": record.prefix_tokens,
        "dim": record.dim,
    }
    for name, value in recorded.items():
        if value is not None and value != built[name]:
            raise EncoderError(
                f"{record.key}: the record says {name} = {value}, the network that was built has {built[name]}; "
                "the installed timm builds another network than the record means"
            )


def _width(record: EncoderRecord, model: Any) -> int:
    """Return how many numbers a vector has."""
    if record.pooling == "projection":
        return int(model.projection[-1].out_features)
    return int(model.num_features) * (2 if record.pooling == "cls+mean" else 1)


def check_config(record: EncoderRecord, config: dict[str, Any]) -> None:
    """Compare the record's mean and std with the config beside the weights.

    Raises
    ------
    EncoderError
        If they differ and `config_norm` does not explain it; both are shown.
    """
    published = config.get("pretrained_cfg", config)
    how = record.preprocessing
    # Repositories often keep a default that nobody set, so the record's source is the authors' own code.
    for name, recorded in (("mean", how.mean), ("std", how.std)):
        found = published.get(name, published.get(f"image_{name}"))
        if not isinstance(found, list):
            continue
        known = () if record.config_norm is None else record.config_norm[name == "std"]
        if not (_nearly_equal(found, recorded) or _nearly_equal(found, known)):
            raise EncoderError(
                f"{record.key}: the record says {name} = {list(recorded)}, the config beside its weights says {found}; "
                "find out which is right before embedding anything (--weights FILE uses the record's)"
            )


def _nearly_equal(one: list[float], other: tuple[float, ...]) -> bool:
    return len(one) == len(other) and all(abs(a - b) < 1e-4 for a, b in zip(one, other, strict=True))


@torch.no_grad()
def pool(model: Any, images: Tensor, pooling: str, prefix_tokens: int | None) -> Tensor:
    """Run the network and make one vector of each image, float32.

    Parameters
    ----------
    pooling
        One of `POOLED_TOKENS`, see `pool_tokens`; anything else: the network's own.
    prefix_tokens
        Tokens that are no patches.
    """
    if pooling not in POOLED_TOKENS:
        found: Tensor = model(images)
        return found.float()
    return pool_tokens(model, model.forward_features(images), pooling, prefix_tokens)


POOLED_TOKENS = ("cls", "cls+mean", "projection")
"""Poolings that are done here, of what timm's ``forward_features`` gives."""


def pool_tokens(model: Any, tokens: Tensor, pooling: str, prefix_tokens: int | None) -> Tensor:
    """Make one vector of each image's tokens ``(n, tokens, width)``, float32.

    ``cls``: the class token; ``cls+mean``: it and the mean of the patch tokens; ``projection``: the class token, through
    the projection behind the tower.
    """
    # In float32: a mean of hundreds of tokens in half precision loses digits.
    first = tokens[:, 0].float()
    if pooling == "projection":
        projected: Tensor = model.projection(first)
        return projected
    if pooling == "cls":
        return first
    return torch.cat([first, tokens[:, prefix_tokens:].float().mean(1)], dim=-1)
