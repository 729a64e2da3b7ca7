"""Preprocessing in torch is that of PIL and torchvision, for every pipeline that a record names."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from featurestore.encoders.golden import golden_image
from featurestore.encoders.preprocessing import Preprocess, resize_in_floats
from featurestore.encoders.protocol import EncoderOptions
from featurestore.encoders.records import Preprocessing, records
from featurestore.encoders.timm_import import define_torchvision_operators
from featurestore.encoders.vision import load_timm
from featurestore.errors import EncoderError

CPU = torch.device("cpu")
LEVELS, MEAN_LEVELS = 2, 0.1
"""Grey levels by which a resampled byte may differ from PIL's, and on average."""
COSINE = 0.9999


def _pipelines() -> Iterator[tuple[str, Preprocessing]]:
    seen: set[Preprocessing] = set()
    for key, record in records().items():
        if record.preprocessing not in seen:
            seen.add(record.preprocessing)
            yield key, record.preprocessing


PIPELINES = dict(_pipelines())


def _patches(side: int) -> np.ndarray:
    """Stained, with grain and edges, another part of the picture for each."""
    whole = golden_image(2 * side)
    return np.stack([whole[:side, :side], whole[side:, side:], whole[side // 2 :, :side][:side]])


def _as_published(how: Preprocessing, patches: np.ndarray) -> torch.Tensor:
    define_torchvision_operators()
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    steps = [transforms.Resize(how.resize_px, interpolation=InterpolationMode(how.interpolation))]
    if how.crop_px is not None:
        steps.append(transforms.CenterCrop(how.crop_px))
    steps += [transforms.ToTensor(), transforms.Normalize(how.mean, how.std)]
    whole = transforms.Compose(steps)
    return torch.stack([whole(Image.fromarray(patch)) for patch in patches])


@pytest.mark.parametrize("side", [224, 256, 320, 512])
@pytest.mark.parametrize("key", PIPELINES)
def test_a_pipeline_is_the_published_one(key: str, side: int) -> None:
    how = PIPELINES[key]
    patches = _patches(side)
    found = Preprocess(how, CPU)(torch.from_numpy(patches))
    expected = _as_published(how, patches)
    assert found.shape == expected.shape
    std = torch.tensor(how.std).view(3, 1, 1)
    levels = (found - expected).abs() * std * 255
    assert levels.max() <= (0 if side == how.resize_px else LEVELS) + 1e-3
    assert levels.mean() <= MEAN_LEVELS


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side", [256, 320, 512])
def test_the_way_on_a_gpu_gives_pil_s_grey_levels(mode: str, side: int) -> None:
    patches = _patches(side)
    found = resize_in_floats(torch.from_numpy(patches).permute(0, 3, 1, 2), (224, 224), mode)
    method = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[mode]
    expected = np.stack([np.asarray(Image.fromarray(patch).resize((224, 224), method)) for patch in patches])
    difference = np.abs(found.permute(0, 2, 3, 1).numpy() - expected.astype(np.float32))
    assert difference.max() <= LEVELS
    assert difference.mean() <= MEAN_LEVELS


def test_what_the_tolerance_does_to_an_embedding_is_less_than_one_in_ten_thousand() -> None:
    network = load_timm(
        "timm:vit_tiny_patch16_224", EncoderOptions(random_weights=True, device="cpu")
    )._network
    how = Preprocessing(224, None, "bicubic", (0.5,) * 3, (0.5,) * 3)
    patches = _patches(320)
    with torch.inference_mode():
        ours = network(Preprocess(how, CPU)(torch.from_numpy(patches)))
        published = network(_as_published(how, patches))
        floats = resize_in_floats(torch.from_numpy(patches).permute(0, 3, 1, 2), (224, 224), "bicubic")
        on_gpu = network((floats / 255 - 0.5) / 0.5)
    for found in (ours, on_gpu):
        assert torch.cosine_similarity(found, published).min() >= COSINE
    # Otherwise the cosine could not tell a wrong pipeline from the right one.
    wrong = network((floats / 255 - 0.45) / 0.22)
    assert torch.cosine_similarity(wrong, published).min() < COSINE


def test_patches_that_are_not_square_are_refused() -> None:
    how = Preprocessing(224, None, "bilinear", (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(EncoderError, match="64 x 96"):
        Preprocess(how, CPU)(torch.zeros(1, 96, 64, 3, dtype=torch.uint8))
