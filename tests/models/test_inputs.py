"""The size and the channels of a network's images."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from dgnet.models import adapt_input, create_model, find_channels, match_image_size


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "vit_tiny_patch16_224", "mixer_s32_224", "test_convnext"])
def test_channels_are_found_in_networks_of_all_kinds(name):
    with torch.device("meta"):
        assert find_channels(timm.create_model(name, in_chans=2)) == 2
    assert find_channels(nn.Linear(2, 2)) == 3


def test_weights_for_rgb_give_a_grey_image_the_same_features():
    rgb, grey = create_model("resnet20", num_classes=3).eval(), create_model("resnet20", num_classes=3, in_chans=1).eval()
    grey.load_state_dict(adapt_input(grey, rgb.state_dict()))
    image = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(grey(image), rgb(image.expand(-1, 3, -1, -1)))
    assert all(torch.equal(value, rgb.state_dict()[name]) for name, value in adapt_input(rgb, rgb.state_dict()).items())


def test_a_network_for_one_size_is_built_for_the_size_of_the_images():
    assert match_image_size("vit_tiny_patch16_224", {}, 64) == ({"img_size": 64}, 64)
    assert match_image_size("vit_tiny_patch16_224", {"img_size": 64}, None) == ({"img_size": 64}, 64)
    assert match_image_size("vit_tiny_patch16_224", {}, None) == ({}, None)
    assert match_image_size("vit_tiny_patch16_224", {"img_size": 32, "dynamic_img_size": True}, 64)[0]["img_size"] == 32
    assert match_image_size("resnet18", {}, 64) == ({}, 64)
