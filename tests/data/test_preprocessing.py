"""Preprocessing from a network's timm config, compared with timm's own."""

from __future__ import annotations

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image

from dgnet.data import Preprocessing
from dgnet.errors import UsageError
from dgnet.models import create_model
from dgnet.training import TrainConfig
from dgnet.typed import read_word

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8))
CFG = {"input_size": (3, 32, 32), "mean": (0.1, 0.2, 0.6), "std": (0.2, 0.3, 0.4), "interpolation": "bilinear", "crop_pct": 0.8}


@pytest.mark.parametrize("mode", [None, "center", "squash", "border"])
def test_images_are_prepared_as_timm_does(mode):
    cfg = {**CFG, "crop_mode": mode}
    own = Preprocessing.of(cfg)
    expected = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=cfg))
    assert torch.equal(own.evaluation_transform()(PHOTO), expected(PHOTO))
    assert Preprocessing(**{name: tuple(v) if isinstance(v, list) else v for name, v in own.to_dict().items()}) == own


def test_a_networks_own_config_is_followed():
    for name in ("tf_efficientnet_lite0", "convnext_femto.d1_in1k"):
        network = create_model(name)
        expected = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
        assert torch.equal(Preprocessing.of(network.pretrained_cfg).evaluation_transform()(PHOTO), expected(PHOTO))


def test_a_side_of_no_pixels_is_not_the_default():
    with pytest.raises(UsageError, match="image_size must be 1 to 10000, got 0"):
        Preprocessing.of(CFG, image_size=0)


def test_one_number_is_the_mean_of_all_channels():
    assert Preprocessing.of(CFG, mean=0.5, std=[0.25]) == Preprocessing.of(CFG, mean=[0.5] * 3, std=[0.25] * 3)
    assert TrainConfig(mean=0.5).mean == read_word(list[float] | float | None, "0.5", "--mean") == 0.5
    assert TrainConfig(mean=[0.5]).mean == [0.5]


def test_grey_images_have_the_mean_over_rgb():
    grey = Preprocessing.of(CFG, in_chans=1)
    assert grey.mean == pytest.approx((0.3,))
    assert grey.std == pytest.approx((0.3,))
    level = Image.new("RGB", (40, 40), (51, 51, 51))
    for transform in (grey.evaluation_transform(), grey.training_transform("rrc", 0.5), grey.training_transform("none", 0.5)):
        torch.testing.assert_close(transform(level), torch.full((1, 32, 32), (0.2 - 0.3) / 0.3))
    assert grey.training_transform("pad-crop", 0.5)(level).shape == (1, 32, 32)


def test_one_value_counts_for_all_channels():
    assert Preprocessing.of(CFG, mean=[0.5], std=[0.1, 0.2, 0.3]).mean == (0.5, 0.5, 0.5)
    with pytest.raises(UsageError, match="mean and std must have 3 values each, for RGB images, or 1 each, for grey ones"):
        Preprocessing((8, 8), (0.5,) * 4, (0.5,) * 4)
