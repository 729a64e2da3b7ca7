"""Groups of tokens inside a network, against what timm and torch give when called by hand."""

import numpy as np
import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d

from featurestore.encoders.loading import load_encoder
from featurestore.encoders.protocol import EncoderOptions
from featurestore.encoders.timm_import import import_timm
from featurestore.errors import EncoderError
from featurestore.grid import TokenGridSpec

VIT, CONV = "timm:test_vit", "timm:test_efficientnet"  # timm's own tiny networks, 160 px
PATCHES = np.random.default_rng(0).integers(0, 256, (3, 160, 160, 3)).astype(np.uint8)


def _options(k: int | None, **rest: object) -> EncoderOptions:
    spec = None if k is None else TokenGridSpec.from_patches(0.5, 160, k, **rest)  # type: ignore[arg-type]
    return EncoderOptions(random_weights=True, device="cpu", tokens=spec)


def _by_hand(key: str) -> torch.Tensor:
    """Return the features of the same random network and the same pixels."""
    timm = import_timm()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(key.removeprefix("timm:"), pretrained=False, num_classes=0).eval()
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        images = (torch.from_numpy(PATCHES).permute(0, 3, 1, 2).float() / 255 - mean) / std
        features: torch.Tensor = model.forward_features(images)
    return features


def test_tokens_of_a_transformer_are_averaged_without_its_class_token() -> None:
    found = load_encoder(VIT, _options(5)).encode(PATCHES)
    features = _by_hand(VIT)
    assert features.shape[1] == 1 + 100
    maps = features[:, 1:].transpose(1, 2).reshape(3, -1, 10, 10)
    expected = adaptive_avg_pool2d(maps, 5).permute(0, 2, 3, 1).numpy()
    assert np.abs(found - expected).max() < 1e-5


def test_parts_of_a_feature_map_are_pooled_as_the_whole_is() -> None:
    found = load_encoder(CONV, _options(5)).encode(PATCHES)
    expected = _by_hand(CONV).permute(0, 2, 3, 1).numpy()
    assert expected.shape[1:3] == (5, 5)
    assert np.abs(found - expected).max() < 1e-5
    alone = load_encoder(CONV, _options(1)).encode(PATCHES)
    assert np.array_equal(alone[:, 0, 0], load_encoder(CONV, _options(None)).encode(PATCHES))


def test_a_rim_is_cut_off_before_tokens_are_grouped() -> None:
    whole = load_encoder(VIT, _options(10)).encode(PATCHES)
    inner = load_encoder(VIT, _options(4, overlap_px=32)).encode(PATCHES)
    expected = whole[:, 1:-1, 1:-1].reshape(3, 4, 2, 4, 2, -1).mean((2, 4))
    assert np.abs(inner - expected).max() < 1e-5


@pytest.mark.parametrize("key", [VIT, CONV])
def test_the_patch_s_own_vector_comes_from_the_same_pass(key: str) -> None:
    own = load_encoder(key, _options(None))
    joined, groups = (load_encoder(key, _options(5, cls_token=cls)) for cls in (True, False))
    found = joined.encode(PATCHES)
    assert found.shape == (3, 5, 5, joined.identity.dim)
    assert joined.identity.dim == groups.identity.dim + own.identity.dim
    assert np.array_equal(found[..., : groups.identity.dim], groups.encode(PATCHES))
    assert np.abs(found[..., groups.identity.dim :] - own.encode(PATCHES)[:, None, None]).max() < 1e-6
    # However patches are batched, and of none.
    assert np.array_equal(joined.encode(PATCHES[1:2]), found[1:2])
    assert joined.encode(PATCHES[:0]).shape == (0, *found.shape[1:])


def test_each_grouping_has_a_fingerprint_of_its_own() -> None:
    ways = [
        _options(None),
        _options(1),
        _options(5),
        _options(5, cls_token=True),
        _options(2, overlap_px=32),
        _options(4, overlap_px=32),
    ]
    fingerprints = [load_encoder(VIT, way).identity.fingerprint for way in ways]
    assert len(set(fingerprints)) == len(ways)


def test_a_network_that_crops_its_patch_needs_an_overlap_that_fills_the_gaps() -> None:
    spec = TokenGridSpec.from_patches(0.5, 256, 4)
    with pytest.raises(EncoderError, match=r"sees the inner 224, .*; give --token-overlap 32, 64, 96 or 128"):
        load_encoder("gigapath", EncoderOptions(random_weights=True, tokens=spec))


@pytest.mark.parametrize(
    ("key", "patch", "k", "message"),
    [
        (
            "uni2-h",
            224,
            7,
            "16 x 16 tokens of a patch of 224 px, which --tokens 7 .*; give --tokens 1, 2, 4, 8 or 16",
        ),
        ("uni", 240, 5, r"14 x 14 tokens .* --tokens 1 or 2, or --patch 238 for any K that divides 14"),
        ("gigapath", 225, 1, r"no number of tokens is a whole number of pixels; give --patch 224"),
        ("conch", 448, 4, "its authors' package gives no map of tokens"),
        ("morphology", 224, 4, "morphology has no map of tokens"),
    ],
)
def test_what_does_not_fit_the_map_is_refused_before_any_weight_is_loaded(
    key: str, patch: int, k: int, message: str
) -> None:
    with pytest.raises(EncoderError, match=message):
        load_encoder(key, EncoderOptions(tokens=TokenGridSpec.from_patches(0.5, patch, k)))
