import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from morphology_by_definition import morphology
from numpy.typing import NDArray

from featurestore.encoders import stain_separation
from featurestore.encoders.device import pick_device
from featurestore.encoders.handcrafted.colour import ColourEncoder
from featurestore.encoders.handcrafted.morphology import feature_names
from featurestore.encoders.handcrafted.morphology_features import moments, nuclei, oriented_filters
from featurestore.encoders.handcrafted.morphology_features.moments import Moments
from featurestore.encoders.handcrafted.morphology_features.morphology_encoder import MorphologyEncoder
from featurestore.encoders.loading import load_encoder
from featurestore.encoders.protocol import Encoder, EncoderOptions
from featurestore.errors import EncoderError
from featurestore.slides.open_slide import open_slide

CPU = EncoderOptions(device="cpu")
GLASS = (241, 235, 239)
NUCLEUS = (81, 61, 127)


@pytest.fixture(scope="module")
def encoder() -> MorphologyEncoder:
    return MorphologyEncoder(CPU)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tissue(n: int, height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Pink noise that is smooth over a few pixels: patches with something at every octave."""
    rng = np.random.default_rng(seed)
    levels = np.zeros((n, height, width, 3))
    for octave in range(5):
        side = 2**octave
        coarse = rng.normal(size=(n, -(-height // side), -(-width // side), 3))
        levels += coarse.repeat(side, axis=1).repeat(side, axis=2)[:, :height, :width]
    return np.clip(levels * 19 + (197, 131, 173), 0, 255).astype(np.uint8)


def discs(side: int, radius: float, pitch: int) -> tuple[NDArray[np.uint8], int]:
    """Dark discs on glass, on a lattice; returns the patch and how many discs it holds."""
    y, x = np.mgrid[:side, :side]
    inside = np.hypot(y % pitch - pitch / 2, x % pitch - pitch / 2) < radius
    patch = np.where(inside[..., None], np.array(NUCLEUS), np.array(GLASS)).astype(np.uint8)
    return patch[None], (side // pitch) ** 2


def value(encoder: Encoder, patches: NDArray[np.uint8], name: str) -> float:
    return float(encoder.encode(patches)[0, feature_names().index(name)])


def test_every_number_has_its_own_name(encoder: MorphologyEncoder) -> None:
    assert len(set(feature_names())) == len(feature_names()) == encoder.identity.dim
    assert encoder.encode(tissue(2, 61, 67)).shape == (2, encoder.identity.dim)
    assert 100 <= encoder.identity.dim <= 512


def test_every_name_is_explained_in_the_docs() -> None:
    text = (Path(__file__).parents[3] / "docs" / "morphology.md").read_text()
    last_words = {name.split(".", 1)[1] for name in feature_names() if name.startswith("octave")}
    for stat in {word.split(".")[-1] for word in last_words} - {"lowpass", "band", "texture"}:
        assert f"`{stat}`" in text
    assert f"{len(feature_names())} numbers" in text


@pytest.mark.parametrize("side", [37, 224])
def test_a_row_depends_neither_on_the_batch_nor_on_the_threads(
    encoder: MorphologyEncoder, threads: None, side: int
) -> None:
    n = 32 if side < 100 else 11
    patches = tissue(n, side, side + 5)
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found += [
            np.concatenate([encoder.encode(patches[i : i + size]) for i in range(0, n, size)])
            for size in (1, 3, 7, n)
        ]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


def test_large_patches_do_not_depend_on_the_threads(encoder: MorphologyEncoder, threads: None) -> None:
    patches = tissue(2, 601, 587)
    torch.set_num_threads(1)
    alone = encoder.encode(patches)
    torch.set_num_threads(2)
    np.testing.assert_array_equal(alone, encoder.encode(patches))


def test_patches_in_another_order_give_the_rows_in_that_order(encoder: MorphologyEncoder) -> None:
    patches = tissue(5, 43, 53)
    order = [3, 0, 4, 1, 2]
    found = encoder.encode(patches)
    assert len(np.unique(found, axis=0)) == 5
    np.testing.assert_array_equal(encoder.encode(patches[order]), found[order])


def test_a_view_into_a_larger_picture_encodes_as_its_copy(encoder: MorphologyEncoder) -> None:
    picture = tissue(1, 101, 103)[0]
    view = picture[7:48, 11:54][None]
    np.testing.assert_array_equal(encoder.encode(view), encoder.encode(view.copy()))


@pytest.mark.parametrize("side", [32, 33, 71])
def test_flat_patches_have_no_texture_and_nothing_is_not_finite(
    encoder: MorphologyEncoder, side: int
) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (61, 1, 1, 3))
    colours[:3] = np.array([0, 255, 254])[:, None, None, None]
    found = encoder.encode(np.broadcast_to(colours, (61, side, side, 3)).astype(np.uint8))
    assert np.isfinite(found).all()
    levels = np.array([".mean" in name or ".p" in name for name in feature_names()])
    assert np.abs(found[:, ~levels]).max() < 1e-4


def test_extreme_patches_fit_float16(encoder: MorphologyEncoder) -> None:
    rng = np.random.default_rng(0)
    patches = rng.choice(np.array([0, 255], dtype=np.uint8), (7, 97, 89, 3))
    patches[0] = 255
    patches[0, 5, 5] = 0
    found = encoder.encode(patches)
    assert np.abs(found).max() < 1e4
    assert np.isfinite(found.astype(np.float16)).all()


def test_float16_keeps_what_tells_patches_apart(encoder: MorphologyEncoder) -> None:
    found = encoder.encode(tissue(23, 97, 89))
    error = found.astype(np.float16).astype(np.float32) - found
    spread = found.std(axis=0)
    moving = spread > 1e-4
    assert moving.mean() > 0.7
    assert (np.abs(error).max(axis=0)[moving] < 0.1 * spread[moving]).all()


def test_a_quarter_turn_hardly_changes_the_vector(encoder: MorphologyEncoder) -> None:
    noise = tissue(11, 96, 96).astype(np.float64)
    # Noise made of squares lies on the lattice that the filters sample; smoothing takes it off.
    for axis in (1, 2):
        noise = np.mean([np.roll(noise, shift, axis) for shift in range(5)], axis=0)
    patches = noise.astype(np.uint8)
    turned = np.ascontiguousarray(np.rot90(patches, axes=(1, 2)))
    one, other = encoder.encode(patches), encoder.encode(turned)
    # The finest octave is sampled at every other pixel, so its rarest answers (a skewness) move a little.
    np.testing.assert_allclose(other, one, atol=0.1, rtol=0.12)
    assert np.median(np.abs(other - one) / (np.abs(one) + 1e-3)) < 0.01


def test_a_wave_answers_at_its_own_octave(encoder: MorphologyEncoder) -> None:
    x = np.arange(160)
    for octave in (1, 2, 3):
        grey = 150 + 40 * np.sin(2 * np.pi * x / (oriented_filters.WAVELENGTH * 2**octave))
        patch = np.broadcast_to(grey[None, None, :, None], (1, 160, 160, 3)).astype(np.uint8)
        answers = [value(encoder, patch, f"octave{i}.eosin.texture") for i in range(oriented_filters.OCTAVES)]
        assert int(np.argmax(answers)) == octave


def test_stripes_are_anisotropic_and_noise_is_not(encoder: MorphologyEncoder) -> None:
    x = np.arange(160)
    grey = 150 + 40 * np.sin(2 * np.pi * x / 10)
    stripes = np.broadcast_to(grey[None, None, :, None], (1, 160, 160, 3)).astype(np.uint8)
    noise = tissue(1, 160, 160)
    for patches, low, high in ((stripes, 1.0, 4.0), (noise, 0.0, 0.5)):
        spread = value(encoder, patches, "octave1.haematoxylin.anisotropy")
        assert low <= spread / value(encoder, patches, "octave1.haematoxylin.texture") <= high


@pytest.mark.parametrize("radius", [4.0, 6.0, 8.0])
def test_discs_are_counted_as_nuclei(encoder: MorphologyEncoder, radius: float) -> None:
    side, pitch = 210, 30
    patch, count = discs(side, radius, pitch)
    assert value(encoder, patch, "nuclei.over0.16") == pytest.approx(count / side**2 * 10_000, rel=0.1)


def test_larger_discs_are_larger_nuclei(encoder: MorphologyEncoder) -> None:
    sizes = [value(encoder, discs(210, radius, 42)[0], "nuclei.log2_sigma") for radius in (3, 4, 6, 9)]
    assert sizes == sorted(sizes)
    assert sizes[-1] - sizes[0] > 1


def test_each_dye_alone_is_seen_as_that_dye() -> None:
    for index, dye in enumerate(stain_separation.DYES_RGB):
        unit = np.array(dye) / np.linalg.norm(dye)
        colour = np.round(256 * 10 ** (-0.7 * unit) - 1).astype(np.uint8)
        patch = torch.from_numpy(np.broadcast_to(colour, (1, 3, 5, 3)).copy())
        found = stain_separation.separate(
            patch, stain_separation.density_table(), stain_separation.unmixing()
        )
        assert found.shape == (1, 3, 3, 5)
        expected = np.zeros(3)
        expected[index] = 0.7
        np.testing.assert_allclose(found[0, :, 1, 2].numpy(), expected, atol=0.02)


def test_percentiles_are_those_of_numpy_up_to_a_bin() -> None:
    values = np.random.default_rng(0).gamma(2.0, 0.3, (2, 3, 5003)).astype(np.float32)
    shares = (0.02, 0.25, 0.5, 0.9)
    found = moments.percentiles(torch.from_numpy(values), shares, -0.5, 3.5, 800)
    expected = np.moveaxis(np.quantile(values, shares, axis=2), 0, 2)
    np.testing.assert_allclose(found.numpy(), expected, atol=0.006)


def test_moments_are_those_of_numpy() -> None:
    values = np.random.default_rng(0).gamma(2.0, 1.0, (2, 3, 4001))
    found = Moments.from_maps(torch.from_numpy(values), 2)
    np.testing.assert_allclose(found.mean.numpy(), values.mean(2))
    np.testing.assert_allclose(found.sd.numpy(), values.std(2))
    centred = (values - values.mean(2, keepdims=True)) / values.std(2, keepdims=True)
    np.testing.assert_allclose(found.skew.numpy(), (centred[:, :2] ** 3).mean(2), rtol=0.01)
    pearson = [np.corrcoef(patch)[[0, 2], [1, 0]] for patch in values]
    np.testing.assert_allclose(found.correlation([0, 2], [1, 0]).numpy(), pearson, rtol=0.01)


@pytest.mark.parametrize(("height", "width"), [(32, 57), (61, 118), (131, 96)])
def test_every_number_is_what_its_definition_gives(
    encoder: MorphologyEncoder, height: int, width: int
) -> None:
    patches = tissue(3, height, width)
    found = encoder.encode(patches)
    wanted = np.array([[morphology(patch)[name] for name in feature_names()] for patch in patches])
    spread = found.std(0)
    is_percentile = np.array([".p" in name for name in feature_names()])
    np.testing.assert_allclose(found[:, is_percentile], wanted[:, is_percentile], atol=0.006)  # one bin
    error = np.abs(found - wanted)[:, ~is_percentile]
    assert (error <= 1e-3 * spread[~is_percentile] + 1e-5).all()


def test_halving_leaves_an_odd_edge_out() -> None:
    maps = torch.arange(2 * 5 * 7, dtype=torch.float32).reshape(1, 2, 5, 7)
    np.testing.assert_allclose(moments.halve(maps).numpy(), torch.nn.functional.avg_pool2d(maps, 2).numpy())


def test_filters_do_not_answer_to_a_flat_map_or_differ_in_strength() -> None:
    bank = oriented_filters.filters()
    assert bank.sum(dim=(1, 2, 3)).abs().max() < 1e-6
    norms = bank.square().sum(dim=(1, 2, 3)).sqrt()
    assert norms.max() / norms.min() < 1.2


def test_blob_scales_are_those_that_the_names_say() -> None:
    rows = nuclei.gaussians()[:, 0].numpy()
    x = np.arange(rows.shape[1]) - rows.shape[1] // 2
    np.testing.assert_allclose(np.sqrt((rows * x**2).sum(1))[:-1], nuclei.SIGMAS, rtol=0.01)


@pytest.mark.parametrize("key", ["morphology", "colour"])
def test_nothing_in_is_nothing_out(key: str) -> None:
    found = load_encoder(key, CPU).encode(np.empty((0, 64, 64, 3), dtype=np.uint8))
    assert found.shape == (0, load_encoder(key, CPU).identity.dim)
    assert found.dtype == np.float32


@pytest.mark.parametrize("key", ["morphology", "colour"])
def test_identity_is_the_same_each_time_and_survives_json(key: str) -> None:
    one, other = (load_encoder(key, CPU).identity for _ in range(2))
    assert one.key == key
    assert one.fingerprint == other.fingerprint
    again = replace(one, facts=json.loads(json.dumps(one.facts)))
    assert again.fingerprint == one.fingerprint


def test_another_parameter_is_another_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    before = MorphologyEncoder(CPU).identity.fingerprint
    monkeypatch.setattr(oriented_filters, "WAVELENGTH", 4.0)
    assert MorphologyEncoder(CPU).identity.fingerprint != before


def test_encoding_leaves_torch_as_it_was(encoder: MorphologyEncoder) -> None:
    before = (
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.initial_seed(),
    )
    encoder.encode(tissue(3, 41, 47))
    after = (
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.initial_seed(),
    )
    assert before == after


@pytest.mark.parametrize(
    ("patches", "reason"),
    [
        (np.zeros((2, 31, 64, 3), dtype=np.uint8), "31 x 64"),
        (np.zeros((2, 64, 64, 3), dtype=np.float32), "float32"),
        (np.zeros((64, 64, 3), dtype=np.uint8), r"\(64, 64, 3\)"),
        (np.zeros((2, 64, 64, 4), dtype=np.uint8), r"\(2, 64, 64, 4\)"),
    ],
)
def test_what_is_no_batch_of_patches_is_refused(
    encoder: MorphologyEncoder, patches: NDArray[np.uint8], reason: str
) -> None:
    with pytest.raises(EncoderError, match=reason):
        encoder.encode(patches)


@pytest.mark.parametrize("kind", [MorphologyEncoder, ColourEncoder])
def test_weights_are_refused_where_there_are_none(
    kind: type[MorphologyEncoder] | type[ColourEncoder],
) -> None:
    with pytest.raises(EncoderError, match="no weights"):
        kind(EncoderOptions(weights="some.safetensors", device="cpu"))


def test_an_unknown_device_is_refused_with_the_known_ones() -> None:
    with pytest.raises(EncoderError, match="auto, cpu, cuda"):
        pick_device("mps")


def test_auto_takes_what_there_is() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu").type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(EncoderError, match="use auto or cpu"):
        pick_device("cuda")


def test_colour_is_mean_and_sd_of_each_channel() -> None:
    patches = tissue(3, 41, 47)
    found = ColourEncoder(CPU).encode(patches)
    light = patches.reshape(3, -1, 3) / 255
    np.testing.assert_allclose(found, np.hstack([light.mean(1), light.std(1)]), atol=1e-5)


@pytest.mark.gpu
def test_a_gpu_gives_nearly_the_same_vectors(encoder: MorphologyEncoder) -> None:
    patches = tissue(37, 224, 224)
    other = MorphologyEncoder(EncoderOptions(device="cuda")).encode(patches)
    one = encoder.encode(patches)
    cosine = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    assert cosine.min() >= 0.99999


@pytest.mark.data
def test_every_number_varies_over_real_tissue_and_stays_apart_in_float16(
    encoder: MorphologyEncoder, data_dir: Path
) -> None:
    slide = open_slide(str(data_dir / "her2st" / "C3.tif"))
    spots = [(x, y) for y in range(3000, 7000, 800) for x in range(3000, 7000, 800)]
    patches = np.stack([slide.read_region(x, y, 224, 224, slide.mpp) for x, y in spots])
    slide.close()
    found = encoder.encode(patches)
    resolution = np.spacing(np.abs(found).max(axis=0).astype(np.float16)).astype(np.float32)
    assert (found.std(axis=0) > 4 * resolution).all()


@pytest.mark.parametrize("side", [1, 224, 256, 517])
def test_colour_is_exact_to_the_last_bit_of_its_float32(side: int) -> None:
    rng = np.random.default_rng(side)
    patches = rng.integers(0, 256, (3, side, side + 2, 3), dtype=np.uint8)
    patches[1], patches[2, ..., 1] = 255, 254  # the largest sums
    exact = patches.reshape(3, -1, 3).astype(np.float64)
    wanted = np.concatenate([exact.mean(1), exact.std(1)], axis=1) / 255
    np.testing.assert_allclose(ColourEncoder(EncoderOptions()).encode(patches), wanted, rtol=6e-8, atol=1e-12)
