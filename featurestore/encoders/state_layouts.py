"""Names of tensors in published weights files, turned into timm's names for the same network.

transformers keeps query, key and value apart, timm in one matrix; DINOv2 with registers adds the class token's
position to the class token itself; Swin of timm before 0.9 has its downsampling one stage earlier. Image-text models
keep both towers in one file: tensors of the text tower are left out by the beginnings of their names, and nothing else
is. Equal to the results of other implementations, by `histosge encoders --check`.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

State = dict[str, Tensor]

_BLOCK = re.compile(r"encoder\.layer\.(\d+)\.(.+)")
_QKV = {"query": "q", "key": "k", "value": "v"}
_COMMON = {
    "attention.output.dense": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "norm1": "norm1",
    "norm2": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.weights_in": "mlp.fc1",
    "mlp.weights_out": "mlp.fc2",
    "layer_scale1": "ls1",
    "layer_scale2": "ls2",
}
_TOP = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
# The pooler is a layer for transformers' own classifiers; no encoder here uses it.
_UNUSED = ("embeddings.mask_token", "pooler.")


def to_timm(state: State, layout: str) -> State:
    """Rename a state dict.

    Parameters
    ----------
    state
        As it was read.
    layout
        One of `LAYOUTS`; ``timm`` is returned as it is.
    """
    return LAYOUTS[layout](state)


def _from_transformers(state: State) -> State:
    found: State = {}
    attention: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in state.items():
        # Whole models put the backbone below a name of its own.
        name = re.sub(r"^(vit|dinov2|model)\.(?=embeddings|encoder|layernorm)", "", full_name)
        if name.startswith(_UNUSED):
            continue
        match = _BLOCK.match(name)
        if match is None:
            found[_TOP.get(name, name)] = tensor
            continue
        block, rest = match.groups()
        part, _, kind = rest.rpartition(".")
        last = part.rpartition(".")[2]
        if last in _QKV:
            attention.setdefault(f"blocks.{block}.attn.qkv.{kind}", {})[_QKV[last]] = tensor
        elif kind == "lambda1":  # layer scale, which timm calls gamma
            found[f"blocks.{block}.{_COMMON.get(part, part)}.gamma"] = tensor
        else:
            found[f"blocks.{block}.{_COMMON.get(part, part)}.{kind}"] = tensor
    return found | _joined(attention)


def _joined(attention: dict[str, dict[str, Tensor]]) -> State:
    """Return one matrix of query, key and value, in this order, for each name.

    A file that lacks one gives a matrix that is too short, and is refused by its shape; parts that do not go together
    keep names of their own, which no network has.
    """
    found: State = {}
    for name, parts in attention.items():
        rows = {tuple(tensor.shape[1:]) if tensor.ndim else None for tensor in parts.values()}
        if len(rows) == 1 and None not in rows:
            found[name] = torch.cat([parts[part] for part in "qkv" if part in parts])
        else:
            found |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return found


def _from_dinov2(state: State) -> State:
    found = _from_transformers(state)
    with_names_of_transformers = any(name.endswith("embeddings.position_embeddings") for name in state)
    return _without_class_position(found) if with_names_of_transformers else found


_DINOV2_NAMES = (
    # Training in chunks of blocks puts the chunk before the block, whose number goes on through all of them.
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
    (r"^register_tokens$", "reg_token"),
    (r"^(blocks\.\d+\.mlp)\.w12\.", r"\1.fc1."),
    (r"^(blocks\.\d+\.mlp)\.w3\.", r"\1.fc2."),
)


def _from_dinov2_code(state: State) -> State:
    found: State = {}
    for full_name, tensor in state.items():
        found[_renamed(full_name, _DINOV2_NAMES)] = tensor
    return _without_class_position(found) if "register_tokens" in state else found


def _renamed(name: str, patterns: tuple[tuple[str, str], ...]) -> str:
    """Apply all patterns in their order."""
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name


def _without_class_position(found: State) -> State:
    if "reg_token" in found and {"pos_embed", "cls_token"} <= found.keys():
        # timm adds positions to patch tokens only; the class token's own is a constant, so it goes into the token.
        place = found["pos_embed"]
        found["cls_token"] = found["cls_token"] + place[:, :1]
        found["pos_embed"] = place[:, 1:]
    return found


# Constants that follow from the window's size; timm 0.9 and later no longer keeps them in files.
_SWIN_CONSTANTS = ("relative_position_index", "attn_mask")


def _from_swin(state: State) -> State:
    kept = {name: tensor for name, tensor in state.items() if not name.endswith(_SWIN_CONSTANTS)}
    if not any(name.startswith("layers.0.downsample.") for name in kept):
        return kept
    # Before 0.9 it closed a stage, now it opens the next one. timm renames it when it downloads, and is silent about
    # what it did not find; a file of the present layout has none in stage 0.
    return {
        re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name): tensor
        for name, tensor in kept.items()
    }


_CLIP_TEXT = {
    "open_clip": (
        *("transformer.", "token_embedding.", "ln_final.", "positional_embedding"),
        *("text_projection", "logit_scale", "logit_bias"),
    ),
    "transformers": ("text_model.", "text_projection.", "logit_scale", "logit_bias"),
}
"""Beginnings of names of what is no part of CLIP's image tower."""
_CLIP_NAMES = (
    # open_clip's, which are OpenAI's
    (r"^visual\.class_embedding$", "cls_token"),
    (r"^visual\.positional_embedding$", "pos_embed"),
    (r"^visual\.conv1\.weight$", "patch_embed.proj.weight"),
    (r"^visual\.ln_pre\.", "norm_pre."),
    (r"^visual\.ln_post\.", "norm."),
    (r"^visual\.proj$", "projection.0.weight"),
    (r"^visual\.transformer\.resblocks\.", "blocks."),
    (r"^(blocks\.\d+)\.ln_(\d)\.", r"\1.norm\2."),
    (r"^(blocks\.\d+\.attn)\.in_proj_", r"\1.qkv."),
    (r"^(blocks\.\d+\.attn)\.out_proj\.", r"\1.proj."),
    (r"^(blocks\.\d+\.mlp)\.c_fc\.", r"\1.fc1."),
    (r"^(blocks\.\d+\.mlp)\.c_proj\.", r"\1.fc2."),
    # transformers'
    (r"^vision_model\.embeddings\.class_embedding$", "cls_token"),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding\.weight$", "patch_embed.proj.weight"),
    (r"^vision_model\.pre_layrnorm\.", "norm_pre."),  # misspelt in transformers, and so in the files
    (r"^vision_model\.post_layernorm\.", "norm."),
    (r"^visual_projection\.", "projection.0."),
    (r"^vision_model\.encoder\.layers\.", "blocks."),
    (r"^(blocks\.\d+)\.layer_norm(\d)\.", r"\1.norm\2."),
    (r"^(blocks\.\d+)\.self_attn\.out_proj\.", r"\1.attn.proj."),
)
_CLIP_QKV = re.compile(r"(blocks\.\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")


def _from_clip(state: State) -> State:
    """Rename CLIP's tensors from either of the two forms in which authors publish them, often side by side."""
    text = _CLIP_TEXT["open_clip" if any(name.startswith("visual.") for name in state) else "transformers"]
    found: State = {}
    attention: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in state.items():
        # A constant, the numbers of the positions, in files of transformers before 4.31.
        if full_name.startswith(text) or full_name == "vision_model.embeddings.position_ids":
            continue
        name = _renamed(full_name, _CLIP_NAMES)
        match = _CLIP_QKV.fullmatch(name)
        if match is None:
            found[name] = _in_shape_of_timm(full_name, tensor)
        else:
            block, part, kind = match.groups()
            attention.setdefault(f"{block}.attn.qkv.{kind}", {})[part] = tensor
    return found | _joined(attention)


def _in_shape_of_timm(name: str, tensor: Tensor) -> Tensor:
    if name == "visual.proj" and tensor.ndim == 2:
        return tensor.T  # multiplied from the right there, with ``(width, dim)``
    # timm's class token and positions have a dimension of batches.
    if (
        name.endswith(("class_embedding", "positional_embedding", "position_embedding.weight"))
        and tensor.ndim
    ):
        return tensor.reshape(1, -1, tensor.shape[-1])
    return tensor


def _from_trunk(names: tuple[tuple[str, str], ...], text: tuple[str, ...]) -> Callable[[State], State]:
    """Return what renames a file whose image tower is timm's, below a name of its own."""

    def rename(state: State) -> State:
        return {_renamed(name, names): tensor for name, tensor in state.items() if not name.startswith(text)}

    return rename


_OPEN_CLIP_TRUNK = ((r"^visual\.trunk\.", ""), (r"^visual\.head\.proj\.", "projection.0."))
_KEEP_NAMES = (
    (r"^visual_head\.", "projection."),
    # KEEP's code renames timm's factors of its layer scales.
    (r"^visual\.(blocks\.\d+\.ls[12])\.weight$", r"\1.gamma"),
    (r"^visual\.", ""),
)


LAYOUTS: dict[str, Callable[[State], State]] = {
    "timm": lambda state: state,
    "hf-vit": _from_transformers,
    "hf-dinov2": _from_dinov2,
    "dinov2": _from_dinov2_code,
    "swin": _from_swin,
    "clip": _from_clip,
    "open-clip-trunk": _from_trunk(_OPEN_CLIP_TRUNK, ("text.", "logit_scale", "logit_bias")),
    "keep": _from_trunk(_KEEP_NAMES, ("text.", "logit_scale")),
}
"""What turns the tensors of a file into timm's, by the name of the file's layout."""
