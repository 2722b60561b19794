"""Which pixels a class comes from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dgnet
from tests.helpers.tools import require, run_page

pytestmark = pytest.mark.filterwarnings("ignore")  # of the tools


def test_captum(routed):
    attr = require("captum.attr")
    scope = run_page("Captum", model=routed)
    image, label, record = scope["image"], scope["label"], scope["record"]
    over_paths, on_one_path = scope["over_paths"], scope["on_one_path"]
    assert over_paths.shape == on_one_path.shape == image.shape
    assert not torch.allclose(over_paths, on_one_path, rtol=0.01)
    path = [matrix[0] for matrix in record.adjacency]
    assert any((matrix == 0)[stage.mask].any() for matrix, stage in zip(path, record.topology, strict=True))
    with torch.no_grad(), dgnet.use_connectivity(routed, path):
        rise = routed(image)[0, label] - routed(torch.zeros_like(image))[0, label]
    assert float(on_one_path.sum()) == pytest.approx(float(rise), rel=0.05, abs=1e-3)  # complete on one path

    for method, options in (
        (attr.Saliency(routed), {}),
        (attr.InputXGradient(routed), {}),
        (attr.Occlusion(routed), {"sliding_window_shapes": (3, 16, 16), "strides": (3, 16, 16)}),
    ):
        assert method.attribute(image, target=label, **options).shape == image.shape
    assert attr.LayerGradCam(routed, routed.layer3).attribute(image, target=label).shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    ("method", "error", "reason"), [("DeepLift", RuntimeError, "more than once"), ("LRP", TypeError, "rule")]
)
def test_methods_with_rules_for_each_layer_are_refused_by_captum(routed, method, error, reason):
    attr = require("captum.attr")
    with pytest.raises(error, match=reason):
        getattr(attr, method)(routed).attribute(torch.randn(1, 3, 32, 32), target=0)


def test_grad_cam(routed):
    cams = require("pytorch_grad_cam")
    images = torch.randn(8, 3, 32, 32)
    scope = run_page("Grad-CAM", model=routed, images=images)
    heat, of_block = scope["heat"], scope["heat_of_block"]
    assert heat.shape == of_block.shape == (8, 32, 32)
    assert heat.min() >= 0
    assert heat.max() <= 1
    with torch.no_grad(), dgnet.record_connectivity(routed) as record:
        routed(images)
    with cams.GradCAM(model=routed, target_layers=[routed.layer3.nodes[-1]]) as cam:
        for is_open in (True, False):
            path = [matrix.clone() for matrix in record.adjacency]
            path[-1][:, -1, -2] = float(is_open)  # the edge from the last block to the output node, its only out-edge
            with dgnet.use_connectivity(routed, path):
                assert bool(np.any(cam(images, targets=None))) == is_open
