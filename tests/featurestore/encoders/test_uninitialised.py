"""Networks that a file will fill are built without drawing weights; with the weights they are the same network."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from featurestore.encoders.timm_import import import_timm
from featurestore.encoders.uninitialised import without_initialisation


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count the numbers that are drawn into parameters."""
    counts: list[int] = []
    for name in ("normal_", "uniform_"):
        original = getattr(torch.Tensor, name)

        def counting(self: torch.Tensor, *args: Any, original: Any = original, **kwargs: Any) -> torch.Tensor:
            counts.append(self.numel())
            found: torch.Tensor = original(self, *args, **kwargs)
            return found

        counting.__name__ = name
        monkeypatch.setattr(torch.Tensor, name, counting)
    yield counts


@pytest.mark.parametrize(
    "name", ["test_vit", "test_convnext", "test_efficientnet", "swin_tiny_patch4_window7_224", "resnet18"]
)
def test_filled_it_gives_the_vectors_of_one_that_was_drawn(name: str) -> None:
    timm = import_timm()
    drawn = timm.create_model(name, num_classes=0).eval()
    with without_initialisation():
        filled = timm.create_model(name, num_classes=0).eval()
    buffers = dict(drawn.named_buffers())
    for key, buffer in filled.named_buffers():
        assert torch.equal(buffer, buffers[key]), key
    filled.load_state_dict(drawn.state_dict())
    side = timm.data.resolve_model_data_config(drawn)["input_size"][-1]
    images = torch.rand(2, 3, side, side)
    with torch.inference_mode():
        assert torch.equal(filled(images), drawn(images))


def test_no_number_is_drawn_inside_and_as_ever_outside(drawn: list[int]) -> None:
    timm = import_timm()
    with without_initialisation():
        timm.create_model("test_vit", num_classes=0)
        torch.zeros(3).normal_()  # no parameter
    assert drawn == [3]
    timm.create_model("test_vit", num_classes=0)
    assert sum(drawn) > 100_000
