"""Any timm model as an encoder, on models of a few hundred kilobytes with random weights: no network."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from featurestore.encoders.loading import load_encoder
from featurestore.encoders.protocol import Encoder, EncoderOptions
from featurestore.errors import EncoderError

KEY = "timm:test_vit"
SIDE = 160
"""Of the model's input."""
DIM = 64
RANDOM = EncoderOptions(random_weights=True, device="cpu")


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder(KEY, RANDOM)


@pytest.fixture(scope="module")
def patches() -> np.ndarray:
    """Smooth colours, another for every patch, and more of them than go through the model at once."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (37, 8, 8, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((1, SIDE // 8, SIDE // 8, 1), np.uint8))


@pytest.fixture(scope="module")
def model(encoder: Encoder) -> Any:
    """The same network with weights that are not the encoder's random ones."""
    import timm  # after the encoder, which makes it importable beside a CUDA build of torchvision

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(101)
        return timm.create_model("test_vit", pretrained=False, num_classes=0).eval()


@pytest.fixture(scope="module")
def weights(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    files = {suffix: folder / f"weights.{suffix}" for suffix in ("safetensors", "pth")}
    save_file(model.state_dict(), files["safetensors"])
    torch.save(model.state_dict(), files["pth"])
    return files


def _with_weights(path: Path, key: str = KEY) -> Encoder:
    return load_encoder(key, EncoderOptions(weights=str(path), device="cpu"))


def _refusal(path: Path, key: str = KEY) -> str:
    with pytest.raises(EncoderError) as refused:
        _with_weights(path, key)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_random_weights_give_the_same_vectors_twice(encoder: Encoder, patches: np.ndarray) -> None:
    torch.manual_seed(997)
    again = load_encoder(KEY, RANDOM)
    vectors = encoder.encode(patches[:7])
    assert vectors.shape == (7, DIM)
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors).all()
    assert np.array_equal(again.encode(patches[:7]), vectors)
    assert again.identity == encoder.identity


def test_loading_random_weights_leaves_torch_s_own_random_numbers_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_encoder(KEY, RANDOM)
    assert torch.equal(torch.rand(3), expected)


def test_patches_that_differ_get_vectors_that_differ(encoder: Encoder, patches: np.ndarray) -> None:
    assert len(np.unique(encoder.encode(patches), axis=0)) == len(patches)


def test_without_weights_it_is_refused_with_the_ways_out() -> None:
    with pytest.raises(EncoderError) as refused:
        load_encoder(KEY, EncoderOptions(device="cpu"))
    message = str(refused.value)
    assert KEY in message
    assert "--weights FILE" in message
    assert "--random-weights" in message


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_from_a_file_give_the_vectors_of_the_model_that_was_saved(
    weights: dict[str, Path], model: Any, patches: np.ndarray, suffix: str
) -> None:
    pixels = torch.from_numpy(patches[:16]).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        expected = model((pixels - 0.5) / 0.5).numpy()
    np.testing.assert_allclose(_with_weights(weights[suffix]).encode(patches[:16]), expected, atol=1e-5)


def test_both_kinds_of_file_give_the_same_vectors(weights: dict[str, Path], patches: np.ndarray) -> None:
    first, second = (_with_weights(path).encode(patches[:7]) for path in weights.values())
    assert np.array_equal(first, second)


def test_weights_from_a_file_are_another_encoder_than_random_ones(
    weights: dict[str, Path], encoder: Encoder, patches: np.ndarray
) -> None:
    for path in weights.values():
        loaded = _with_weights(path)
        assert loaded.identity.fingerprint != encoder.identity.fingerprint
        assert np.abs(loaded.encode(patches[:3]) - encoder.encode(patches[:3])).max() > 0.1


def test_the_fingerprint_follows_the_file_s_content_and_not_its_name(
    weights: dict[str, Path], model: Any, tmp_path: Path
) -> None:
    original = _with_weights(weights["safetensors"]).identity
    copy = shutil.copy(weights["safetensors"], tmp_path / "copy.safetensors")
    assert _with_weights(copy).identity == original
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["norm.bias"][3] += 1e-3
    save_file(state, tmp_path / "nudged.safetensors")
    assert _with_weights(tmp_path / "nudged.safetensors").identity.fingerprint != original.fingerprint


def test_another_architecture_has_another_fingerprint(encoder: Encoder) -> None:
    assert load_encoder("timm:test_vit3", RANDOM).identity.fingerprint != encoder.identity.fingerprint


def test_a_classifier_s_head_in_the_file_is_left_out(
    weights: dict[str, Path], model: Any, patches: np.ndarray, tmp_path: Path
) -> None:
    head = {"head.weight": torch.ones(1000, DIM), "head.bias": torch.ones(1000)}
    save_file({**model.state_dict(), **head}, tmp_path / "classifier.safetensors")
    loaded = _with_weights(tmp_path / "classifier.safetensors")
    assert np.array_equal(
        loaded.encode(patches[:3]), _with_weights(weights["safetensors"]).encode(patches[:3])
    )


def _wider(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**state, "blocks.1.mlp.fc1.bias": torch.zeros(193)}


def _lacking(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if name != "norm.weight"}


def _with_more(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**state, "extra.bias": torch.zeros(5, 3)}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_wider, ("blocks.1.mlp.fc1.bias", "(192,) here", "(193,) in the file")),
        (_lacking, ("norm.weight", "(64,) here", "absent in the file")),
        (_with_more, ("extra.bias", "absent here", "(5, 3) in the file")),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_the_key_and_both_shapes(
    model: Any,
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    named: tuple[str, ...],
) -> None:
    path = tmp_path / "misfit.safetensors"
    save_file(change(model.state_dict()), path)
    message = _refusal(path)
    assert all(part in message for part in ("misfit.safetensors", *named)), message


def test_weights_of_another_architecture_are_refused(weights: dict[str, Path]) -> None:
    for path in weights.values():
        assert "does not fit" in _refusal(path, "timm:test_resnet")


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_weights_file_that_is_not_there_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"none.{suffix}"
    assert _refusal(path) == f"there is no weights file at {path}"


@pytest.mark.parametrize("cut", [True, False], ids=["cut short", "text"])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_weights_file_that_cannot_be_read_is_refused(
    weights: dict[str, Path], tmp_path: Path, suffix: str, cut: bool
) -> None:
    path = tmp_path / f"damaged.{suffix}"
    whole = weights[suffix].read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if cut else b"these are no weights\n" * 7)
    assert "damaged" in _refusal(path)


def _unknown(name: str) -> str:
    with pytest.raises(EncoderError) as refused:
        load_encoder(f"timm:{name}", RANDOM)
    assert repr(name) in str(refused.value)
    return str(refused.value).partition("near: ")[2]


def test_an_unknown_name_suggests_models_of_its_family() -> None:
    import timm

    near = _unknown("test_no_such_net").split(", ")
    assert len(near) >= 2
    assert all(timm.is_model(name) and name.startswith("test_") for name in near)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("test_vitt", "test_vit"),
        ("vit_smal_patch16_224", "vit_small_patch16_224"),
        ("resnt10t", "resnet10t"),
    ],
)
def test_a_slip_of_the_pen_suggests_the_name_that_was_meant(typed: str, meant: str) -> None:
    assert meant in _unknown(typed).split(", ")


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet"])
def test_a_vector_depends_on_its_own_patch_alone_bit_for_bit(name: str, patches: np.ndarray) -> None:
    encoder = load_encoder(f"timm:{name}", RANDOM)
    together = encoder.encode(patches)
    for size in (1, 5, 16, 23):
        some = patches[: 2 * size + 1]
        parts = [encoder.encode(some[i : i + size]) for i in range(0, len(some), size)]
        assert np.array_equal(np.concatenate(parts), together[: len(some)]), size
    order = np.random.default_rng(3).permutation(len(patches))
    assert np.array_equal(encoder.encode(patches[order]), together[order])


def test_no_patches_give_no_vectors(encoder: Encoder, patches: np.ndarray) -> None:
    assert encoder.encode(patches[:0]).shape == (0, DIM)


@pytest.mark.parametrize("factor", [2, 3])
def test_larger_patches_are_resized_to_the_model_s_input(
    encoder: Encoder, patches: np.ndarray, factor: int
) -> None:
    """Smooth patches twice or thrice as large show the same, and a crop of them does not."""
    y, x = (np.mgrid[: SIDE * factor, : SIDE * factor] + 0.5) / (SIDE * factor)
    turns = np.arange(1, 6)[:, None, None, None] * np.array([1.0, 1.7, 2.3])
    waves = 0.5 + 0.45 * np.sin(np.pi * turns * (x[..., None] + 0.6 * y[..., None]))
    large = np.round(255 * waves).astype(np.uint8)
    means = large.reshape(5, SIDE, factor, SIDE, factor, 3).mean(axis=(2, 4))
    own_size = encoder.encode(np.round(means).astype(np.uint8))
    crop = encoder.encode(np.ascontiguousarray(large[:, :SIDE, :SIDE]))
    resized = np.abs(encoder.encode(large) - own_size).max()
    assert resized < 0.05
    assert np.abs(crop - own_size).max() > 10 * resized


def test_detail_too_fine_for_the_model_s_input_is_averaged_as_pillow_does(encoder: Encoder) -> None:
    rng = np.random.default_rng(2)
    noisy = rng.integers(0, 256, (3 * SIDE, 3 * SIDE, 3), dtype=np.uint8)
    averaged = np.asarray(Image.fromarray(noisy).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    sampled = np.ascontiguousarray(noisy[1::3, 1::3])
    found, as_pillow, aliased = (encoder.encode(patch[None]) for patch in (noisy, averaged, sampled))
    assert np.abs(found - as_pillow).max() < 0.05
    assert np.abs(found - aliased).max() > 0.5


@pytest.mark.parametrize("side", [37, 96, 224, 513])
def test_patches_of_any_side_are_taken(encoder: Encoder, side: int) -> None:
    flat = np.full((2, side, side, 3), (211, 157, 193), np.uint8)
    own_size = np.full((2, SIDE, SIDE, 3), (211, 157, 193), np.uint8)
    np.testing.assert_allclose(encoder.encode(flat), encoder.encode(own_size), atol=1e-4)


def test_the_identity_names_what_decides_the_vectors(encoder: Encoder) -> None:
    identity = encoder.identity
    assert (identity.key, identity.dim) == (KEY, DIM)
    assert {"architecture", "weights", "pooling", "steps", "dtype"} <= set(identity.facts)
    resize, *_, normalise = identity.facts["steps"]
    assert resize["resize"] == SIDE
    assert normalise == {"mean": [0.5] * 3, "std": [0.5] * 3}
