"""Image towers of image-text models: the projection behind them is loaded, identified and compared like the tower itself."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from featurestore.encoders.architecture import build
from featurestore.encoders.network_encoder import NetworkEncoder
from featurestore.encoders.protocol import EncoderOptions
from featurestore.encoders.records import EncoderRecord, records
from featurestore.encoders.verification.oracles import StandIn, make_stand_in
from featurestore.encoders.vision import identity_facts, load_record
from featurestore.encoders.weights import load_weights
from featurestore.errors import EncoderError
from featurestore.grid import TokenGridSpec

PROJECTED = ("plip", "quiltnet-b32", "biomedclip", "keep")
SIDE, TOKEN, WIDTH, HEADS, BLOCKS = 64, 16, 48, 3, 2
PATCHES = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3)).astype(np.uint8)

State = dict[str, torch.Tensor]


def _small(key: str) -> EncoderRecord:
    """Return a record with everything but its size: a network of a few kilobytes."""
    record = records()[key]
    assert record.config is not None
    assert record.projection is not None
    widths = (11, 7)[: len(record.projection.widths)]
    config = replace(
        record.config,
        image_px=SIDE,
        patch_px=TOKEN,
        width=WIDTH,
        depth=BLOCKS,
        heads=HEADS,
        mlp=4 * WIDTH,
        positions=1 + (SIDE // TOKEN) ** 2,
        projection=widths,
        parameters=None,
    )
    size = {"img_size": SIDE, "patch_size": TOKEN, "embed_dim": WIDTH, "num_heads": HEADS, "depth": BLOCKS}
    return replace(
        record,
        arguments={**record.arguments, **size},
        config=config,
        projection=replace(record.projection, widths=widths),
        dim=widths[-1],
        parameters=None,
        preprocessing=replace(record.preprocessing, resize_px=SIDE, crop_px=SIDE),
    )


def _stand_in(key: str, folder: Path) -> StandIn:
    return make_stand_in(_small(key), folder)


def _load(key: str, path: Path, **options: Any) -> NetworkEncoder:
    return load_record(
        _small(key), EncoderOptions(weights=str(path), device="cpu", precision="fp32", **options)
    )


def _changed(path: Path, change: Callable[[State], State]) -> Path:
    """Write what is left of a file after a change, beside it."""
    safe = path.suffix == ".safetensors"
    state = load_file(path) if safe else torch.load(path, weights_only=True)
    changed = path.with_stem("changed")
    (save_file if safe else torch.save)(change(state), changed)
    return changed


def _by_the_oracle(stand_in: StandIn) -> np.ndarray:
    """Return the vectors of `PATCHES`, which have the network's side, so that no resampling takes part."""
    how = stand_in.preprocessing
    mean, std = (torch.tensor(side).view(1, 3, 1, 1) for side in (how.mean, how.std))
    with torch.inference_mode():
        images = (torch.from_numpy(PATCHES).permute(0, 3, 1, 2).float() / 255 - mean) / std
        vectors: np.ndarray = stand_in.tokens(images)[:, 0].numpy()
    return vectors


@pytest.mark.parametrize("key", PROJECTED)
def test_the_vectors_are_those_of_another_implementation(key: str, tmp_path: Path) -> None:
    stand_in = _stand_in(key, tmp_path)
    found = _load(key, stand_in.path).encode(PATCHES)
    np.testing.assert_allclose(found, _by_the_oracle(stand_in), atol=1e-5)


@pytest.mark.parametrize("key", ["plip", "quiltnet-b32"])
def test_clip_is_taken_in_the_names_of_either_library(key: str, tmp_path: Path) -> None:
    for oracle in ("CLIPVisionModelWithProjection", "CLIPVisionModelWithProjection-open-clip"):
        stand_in = make_stand_in(replace(_small(key), oracle=oracle), tmp_path)
        found = _load(key, stand_in.path).encode(PATCHES)
        np.testing.assert_allclose(found, _by_the_oracle(stand_in), atol=1e-5)


def test_openai_s_approximation_of_gelu_is_told_from_gelu(tmp_path: Path) -> None:
    stand_in = _stand_in("plip", tmp_path)
    found = _load("quiltnet-b32", stand_in.path).encode(PATCHES)
    assert np.abs(found - _by_the_oracle(stand_in)).max() > 1e-3


@pytest.mark.parametrize("key", PROJECTED)
def test_the_text_tower_is_left_out_whatever_it_holds(key: str, tmp_path: Path) -> None:
    stand_in = _stand_in(key, tmp_path)
    text = ("text", "logit_scale", "transformer.", "token_embedding", "ln_final", "positional_embedding")

    def change(state: State) -> State:
        assert any(name.startswith(text) for name in state)
        return {name: tensor + 1 if name.startswith(text) else tensor for name, tensor in state.items()}

    def without(state: State) -> State:
        return {name: tensor for name, tensor in state.items() if not name.startswith(text)}

    expected = _load(key, stand_in.path).encode(PATCHES)
    assert expected.shape == (3, _small(key).dim)
    for what in (change, without):
        assert np.array_equal(_load(key, _changed(stand_in.path, what)).encode(PATCHES), expected)


@pytest.mark.parametrize(
    ("key", "missing", "named"),
    [
        ("plip", "visual_projection.weight", r"projection\.0\.weight is \(11, 48\) here and absent"),
        ("plip", "vision_model.post_layernorm.bias", r"norm\.bias is \(48,\) here and absent"),
        (
            "plip",
            "vision_model.encoder.layers.1.self_attn.k_proj.weight",
            r"blocks\.1\.attn\.qkv\.weight is \(144, 48\) here and \(96, 48\)",
        ),
        ("quiltnet-b32", "visual.proj", r"projection\.0\.weight is \(11, 48\) here and absent"),
        ("quiltnet-b32", "visual.positional_embedding", r"pos_embed is \(1, 17, 48\) here and absent"),
        ("biomedclip", "visual.head.proj.weight", r"projection\.0\.weight is \(11, 48\) here and absent"),
        ("keep", "visual_head.2.bias", r"projection\.2\.bias is \(7,\) here and absent"),
        ("keep", "visual.blocks.0.ls2.weight", r"blocks\.0\.ls2\.gamma is \(48,\) here and absent"),
    ],
)
def test_a_file_that_leaves_a_part_of_the_image_tower_unfilled_is_refused(
    key: str, missing: str, named: str, tmp_path: Path
) -> None:
    path = _stand_in(key, tmp_path).path

    def without(state: State) -> State:
        assert missing in state
        return {name: tensor for name, tensor in state.items() if name != missing}

    with pytest.raises(EncoderError, match=named) as refused:
        _load(key, _changed(path, without))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("key", "added"),
    [
        ("plip", "vision_model.adapter.weight"),
        ("plip", "visual_projection.bias"),
        ("plip", "some.other.weight"),
        ("quiltnet-b32", "visual.attn_pool.query"),
        ("quiltnet-b32", "some.other.weight"),
        ("biomedclip", "visual.head.proj.bias"),
        ("biomedclip", "transformer.resblocks.0.weight"),
        ("keep", "visual_head.4.weight"),
        ("keep", "context.weight"),
    ],
)
def test_a_tensor_that_is_no_text_tower_s_and_not_the_network_s_is_refused(
    key: str, added: str, tmp_path: Path
) -> None:
    path = _changed(_stand_in(key, tmp_path).path, lambda state: state | {added: torch.zeros(5, 3)})
    with pytest.raises(EncoderError, match=r" is absent here and \(5, 3\) in the file"):
        _load(key, path)


@pytest.mark.parametrize(
    ("key", "name", "shape"),
    [
        ("plip", "vision_model.embeddings.class_embedding", ()),
        ("plip", "vision_model.encoder.layers.0.self_attn.q_proj.weight", (5, 3)),
        ("plip", "vision_model.encoder.layers.0.self_attn.q_proj.bias", ()),
        ("quiltnet-b32", "visual.proj", (5, 3, 2)),
        ("quiltnet-b32", "visual.positional_embedding", ()),
    ],
)
def test_a_tensor_of_an_impossible_shape_is_refused_in_one_line(
    key: str, name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    path = _changed(_stand_in(key, tmp_path).path, lambda state: state | {name: torch.zeros(shape)})
    with pytest.raises(EncoderError, match="does not fit VisionTransformer") as refused:
        _load(key, path)
    assert "\n" not in str(refused.value)


def test_vectors_are_divided_by_their_length_only_where_the_authors_do_so(tmp_path: Path) -> None:
    lengths = {}
    for key in PROJECTED:
        vectors = _load(key, _stand_in(key, tmp_path).path).encode(PATCHES)
        lengths[key] = np.linalg.norm(vectors, axis=1)
    assert np.abs(lengths.pop("keep") - 1).max() < 1e-6
    for key, found in lengths.items():
        assert np.abs(found - 1).min() > 0.01, key


def test_groups_of_tokens_go_through_the_projection_as_the_patch_s_vector_does(tmp_path: Path) -> None:
    record, path = _small("keep"), _stand_in("keep", tmp_path).path
    spec = TokenGridSpec.from_patches(0.5, SIDE, 2, cls_token=True)
    found = _load("keep", path, tokens=spec).encode(PATCHES)
    model = build(record).eval()
    load_weights(model, path, record.state)
    mean, std = (
        torch.tensor(side).view(1, 3, 1, 1) for side in (record.preprocessing.mean, record.preprocessing.std)
    )
    with torch.inference_mode():
        images = (torch.from_numpy(PATCHES).permute(0, 3, 1, 2).float() / 255 - mean) / std
        tokens = model.forward_features(images)[:, 1:].reshape(3, 2, 2, 2, 2, WIDTH).mean((2, 4))
        layers = [model.projection[0], torch.nn.GELU(), model.projection[2]]
        expected = torch.nn.functional.normalize(torch.nn.Sequential(*layers)(tokens), dim=-1).numpy()
    assert found.shape == (3, 2, 2, 14)
    assert np.abs(found[..., :7] - expected).max() < 1e-5
    own = _load("keep", path).encode(PATCHES)
    assert np.abs(found[..., 7:] - own[:, None, None]).max() < 1e-6


def test_a_projection_is_part_of_the_identity_and_the_lack_of_one_is_not() -> None:
    for record in records().values():
        facts = identity_facts(record, "w", "fp32")
        assert (record.pooling == "projection") == (record.projection is not None), record.key
        assert ("projection" in facts) == (record.projection is not None), record.key
        if record.projection is not None:
            assert record.config is not None
            assert record.projection.widths == record.config.projection
            assert record.dim == record.projection.widths[-1]
    keep = records()["keep"]
    assert keep.projection is not None
    other = replace(keep, projection=replace(keep.projection, normalised=False))
    assert identity_facts(other, "w", "fp32") != identity_facts(keep, "w", "fp32")


@pytest.mark.parametrize("key", PROJECTED)
def test_random_weights_fill_the_projection_too_the_same_ones_twice(key: str) -> None:
    options = EncoderOptions(random_weights=True, device="cpu", precision="fp32")
    one, other = (load_record(_small(key), options).encode(PATCHES) for _ in range(2))
    assert np.array_equal(one, other)
    assert len(np.unique(one, axis=0)) == 3
