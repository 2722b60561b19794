"""The size and the channels of a network's images."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

import dgnet
from dgnet.checkpoint import fit_weights
from dgnet.errors import UsageError
from dgnet.models import adapt_input, adapt_positions, create_model, find_channels, match_image_size


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


@pytest.mark.parametrize("is_dynamic", [False, True])
def test_positions_for_images_of_another_size_are_resampled_as_timm_does(is_dynamic):
    state = timm.create_model("test_vit", num_classes=2, img_size=32).state_dict()
    static = timm.create_model("test_vit", num_classes=2, img_size=64)
    expected = checkpoint_filter_fn(state, static)["pos_embed"]
    network = dgnet.convert(static) if is_dynamic else static
    adapted = adapt_positions(network, state, ["pos_embed"])
    assert list(adapted) == ["pos_embed"]
    assert torch.equal(adapted["pos_embed"], expected)
    loaded = fit_weights(network, "test_vit", Path("weights"), state)
    assert torch.equal(network.state_dict()["pos_embed"], expected)
    assert loaded.resampled == "resampled pos_embed for images of another size"


def test_weights_of_another_network_are_not_resampled():
    network = timm.create_model("test_vit", num_classes=2)
    assert adapt_positions(network, {"pos_embed": torch.ones(3), "patch_embed.proj.weight": torch.ones(1)}, ["pos_embed"]) == {}
    state = {**network.state_dict(), "pos_embed": torch.ones(1, 5, 32)}
    with pytest.raises(UsageError, match=r"weights does not hold the weights of test_vit \(pos_embed has the shape"):
        fit_weights(network, "test_vit", Path("weights"), state)


def test_a_network_for_one_size_is_built_for_the_size_of_the_images():
    assert match_image_size("vit_tiny_patch16_224", {}, 64) == ({"img_size": 64}, 64)
    assert match_image_size("vit_tiny_patch16_224", {"img_size": 64}, None) == ({"img_size": 64}, 64)
    assert match_image_size("vit_tiny_patch16_224", {}, None) == ({}, None)
    assert match_image_size("vit_tiny_patch16_224", {"img_size": 32, "dynamic_img_size": True}, 64)[0]["img_size"] == 32
    assert match_image_size("resnet18", {}, 64) == ({}, 64)
