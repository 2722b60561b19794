"""DG-Nets as the backbones of other people's networks."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import FeaturePyramidNetwork

import dgnet
from dgnet.errors import UsageError
from dgnet.graph import find_stages
from tests.helpers.networks import shake_norms, spread_routers
from tests.helpers.tools import require, run_page

pytestmark = pytest.mark.filterwarnings("ignore")  # of the tools


def test_segmentation_models():
    smp = require("segmentation_models_pytorch")
    scope = run_page("segmentation_models_pytorch")
    network = scope["network"]
    stages = find_stages(network)
    assert all(stage.node_gates is not None for stage in stages)
    assert all(value.grad is not None for name, value in network.named_parameters() if "layer1.nodes" in name)
    for stage in stages:
        spread_routers(stage)
    network.eval()
    with torch.no_grad(), dgnet.record_connectivity(network) as record:
        masks = network(scope["photos"])
        dgnet.set_sparse(network, "plain")
        sparse = network(scope["photos"])
    assert masks.shape == (2, 2, 64, 64)
    assert not torch.cat(record.ran, 1).all()  # some blocks are skipped
    torch.testing.assert_close(sparse, masks, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(scope["dynamic"].eval()(scope["photos"]), scope["trained"].eval()(scope["photos"]))
    assert len(find_stages(scope["dynamic"])) == 4
    for kind in (smp.FPN, smp.DeepLabV3Plus):
        assert kind("tu-dg_resnet18", encoder_weights=None).eval()(scope["photos"]).shape == (2, 1, 64, 64)


def test_segmentation_models_refuses_what_the_table_says():
    smp = require("segmentation_models_pytorch")
    with pytest.raises(ValueError, match="downsampling"):
        smp.Unet("tu-dg_resnet20", encoder_weights=None)
    for kind in (smp.DeepLabV3Plus, smp.DeepLabV3):
        with pytest.raises(UsageError, match="output_stride"):
            kind("tu-dg_randwire_small", encoder_weights=None)


def test_torchvision():
    scope = run_page("torchvision's FPN")
    assert [tuple(level.shape[1:]) for level in scope["maps"].values()] == [(256, side, side) for side in (16, 8, 4, 2, 1)]
    backbone, pyramid = scope["backbone"], shake_norms(scope["pyramid"]).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), dgnet.record_connectivity(pyramid) as record:
        open_maps = pyramid(images)
        closed = [matrix.clone() for matrix in record.adjacency]
        closed[-1][:, -1, 1:] = 0  # nothing but the input node reaches the output node of the last stage
        with dgnet.use_connectivity(pyramid, closed):
            closed_maps = pyramid(images)
    assert len(find_stages(backbone)) == len(record.adjacency) == 4
    assert not torch.equal(open_maps["3"], closed_maps["3"])
    features = dgnet.create_model("dg_resnet18", features_only=True, out_indices=(1, 2, 3, 4))
    levels = dict(zip("abcd", features(images), strict=True))
    assert list(FeaturePyramidNetwork(features.feature_info.channels(), 16)(levels)) == list("abcd")
