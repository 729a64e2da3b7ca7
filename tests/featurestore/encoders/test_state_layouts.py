"""Weights that transformers wrote give timm's network the result of transformers' own, on small networks."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from featurestore.encoders.records import Positions
from featurestore.encoders.state_layouts import to_timm
from featurestore.encoders.timm_import import define_torchvision_operators, import_timm
from featurestore.encoders.weights import load_weights
from featurestore.errors import EncoderError

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
    elif name.startswith("registers"):
        config = Dinov2WithRegistersConfig(**SIZE, num_register_tokens=4, use_swiglu_ffn="swiglu" in name)
        model = Dinov2WithRegistersModel(config)
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
    if "swiglu" in name:
        return timm.create_model(
            "vit_small_patch14_dinov2" if name == "swiglu" else "vit_small_patch14_reg4_dinov2",
            **size,
            mlp_layer=SwiGLUPacked,
            act_layer=torch.nn.SiLU,
            mlp_ratio=2 * 128 / 48,
        ).eval()
    return timm.create_model("vit_small_patch14_dinov2", **size).eval()


@pytest.mark.parametrize("name", ["vit", "dinov2", "swiglu", "registers", "registers and swiglu"])
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


def test_positions_of_a_larger_input_are_resampled_as_transformers_does(tmp_path: Path) -> None:
    define_torchvision_operators()
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(5)
    theirs = Dinov2Model(Dinov2Config(**{**SIZE, "image_size": 13 * 14})).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    images = torch.randn(5, 3, 56, 56)
    found = {}
    for antialias in (False, True):
        ours = _timm("dinov2")
        load_weights(ours, tmp_path / "model.safetensors", "hf-dinov2", Positions(13, antialias))
        with torch.inference_mode():
            found[antialias] = ours.forward_features(images)
    with torch.inference_mode():
        expected = theirs(pixel_values=images).last_hidden_state
    torch.testing.assert_close(found[False], expected, atol=2e-5, rtol=2e-5)
    assert (found[True] - expected).abs().max() > 0.01


def test_positions_of_a_larger_input_are_resampled_as_timm_does(tmp_path: Path) -> None:
    timm = import_timm()
    size = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 14, "num_classes": 0}
    name = "vit_small_patch14_reg4_dinov2"
    torch.manual_seed(7)
    theirs = timm.create_model(name, **size, img_size=13 * 14, dynamic_img_size=True).eval()
    with torch.no_grad():
        theirs.pos_embed.normal_()
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    ours = timm.create_model(name, **size, img_size=56).eval()
    load_weights(ours, tmp_path / "w.safetensors", positions=Positions(13, antialias=True))
    images = torch.randn(5, 3, 56, 56)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs(images), atol=2e-5, rtol=2e-5)
    save_file(ours.state_dict(), tmp_path / "small.safetensors")
    with pytest.raises(EncoderError, match=r"pos_embed is \(1, 169, 48\) here and \(1, 16, 48\) in the file"):
        load_weights(ours, tmp_path / "small.safetensors", positions=Positions(13, antialias=True))


def test_swin_of_an_earlier_timm_is_renamed_as_timm_itself_does(tmp_path: Path) -> None:
    timm = import_timm()
    from timm.models.swin_transformer import checkpoint_filter_fn

    model = timm.create_model(
        "swin_tiny_patch4_window7_224", embed_dim=24, num_heads=(1, 2, 4, 8), num_classes=0
    )
    present = {name: tensor + torch.randn(()) for name, tensor in model.state_dict().items()}
    # As timm 0.5 wrote it: downsampling closes a stage, and constants are kept.
    earlier = {
        re.sub(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name): tensor
        for name, tensor in present.items()
    }
    earlier["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    earlier["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    expected = checkpoint_filter_fn(dict(earlier), model)
    for state in (earlier, present):
        found = to_timm(dict(state), "swin")
        assert found.keys() == expected.keys() == model.state_dict().keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_file_without_counters_of_batches_fits_and_one_without_statistics_does_not(tmp_path: Path) -> None:
    model = import_timm().create_model("test_resnet", num_classes=0)
    state = {
        name: t + 1 for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked")
    }
    save_file(state, tmp_path / "w.safetensors")
    load_weights(model, tmp_path / "w.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    save_file(
        {name: t for name, t in state.items() if name != "bn1.running_var"}, tmp_path / "less.safetensors"
    )
    with pytest.raises(EncoderError, match=r"bn1\.running_var is .* here and absent in the file"):
        load_weights(model, tmp_path / "less.safetensors")
