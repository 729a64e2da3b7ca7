"""Stand-in files of published networks, and what another implementation makes of an image with them.

A stand-in has the names, shapes and widths of the published file, few blocks and random numbers everywhere, so that
no tensor could be left out or exchanged without a change of the vectors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, relu

from featurestore.encoders.records import EncoderRecord, Preprocessing, PublishedConfig
from featurestore.encoders.uninitialised import without_initialisation
from featurestore.encoders.verification.image_towers import (
    clip,
    clip_in_names_of_open_clip,
    keep,
    open_clip_trunk,
)
from featurestore.encoders.verification.plain_vit import Shapes
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
from featurestore.errors import EncoderError

SEED = 5


@dataclass(frozen=True)
class StandIn:
    """A file of a published network with `BLOCKS` blocks, and the other implementation with the same tensors.

    Parameters
    ----------
    path
        The file.
    shapes
        Names and shapes of the published file at full depth.
    parameters
        Of the published network at full depth, counted by the other implementation.
    tokens
        Normalised images -> normalised tokens, those that are no patches first; for a network without a class token,
        and for an image tower with its projection, one vector an image, ``(n, 1, width)``.
    preprocessing
        The published transform.
    """

    path: Path
    shapes: Shapes
    parameters: int
    tokens: Callable[[Tensor], Tensor]
    preprocessing: Preprocessing


def make_stand_in(record: EncoderRecord, folder: Path) -> StandIn:
    """Write a stand-in of a record's published network, by its oracle.

    Raises
    ------
    EncoderError
        If the oracle is a class of transformers, which is not installed.
    """
    if record.config is None or not record.oracle:
        raise EncoderError(f"{record.key} has no other implementation at hand")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        found = ORACLES[record.oracle](record.config, folder)
    return StandIn(*found, record.preprocessing)


def _dinov2(config: PublishedConfig, folder: Path) -> Oracle:
    """Write the plain network in the names of DINOv2's own code, as its training writes them."""
    _, shapes, parameters, run = plain(config, folder)
    state = load_file(folder / "stand-in.safetensors")
    path = folder / "dinov2.safetensors"
    save_file(
        {_dinov2_name(name): tensor for name, tensor in state.items()} | {"mask_token": torch.zeros(1, 7)},
        path,
    )
    return (path, {_dinov2_name(name): shape for name, shape in shapes.items()}, parameters, run)


CHUNKS = 4
"""Of OpenPath's training, in which each holds a quarter of the blocks."""


def _dinov2_chunks(config: PublishedConfig, folder: Path) -> Oracle:
    """Write the file as training leaves it: the teacher beside its heads, blocks in chunks, names below a backbone."""
    path, shapes, parameters, run = _dinov2(config, folder)

    def chunked(name: str) -> str:
        first, _, rest = name.partition(".")
        block = rest.partition(".")[0]
        chunk = f"{int(block) // (config.depth // CHUNKS)}." if first == "blocks" else ""
        return f"backbone.{first}.{chunk}{rest}" if rest else f"backbone.{name}"

    teacher = {chunked(name): tensor for name, tensor in load_file(path).items()}
    torch.save({"teacher": teacher | {"dino_head.mlp.0.weight": torch.zeros(1)}}, folder / "teacher.pth")
    return (folder / "teacher.pth", {chunked(name): shape for name, shape in shapes.items()}, parameters, run)


def _dinov2_name(name: str) -> str:
    for timm, theirs in (("mlp.fc1", "mlp.w12"), ("mlp.fc2", "mlp.w3"), ("reg_token", "register_tokens")):
        name = name.replace(timm, theirs)
    return name


def _transformers(name: str) -> Callable[[PublishedConfig, Path], Oracle]:
    def make(config: PublishedConfig, folder: Path) -> Oracle:
        module = import_transformers()
        settings = _settings(name, config)
        options = {"add_pooling_layer": False} if name == "ViTModel" else {}
        settings_class, model_class = getattr(module, name.replace("Model", "Config")), getattr(module, name)
        model = model_class(settings_class(**settings, num_hidden_layers=BLOCKS), **options).eval()
        randomise(model)
        path = saved(module, model, folder)
        with torch.device("meta"), without_initialisation():
            whole = model_class(settings_class(**settings, num_hidden_layers=config.depth), **options)
        parameters = sum(p.numel() for n, p in whole.named_parameters() if not n.endswith("mask_token"))
        return (
            path,
            deepened(load_file(path), config.depth),
            parameters,
            lambda x: model(pixel_values=x).last_hidden_state,
        )

    return make


def _settings(name: str, config: PublishedConfig) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "image_size": config.image_px,
        "patch_size": config.patch_px,
        "layer_norm_eps": config.eps,
    }
    if name == "ViTModel":
        return {**settings, "intermediate_size": config.mlp}
    # DINOv2's MLP is four times as wide; with SwiGLU transformers takes two thirds of that and rounds it up.
    settings |= {"mlp_ratio": 4, "use_swiglu_ffn": config.swiglu}
    if name == "Dinov2WithRegistersModel":
        settings["num_register_tokens"] = config.registers
    return settings


def _swin(config: PublishedConfig, folder: Path) -> Oracle:
    """CTransPath: transformers' Swin behind a stem that is written a second time here, in the names of its file."""
    module = import_transformers()
    model = module.SwinModel(module.SwinConfig(), add_pooling_layer=False).eval()
    randomise(model)
    theirs = {
        name: tensor
        for name, tensor in load_file(saved(module, model, folder)).items()
        if "patch_embeddings" not in name
    }
    # Two convolutions of stride 2 to an eighth and a quarter of the width, and a projection; no counters of batches.
    width = config.width // 8
    stem = random_state(
        {
            "patch_embed.proj.0.weight": (width // 8, 3, 3, 3),
            **_norm_shapes("patch_embed.proj.1", width // 8),
            "patch_embed.proj.3.weight": (width // 4, width // 8, 3, 3),
            **_norm_shapes("patch_embed.proj.4", width // 4),
            "patch_embed.proj.6.weight": (width, width // 4, 1, 1),
            "patch_embed.proj.6.bias": (width,),
        }
    )
    state = _published_swin(theirs) | stem
    # As in the published file, which keeps constants of the attention's windows.
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    save_file(state, folder / "stand-in.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    parameters = sum(
        t.numel() for n, t in state.items() if "running" not in n and not n.endswith("position_index")
    )
    return (folder / "stand-in.safetensors", shapes, parameters, lambda x: _run_swin(model, stem, x))


def _norm_shapes(name: str, width: int) -> Shapes:
    return {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}


def _published_swin(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "attention.output.dense": "attn.proj",
        "attention.self.relative_position_bias_table": "attn.relative_position_bias_table",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "embeddings.norm": "patch_embed.norm",
        "layernorm": "norm",
    }
    found: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        if ".attention.self." in name and "bias_table" not in name:
            continue
        plain = name.removeprefix("encoder.")
        for old, new in names.items():
            plain = plain.replace(old, new)
        found[plain] = tensor
    for name in [name for name in theirs if ".attention.self.query." in name]:
        parts = [theirs[name.replace(".query.", f".{part}.")] for part in ("query", "key", "value")]
        found[name.removeprefix("encoder.").replace("attention.self.query", "attn.qkv")] = torch.cat(parts)
    return found


def _run_swin(model: Any, stem: dict[str, Tensor], images: Tensor) -> Tensor:
    x = images
    for convolution, norm in ((0, 1), (3, 4)):
        x = conv2d(x, stem[f"patch_embed.proj.{convolution}.weight"], stride=2, padding=1)
        mean, var, weight, bias = (
            stem[f"patch_embed.proj.{norm}.{part}"]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        x = relu(batch_norm(x, mean, var, weight, bias))
    x = conv2d(x, stem["patch_embed.proj.6.weight"], stem["patch_embed.proj.6.bias"])
    size = (x.shape[2], x.shape[3])
    embedded = model.embeddings.norm(x.flatten(2).transpose(1, 2))
    out = model.layernorm(model.encoder(embedded, size)[0])
    mean_token: Tensor = out.mean(1, keepdim=True)
    return mean_token


ORACLES: dict[str, Callable[[PublishedConfig, Path], Oracle]] = {
    "plain-vit": plain,
    "plain-dinov2": _dinov2,
    "plain-dinov2-chunks": _dinov2_chunks,
    "ViTModel": _transformers("ViTModel"),
    "Dinov2Model": _transformers("Dinov2Model"),
    "Dinov2WithRegistersModel": _transformers("Dinov2WithRegistersModel"),
    "SwinModel": _swin,
    "CLIPVisionModelWithProjection": clip,
    "CLIPVisionModelWithProjection-open-clip": clip_in_names_of_open_clip,
    "plain-vit-open-clip": open_clip_trunk,
    "plain-vit-keep": keep,
}
"""What writes a stand-in, by the name that a record's `oracle` gives."""
