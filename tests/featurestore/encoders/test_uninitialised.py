"""Networks that a file will fill are built without drawing weights; with the weights they are the same network."""

import pytest
import torch
from torch import nn

from featurestore.encoders.timm_import import import_timm
from featurestore.encoders.uninitialised import without_initialisation


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


def test_no_number_is_drawn_inside_and_as_ever_outside() -> None:
    before = torch.get_rng_state()
    with without_initialisation():
        layers = nn.Linear(7, 11), nn.Conv2d(3, 5, 2)
        for layer in layers:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.xavier_normal_(layer.weight)
        assert torch.equal(torch.get_rng_state(), before)
        torch.zeros(3).normal_()  # no parameter
    between = torch.get_rng_state()
    assert not torch.equal(between, before)
    nn.Linear(7, 11)
    assert not torch.equal(torch.get_rng_state(), between)
