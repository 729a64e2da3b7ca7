"""A vision transformer written a second time: from the papers and a record's published figures, in torch's functions.

timm builds the product's networks, so timm cannot be what they are compared with. Tensors have the names of the
published files, which are timm's.

Sources: Dosovitskiy et al. 2021 (the network), Touvron et al. 2021 (layer scale), Shazeer 2020 (SwiGLU), Darcet et al.
2024 (registers).
"""

from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear, scaled_dot_product_attention, silu

from featurestore.encoders.records import PublishedConfig

Shapes = dict[str, tuple[int, ...]]


def tensor_shapes(config: PublishedConfig, depth: int) -> Shapes:
    """Return names and shapes of the tensors in a file of this network with `depth` blocks."""
    width, patch = config.width, config.patch_px
    shapes: Shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, config.positions, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        **_affine("norm", width),
    }
    if config.registers:
        shapes["reg_token"] = (1, config.registers, width)
    for i in range(depth):
        block = f"blocks.{i}"
        shapes |= _affine(f"{block}.norm1", width) | _affine(f"{block}.norm2", width)
        shapes |= _matrix(f"{block}.attn.qkv", width, 3 * width) | _matrix(f"{block}.attn.proj", width, width)
        shapes |= _matrix(f"{block}.mlp.fc1", width, config.mlp)
        shapes |= _matrix(f"{block}.mlp.fc2", config.mlp // 2 if config.swiglu else config.mlp, width)
        if config.layer_scale:
            shapes |= {f"{block}.ls1.gamma": (width,), f"{block}.ls2.gamma": (width,)}
    return shapes


def _affine(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _matrix(name: str, before: int, after: int) -> Shapes:
    return {f"{name}.weight": (after, before), f"{name}.bias": (after,)}


def tokens(config: PublishedConfig, state: dict[str, Tensor], images: Tensor) -> Tensor:
    """Run the network, and return its normalised tokens: class, registers, patches.

    Parameters
    ----------
    config
        Of the network.
    state
        Its tensors; the number of blocks is what is there.
    images
        Normalised, ``(n, 3, side, side)``.
    """
    x = conv2d(
        images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=config.patch_px
    )
    patches = x.flatten(2).transpose(1, 2)
    count = len(images)
    prefix = state["cls_token"].expand(count, -1, -1)
    registers = state["reg_token"].expand(count, -1, -1) if config.registers else prefix[:, :0]
    # Which of the prefix tokens have a position is a choice of each network: none, the class token, or all.
    positioned = config.positions - isqrt(config.positions) ** 2
    table = _positions(state["pos_embed"], patches.shape[1], positioned)
    if positioned <= 1:
        prefix, patches = prefix + table[:, :positioned].sum(1), patches + table[:, positioned:]
        x = torch.cat([prefix, registers, patches], dim=1)
    else:
        x = torch.cat([prefix, registers, patches], dim=1) + table
    depth = sum(name.endswith(".attn.qkv.weight") for name in state)
    for i in range(depth):
        x = x + _scaled(state, f"blocks.{i}.ls1.gamma", _attention(config, state, f"blocks.{i}", x))
        x = x + _scaled(state, f"blocks.{i}.ls2.gamma", _mlp(config, state, f"blocks.{i}", x))
    return _norm(config, state, "norm", x)


def _positions(table: Tensor, patches: int, prefix: int) -> Tensor:
    if table.shape[1] - prefix == patches:
        return table
    # The authors run timm with `dynamic_img_size`, so its function is the definition here.
    from timm.layers.pos_embed import resample_abs_pos_embed

    side = isqrt(patches)
    resampled: Tensor = resample_abs_pos_embed(table, [side, side], num_prefix_tokens=prefix)
    return resampled


def _norm(config: PublishedConfig, state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return layer_norm(x, (config.width,), state[f"{name}.weight"], state[f"{name}.bias"], config.eps)


def _linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _scaled(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x * state[name] if name in state else x


def _attention(config: PublishedConfig, state: dict[str, Tensor], block: str, x: Tensor) -> Tensor:
    normed = _norm(config, state, f"{block}.norm1", x)
    images, length, width = normed.shape
    heads = (images, length, config.heads, width // config.heads)
    query, key, value = (
        part.reshape(heads).transpose(1, 2)
        for part in _linear(state, f"{block}.attn.qkv", normed).chunk(3, dim=-1)
    )
    mixed = scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(images, length, width)
    return _linear(state, f"{block}.attn.proj", mixed)


def _mlp(config: PublishedConfig, state: dict[str, Tensor], block: str, x: Tensor) -> Tensor:
    inner = _linear(state, f"{block}.mlp.fc1", _norm(config, state, f"{block}.norm2", x))
    if config.swiglu:
        gate, content = inner.chunk(2, dim=-1)
        inner = silu(gate) * content
    else:
        inner = gelu(inner)
    return _linear(state, f"{block}.mlp.fc2", inner)
