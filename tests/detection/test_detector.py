from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn

import dgnet
from dgnet.detection import Backbone, Detector
from dgnet.detection._checkpoint import load_trained
from dgnet.errors import UsageError
from dgnet.graph import ValidArea, accept_cuts, current_area, find_stages, use_area
from dgnet.inference import fold_batch_norms, set_mode
from tests.helpers.networks import close_some, shake_norms, spread_routers

SIZES = {"short_side": 64, "long_side": 128}
TARGETS = [
    {"boxes": torch.tensor([[5.0, 5, 50, 60]]), "labels": torch.tensor([1])},
    {"boxes": torch.tensor([[8.0, 2, 30, 40], [20, 20, 60, 50]]), "labels": torch.tensor([3, 2])},
]


def test_a_static_detector_is_torchvisions():
    torch.manual_seed(0)
    options = {"min_size": 64, "max_size": 128, "box_score_thresh": 0.0}
    theirs = shake_norms(fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4, **options))
    ours = Detector(dgnet.create_model("resnet50"), 3, **SIZES, options={"box_score_thresh": 0.0})
    ours.load_state_dict(theirs.state_dict())
    images = [torch.rand(3, 60, 100), torch.rand(3, 90, 64)]
    with torch.no_grad():
        for expected, found in zip(theirs.eval()(images), ours.eval()(images), strict=True):
            assert len(expected["boxes"]) > 0
            for name in ("boxes", "labels", "scores"):
                torch.testing.assert_close(found[name], expected[name])
    losses = []
    for detector in (theirs.train(), ours.train()):
        torch.manual_seed(1)
        losses.append(detector(images, TARGETS))
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("name", ["dg_resnet18", "dg_regnety_006"])
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_an_image_gets_the_same_wiring_alone_and_beside_a_large_one(name, mode):
    torch.manual_seed(0)
    # Routers that tell images apart, and close edges.
    network = dgnet.create_model(name, router_bias=0.0, router_std=0.5, threshold=0.3, node_gate="hard", node_gate_bias=0.3)
    detector = Detector(shake_norms(network), 3, **SIZES).eval()
    set_mode(detector, mode)
    small, large = torch.rand(3, 64, 70), torch.rand(3, 128, 64) * 2
    with torch.no_grad(), dgnet.record_connectivity(detector) as alone:
        detector([small])
    with torch.no_grad(), dgnet.record_connectivity(detector) as together:
        detector([large, small])
    adjacency = torch.cat([matrix.flatten(1) for matrix in together.adjacency], dim=1)
    assert not torch.allclose(adjacency[0], adjacency[1])
    for one, both in zip(alone.adjacency, together.adjacency, strict=True):
        torch.testing.assert_close(both[1:], one, atol=1e-5, rtol=0)


def test_routers_of_a_users_own_pool_see_the_image_only():
    seen = []

    def pool(feature):
        seen.append(tuple(feature.shape[2:]))
        return feature.amax((2, 3))

    backbone = Detector(dgnet.create_model("dg_resnet18", router_pool=pool), 3, **SIZES).eval()
    with torch.no_grad():
        backbone([torch.rand(3, 128, 64), torch.rand(3, 64, 64)])
    assert {(32, 16), (16, 16)} <= set(seen)  # the first stage's, of stride 4, image by image


def test_padding_is_known_for_one_forward_only():
    detector = Detector(dgnet.create_model("dg_resnet18"), 3, **SIZES).eval()
    with torch.no_grad():
        detector([torch.rand(3, 64, 70)])
        assert current_area() is None
        assert detector.backbone(torch.rand(1, 3, 64, 64))["0"].shape == (1, 256, 16, 16)


def test_a_folded_backbone_detects_the_same():
    network = shake_norms(dgnet.create_model("dg_resnet18")).eval()
    image = torch.rand(3, 64, 70)
    folded = Detector(fold_batch_norms(network), 3, **SIZES).eval()
    detector = Detector(network, 3, **SIZES).eval()
    folded.load_state_dict({name: value for name, value in detector.state_dict().items() if ".body." not in name}, strict=False)
    with torch.no_grad():
        expected, found = detector([image]), folded([image])
    torch.testing.assert_close(found[0]["scores"], expected[0]["scores"], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "name", ["dg_mobilenetv2_100", "mobilenetv2_100", "dg_regnetx_006", "dg_randwire_small", "efficientnet_b0"]
)
def test_any_network_with_the_four_maps_is_a_backbone(name):
    backbone = Backbone(dgnet.create_model(name), channels=8).eval()
    with torch.no_grad():
        maps = backbone(torch.rand(1, 3, 64, 32))
    assert {level: tuple(feature.shape[1:]) for level, feature in maps.items()} == {
        "0": (8, 16, 8),
        "1": (8, 8, 4),
        "2": (8, 4, 2),
        "3": (8, 2, 1),
        "pool": (8, 1, 1),
    }


def test_boxes_are_float32_under_autocast():
    detector = Detector(dgnet.create_model("resnet18"), 3, **SIZES).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (found,) = detector([torch.rand(3, 64, 70)])
    assert len(found["boxes"])
    assert {found["boxes"].dtype, found["scores"].dtype} == {torch.float32}


def test_where_nothing_reaches_the_output_the_sparse_mode_agrees():
    torch.manual_seed(0)
    with accept_cuts():
        network = dgnet.create_model("dg_resnet18", topology="chain", node_gate="hard", node_gate_bias=-50.0)
    detector = Detector(network, 3, **SIZES).eval()
    images = [torch.rand(3, 64, 70), torch.rand(3, 128, 64)]
    with torch.no_grad():
        expected = detector(images)
        found = set_mode(detector, "sparse")(images)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other["scores"], one["scores"])


def test_a_detectors_weights_from_torchvision_start_one_of_other_classes(tmp_path):
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    frozen = {name: value for name, value in theirs.state_dict().items() if "num_batches_tracked" not in name}
    torch.save(frozen, tmp_path / "coco.pth")
    ours = Detector(dgnet.create_model("resnet50"), 3, **SIZES)
    reset = load_trained(ours, tmp_path / "coco.pth")
    assert {name.rpartition(".")[0] for name in reset} == {
        "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred",
    }
    torch.testing.assert_close(ours.state_dict()["rpn.head.cls_logits.weight"], frozen["rpn.head.cls_logits.weight"])


def test_what_is_frozen_does_not_train():
    backbone = Backbone(dgnet.create_model("dg_resnet18"), frozen_stages=2).train()
    moving = {name.split(".")[0] for name, parameter in backbone.body.named_parameters() if parameter.requires_grad}
    assert moving == {"layer2", "layer3", "layer4"}
    assert not backbone.body.bn1.training
    assert backbone.body.layer2.nodes[0].bn1.training
    backbone = Backbone(dgnet.create_model("resnet18"), frozen_norm=True).train()
    norms = [module for module in backbone.body.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not any(norm.training or norm.weight.requires_grad for norm in norms)
    assert backbone.body.conv1.weight.requires_grad


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        ("dg_resnet20", {}, "has feature maps of strides 1, 2, 4, and detection needs 4, 8, 16, 32"),
        ("vit_tiny_patch16_224", {}, "has feature maps of strides 16, and"),
        ("resnet18", {"frozen_stages": 6}, "--frozen-stages must be 0 to 5 (the stem counts as one), got 6"),
        (
            "resnet18",
            {"options": {"box_score_tresh": 0.1}},
            "no numeric option 'box_score_tresh'; did you mean 'box_score_thresh'?",
        ),
        ("resnet18", {"options": {"rpn_pre_nms_top_n_train": 0.5}}, "rpn_pre_nms_top_n_train must be a whole number, got 0.5"),
        ("resnet18", {"options": {"box_score_thresh": "much"}}, "box_score_thresh must be a number, got 'much'"),
        ("resnet18", {"options": {"min_size": 1}}, "min_size cannot be set: use short_side"),
        ("resnet18", {"options": {"rpn_fg_iou_thresh": 0.2}}, "cannot be built with rpn_fg_iou_thresh=0.2"),
    ],
)
def test_refusals(model, options, expected):
    with pytest.raises(UsageError) as caught:
        Detector(dgnet.create_model(model), 3, **options)
    assert expected in str(caught.value)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "test_convnext", "test_mambaout"])
def test_a_converted_backbone_gives_the_maps_of_the_static_one_and_does_not_read_the_padding(name):
    torch.manual_seed(0)
    static = shake_norms(dgnet.create_model(name)).eval()
    converted = dgnet.convert(static)
    backbones = [Backbone(network, channels=8).eval() for network in (static, converted)]
    backbones[1].fpn.load_state_dict(backbones[0].fpn.state_dict())
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        for level, feature in backbones[0](image).items():
            torch.testing.assert_close(backbones[1](image)[level], feature, atol=1e-4, rtol=1e-3)
        for stage in find_stages(converted):
            spread_routers(stage)
        padded = torch.nn.functional.pad(image, (0, 32, 0, 64))
        padded[..., 64:, :] = padded[..., 96:] = 1  # what a network must not see
        body = backbones[1].body
        taps = {"indices": list(backbones[1].indices), "intermediates_only": True, "stop_early": True}
        alone = body.forward_intermediates(image, **taps)
        with use_area(ValidArea([(64, 96)], (128, 128))):
            found = body.forward_intermediates(padded, **taps)
    for one, other in zip(alone, found, strict=True):
        height, width = one.shape[2:]
        torch.testing.assert_close(other[..., :height, :width], one, atol=1e-4, rtol=1e-3)


def test_a_converted_backbone_runs_in_the_sparse_mode():
    converted = shake_norms(dgnet.create_model("mobilenetv3_small_050", dynamic=True)).eval()
    for stage in find_stages(converted):
        spread_routers(stage)
    close_some(converted, torch.randn(8, 3, 64, 64))
    backbone = Backbone(converted, channels=8).eval()
    images, ran = torch.randn(3, 3, 64, 64), []
    for stage in find_stages(backbone):
        for node in stage.nodes:
            node.register_forward_hook(lambda module, inputs, output: ran.append(len(output)))
    with torch.no_grad():
        expected, dense = backbone(images), sum(ran)
        ran.clear()
        found = dgnet.set_sparse(backbone, "plain")(images)
    assert 0 < sum(ran) < dense
    for level, feature in found.items():
        torch.testing.assert_close(feature, expected[level], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_networks_without_maps_of_any_size_are_refused():
    with pytest.raises(UsageError, match=r"takes images of one size only.*strict_img_size: false"):
        Backbone(dgnet.create_model("swin_tiny_patch4_window7_224", dynamic=True))
    with pytest.raises(UsageError, match="has feature maps of strides 16, and detection needs 4, 8, 16, 32"):
        Backbone(dgnet.create_model("test_vit", dynamic=True))
