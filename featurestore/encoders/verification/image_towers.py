"""Stand-ins of the image towers of image-text models: with the projection, and beside a text tower, as they are published.

Of the text tower there are a few names: what has to be left out is decided by the beginnings of names alone.

Sources of the names: transformers' CLIP, open_clip's VisionTransformer and TimmModel, the code of KEEP's authors.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import gelu, linear, normalize

from featurestore.encoders.records import PublishedConfig
from featurestore.encoders.uninitialised import without_initialisation
from featurestore.encoders.verification.plain_vit import Shapes, tokens
from featurestore.encoders.verification.stand_in_files import (
    BLOCKS,
    Oracle,
    deepened,
    import_transformers,
    plain,
    random_state,
    randomise,
    saved,
)

TRANSFORMERS_TEXT: Shapes = {
    "text_model.embeddings.token_embedding.weight": (11, 5),
    "text_model.encoder.layers.0.self_attn.q_proj.weight": (5, 5),
    "text_model.final_layer_norm.weight": (5,),
    "text_projection.weight": (7, 5),
    "logit_scale": (),
    "vision_model.embeddings.position_ids": (1, 3),
}
OPEN_CLIP_TEXT: Shapes = {
    "positional_embedding": (3, 5),
    "text_projection": (5, 7),
    "logit_scale": (),
    "transformer.resblocks.0.attn.in_proj_weight": (15, 5),
    "token_embedding.weight": (11, 5),
    "ln_final.weight": (5,),
}
CUSTOM_TEXT: Shapes = {
    "text.transformer.embeddings.word_embeddings.weight": (11, 5),
    "text.proj.0.weight": (7, 5),
    "logit_scale": (),
}
"""Of open_clip around a text tower of transformers; KEEP's has the same beginnings."""


def clip(config: PublishedConfig, folder: Path) -> Oracle:
    """Write transformers' CLIP image tower, in its own names."""
    model, state, parameters = _transformers_clip(config, folder)
    path = folder / "pytorch_model.bin"
    torch.save(state | random_state(TRANSFORMERS_TEXT), path)
    return path, deepened(state, config.depth, "layers"), parameters, lambda x: _image_vectors(model, x)


def clip_in_names_of_open_clip(config: PublishedConfig, folder: Path) -> Oracle:
    """Write transformers' CLIP image tower in the names of open_clip, which are those of OpenAI's code."""
    model, theirs, parameters = _transformers_clip(config, folder)
    state = _open_clip_state(theirs)
    path = folder / "open_clip_pytorch_model.bin"
    torch.save(state | random_state(OPEN_CLIP_TEXT), path)
    return path, deepened(state, config.depth, "resblocks"), parameters, lambda x: _image_vectors(model, x)


def _transformers_clip(config: PublishedConfig, folder: Path) -> tuple[Any, dict[str, Tensor], int]:
    """Return a model with `BLOCKS` blocks, the tensors that it writes, and the parameters of the whole."""
    module = import_transformers()
    settings = {
        "hidden_size": config.width,
        "intermediate_size": config.mlp,
        "num_attention_heads": config.heads,
        "image_size": config.image_px,
        "patch_size": config.patch_px,
        "hidden_act": config.activation,
        "layer_norm_eps": config.eps,
        "projection_dim": config.projection[-1],
    }

    def build(depth: int) -> Any:
        return module.CLIPVisionModelWithProjection(
            module.CLIPVisionConfig(**settings, num_hidden_layers=depth)
        )

    model = build(BLOCKS).eval()
    randomise(model)
    with torch.device("meta"), without_initialisation():
        parameters = sum(parameter.numel() for parameter in build(config.depth).parameters())
    return model, load_file(saved(module, model, folder)), parameters


def _image_vectors(model: Any, images: Tensor) -> Tensor:
    vectors: Tensor = model(pixel_values=images).image_embeds
    return vectors[:, None]


def _open_clip_state(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.embeddings.patch_embedding": "visual.conv1",
        "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
        "vision_model.encoder.layers": "visual.transformer.resblocks",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn": "attn",
    }
    state: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        ours = name
        for old, new in renamed.items():
            ours = ours.replace(old, new)
        state[ours] = tensor
    state["visual.proj"] = state.pop("visual_projection.weight").T.contiguous()
    for block in range(BLOCKS):
        attention = f"visual.transformer.resblocks.{block}.attn"
        for kind in ("weight", "bias"):
            parts = [state.pop(f"{attention}.{part}_proj.{kind}") for part in "qkv"]
            state[f"{attention}.in_proj_{kind}"] = torch.cat(parts)
    return state


def open_clip_trunk(config: PublishedConfig, folder: Path) -> Oracle:
    """Write the plain network as open_clip keeps a network of timm: a trunk and a matrix without bias."""
    trunk, shapes, parameters, tower = _plain_tower(config, folder)
    projection: Shapes = {"visual.head.proj.weight": (config.projection[0], config.width)}
    head = random_state(projection)
    state = {f"visual.trunk.{name}": tensor for name, tensor in trunk.items()} | head
    path = folder / "open_clip_pytorch_model.bin"
    torch.save(state | random_state(CUSTOM_TEXT), path)
    whole = {f"visual.trunk.{name}": shape for name, shape in shapes.items()} | projection
    return (
        path,
        whole,
        parameters + _count(projection),
        lambda x: linear(tower(x), head["visual.head.proj.weight"]),
    )


def keep(config: PublishedConfig, folder: Path) -> Oracle:
    """Write the plain network as KEEP's authors do: layer scales called weight, and two layers behind the tower."""
    trunk, shapes, parameters, tower = _plain_tower(config, folder)
    hidden, last = config.projection
    projection: Shapes = {
        "visual_head.0.weight": (hidden, config.width),
        "visual_head.0.bias": (hidden,),
        "visual_head.2.weight": (last, hidden),
        "visual_head.2.bias": (last,),
    }
    head = random_state(projection)

    def named(name: str) -> str:
        return f"visual.{name.replace('.gamma', '.weight')}"

    state = {named(name): tensor for name, tensor in trunk.items()} | head
    path = folder / "model.safetensors"
    save_file(state | random_state(CUSTOM_TEXT), path)
    whole = {named(name): shape for name, shape in shapes.items()} | projection

    def vectors(images: Tensor) -> Tensor:
        inner = gelu(linear(tower(images), head["visual_head.0.weight"], head["visual_head.0.bias"]))
        return normalize(linear(inner, head["visual_head.2.weight"], head["visual_head.2.bias"]), dim=-1)

    return path, whole, parameters + _count(projection), vectors


def _plain_tower(config: PublishedConfig, folder: Path) -> tuple[dict[str, Tensor], Shapes, int, Any]:
    """Return the plain network's tensors, its shapes and parameters at full depth, and what gives its class token."""
    path, shapes, parameters, _ = plain(config, folder)
    state = load_file(path)
    path.unlink()
    return state, shapes, parameters, lambda images: tokens(config, state, images)[:, :1]


def _count(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())
