"""Weights that transformers wrote give timm's network the result of transformers' own, on small networks."""

from functools import partial
from pathlib import Path

import pytest
import torch

from featurestore.encoders.timm_import import define_torchvision_operators, import_timm
from featurestore.encoders.weights import load_weights

SIZE = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 56,
    "patch_size": 14,
}


def _transformers(name: str) -> tuple[torch.nn.Module, str]:
    """Return a network with random weights everywhere, zeros and ones included, and its layout."""
    define_torchvision_operators()
    from transformers import (
        Dinov2Config,
        Dinov2Model,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
        ViTConfig,
        ViTModel,
    )

    torch.manual_seed(3)
    if name == "vit":
        model: torch.nn.Module = ViTModel(ViTConfig(**SIZE, intermediate_size=192), add_pooling_layer=False)
    elif name == "registers":
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZE, num_register_tokens=4))
    else:
        model = Dinov2Model(Dinov2Config(**SIZE, use_swiglu_ffn=name == "swiglu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval(), "hf-vit" if name == "vit" else "hf-dinov2"


def _timm(name: str) -> torch.nn.Module:
    timm = import_timm()
    from timm.layers import SwiGLUPacked

    size = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 56, "patch_size": 14, "num_classes": 0}
    if name == "vit":
        return timm.create_model(
            "vit_tiny_patch16_224", **size, norm_layer=partial(torch.nn.LayerNorm, eps=1e-12)
        ).eval()
    if name == "registers":
        return timm.create_model("vit_small_patch14_reg4_dinov2", **size).eval()
    if name == "swiglu":
        return timm.create_model(
            "vit_small_patch14_dinov2",
            **size,
            mlp_layer=SwiGLUPacked,
            act_layer=torch.nn.SiLU,
            mlp_ratio=2 * 128 / 48,
        ).eval()
    return timm.create_model("vit_small_patch14_dinov2", **size).eval()


@pytest.mark.parametrize("name", ["vit", "dinov2", "swiglu", "registers"])
def test_the_class_token_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    theirs, layout = _transformers(name)
    ours = _timm(name)
    theirs.save_pretrained(tmp_path)  # in memory its tensors have other names than in a file
    load_weights(ours, tmp_path / "model.safetensors", layout)
    images = torch.randn(5, 3, 56, 56)
    with torch.inference_mode():
        expected = theirs(pixel_values=images).last_hidden_state
        found = ours.forward_features(images)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
