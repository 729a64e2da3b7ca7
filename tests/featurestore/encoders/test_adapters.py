"""Low-rank adapters over a base, in the files that peft writes; the sum is checked against a merged file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from featurestore.encoders.golden import golden_image
from featurestore.encoders.loading import load_encoder
from featurestore.encoders.protocol import Encoder, EncoderOptions
from featurestore.encoders.timm_import import import_timm
from featurestore.errors import EncoderError

KEY = "timm:test_vit"
RANK, ALPHA = 3, 7
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "use_rslora": False}


def _load(weights: object) -> Encoder:
    return load_encoder(KEY, EncoderOptions(weights=str(weights), device="cpu"))


@pytest.fixture
def base(tmp_path: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    state: dict[str, torch.Tensor] = import_timm().create_model("test_vit", num_classes=0).state_dict()
    save_file(state, tmp_path / "base.safetensors")
    return state


def _write_adapter(folder: Path, base: dict[str, torch.Tensor], **config: Any) -> dict[str, torch.Tensor]:
    """Write an adapter of two matrices, and return the base's tensors with it merged in."""
    folder.mkdir()
    tensors, merged = {}, dict(base)
    for name in ("blocks.0.attn.qkv", "blocks.1.mlp.fc2"):
        outputs, inputs = base[f"{name}.weight"].shape
        down, up = torch.randn(RANK, inputs), torch.randn(outputs, RANK)
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
        merged[f"{name}.weight"] = base[f"{name}.weight"] + ALPHA / RANK * (up @ down)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return merged


def test_an_adapter_over_a_base_gives_the_vectors_of_the_merged_weights(
    base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    merged = _write_adapter(tmp_path / "lora", base)
    save_file(merged, tmp_path / "merged.safetensors")
    patches = golden_image(160)[None]
    adapted = _load(f"{tmp_path}/base.safetensors+{tmp_path}/lora")
    expected = _load(tmp_path / "merged.safetensors").encode(patches)
    np.testing.assert_allclose(adapted.encode(patches), expected, rtol=1e-3, atol=1e-4)
    plain = _load(tmp_path / "base.safetensors")
    assert np.abs(plain.encode(patches) - expected).max() > 0.05
    assert adapted.identity.fingerprint != plain.identity.fingerprint
    by_file = _load(f"{tmp_path}/base.safetensors+{tmp_path}/lora/adapter_model.safetensors")
    assert by_file.identity == adapted.identity


def test_the_scale_is_part_of_the_fingerprint(base: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.manual_seed(5)
    _write_adapter(tmp_path / "one", base)
    torch.manual_seed(5)
    _write_adapter(tmp_path / "other", base, lora_alpha=14)
    one, other = (
        _load(f"{tmp_path}/base.safetensors+{tmp_path}/{name}").identity for name in ("one", "other")
    )
    assert one.fingerprint != other.fingerprint


def test_an_adapter_alone_changes_the_published_weights(
    base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    _write_adapter(tmp_path / "lora", base)
    with pytest.raises(EncoderError, match=f"{KEY} needs weights"):  # it has none that are published
        _load(tmp_path / "lora")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"use_dora": True}, "uses use_dora"),
        ({"peft_type": "LOHA"}, "describes no LoRA"),
        ({"bias": "all"}, "describes no LoRA without biases"),
        ({"r": 0}, "lacks a positive r"),
    ],
)
def test_what_is_more_than_a_low_rank_change_is_refused(
    base: dict[str, torch.Tensor], tmp_path: Path, config: dict[str, Any], named: str
) -> None:
    _write_adapter(tmp_path / "lora", base, **config)
    with pytest.raises(EncoderError, match=named) as refused:
        _load(f"{tmp_path}/base.safetensors+{tmp_path}/lora")
    assert "\n" not in str(refused.value)


def test_an_adapter_of_another_network_is_refused_with_both_shapes(
    base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    wider = {name: torch.zeros(tuple(2 * side for side in tensor.shape)) for name, tensor in base.items()}
    _write_adapter(tmp_path / "lora", wider)
    with pytest.raises(EncoderError, match=r"qkv.weight of shape \(384, 128\), which is \(192, 64\) there"):
        _load(f"{tmp_path}/base.safetensors+{tmp_path}/lora")


def test_tensors_that_are_no_factors_are_refused(base: dict[str, torch.Tensor], tmp_path: Path) -> None:
    _write_adapter(tmp_path / "lora", base)
    save_file(
        {"base_model.model.norm.weight": torch.ones(64)}, tmp_path / "lora" / "adapter_model.safetensors"
    )
    with pytest.raises(
        EncoderError, match=r"norm\.weight of shape \(64,\), which is no part of a low-rank change"
    ):
        _load(f"{tmp_path}/base.safetensors+{tmp_path}/lora")
