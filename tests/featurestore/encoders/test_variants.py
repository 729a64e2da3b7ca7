"""A weights file of another variant: one line with the first difference, both shapes and the record that would fit."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from featurestore.encoders import variants
from featurestore.encoders.architecture import build
from featurestore.encoders.loading import load_encoder
from featurestore.encoders.protocol import EncoderOptions
from featurestore.encoders.records import EncoderRecord, records
from featurestore.encoders.verification.oracles import make_stand_in
from featurestore.encoders.verification.plain_vit import Shapes
from featurestore.encoders.vision import load_record
from featurestore.encoders.weights import file_sha256
from featurestore.errors import EncoderError


def _file(shapes: Shapes, path: Path) -> Path:
    # Zeros of one element each, stretched: a file of the published shapes without their bytes.
    torch.save({name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}, path)
    return path


def _refusal(key: str, path: Path) -> str:
    with pytest.raises(EncoderError) as refused:
        load_encoder(key, EncoderOptions(weights=str(path), device="cpu"))
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("key", "of", "difference"),
    [
        ("hibou-b", "hibou-l", "blocks.0.attn.proj.bias is (768,) here and (1024,) in the file"),
        ("kaiko-l14", "gpfm", "pos_embed is (1, 1369, 1024) here and (1, 257, 1024) in the file"),
        (
            "phikon",
            "kaiko-b8",
            "patch_embed.proj.weight is (768, 3, 16, 16) here and (768, 3, 8, 8) in the file",
        ),
        ("plip", "biomedclip", "blocks.0.attn.proj.bias is (768,) here and absent in the file"),
        ("biomedclip", "plip", "blocks.0.attn.proj.bias is (768,) here and absent in the file"),
        ("keep", "uni", "projection.0.bias is (768,) here and absent in the file"),
        ("uni", "keep", "blocks.0.attn.proj.bias is (1024,) here and absent in the file"),
    ],
)
def test_the_first_difference_is_named_with_both_shapes_and_the_record_that_fits(
    key: str, of: str, difference: str, tmp_path: Path
) -> None:
    stand_in = make_stand_in(records()[of], tmp_path)
    message = _refusal(key, _file(stand_in.shapes, tmp_path / "published.pth"))
    assert message.startswith("published.pth does not fit VisionTransformer: "), message
    assert difference in message
    fitting = re.split(", | or ", message.partition("; the file fits --encoder ")[2])
    assert of in fitting, message
    assert key not in fitting


def test_a_table_of_positions_of_another_input_is_named_with_both_shapes(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = build(replace(records()["kaiko-l14"], positions=None))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    message = _refusal("kaiko-l14", _file(shapes, tmp_path / "small.pth"))
    assert message.endswith("pos_embed is (1, 1369, 1024) here and (1, 256, 1024) in the file"), message


SIZE = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "num_heads": 2, "depth": 1}


def _small(key: str) -> EncoderRecord:
    record = records()[key]
    how = replace(record.preprocessing, resize_px=32, crop_px=None)
    return replace(
        record,
        arguments={**record.arguments, **SIZE},
        dim=24,
        parameters=None,
        preprocessing=how,
        state="timm",
    )


def test_the_published_file_of_another_encoder_with_the_same_tensors_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(build(_small("uni")).state_dict(), path)
    options = EncoderOptions(weights=str(path), device="cpu", precision="fp32")
    load_record(_small("mstar"), options)
    uni = records()["uni"]
    assert uni.published is not None
    published = replace(uni, published=replace(uni.published, sha256=file_sha256(path)[:16]))
    monkeypatch.setattr(variants, "records", lambda: {"uni": published})
    load_record(_small("uni"), options)
    with pytest.raises(
        EncoderError, match=r"model\.safetensors is the published file of uni, .* --encoder uni$"
    ):
        load_record(_small("mstar"), options)


def test_a_file_whose_digest_is_known_is_said_to_fit_its_own_encoder_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uni, mstar = records()["uni"], records()["mstar"]
    assert uni.published is not None
    assert uni.published.sha256 is not None
    monkeypatch.setattr(variants, "fitting_records", lambda raw: [uni, mstar])
    assert variants.other_variant({}) == "; the file fits --encoder uni, mstar"
    assert variants.other_variant({}, uni.published.sha256 + "0" * 48) == "; the file fits --encoder uni"
    assert variants.other_variant({}, "0" * 64) == "; the file fits --encoder uni, mstar"
