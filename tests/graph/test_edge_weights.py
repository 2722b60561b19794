"""Weights for each group of channels."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

import dgnet
from dgnet.errors import UsageError
from dgnet.graph import aggregate, aggregate_rows, find_stages, record_connectivity, sum_in_groups, use_connectivity
from dgnet.inference import set_mode, set_sparse
from dgnet.models.cifar_resnet import DynamicCifarResNet
from tests.helpers.networks import assert_forms_agree, draw_and_close
from tests.helpers.static import build_static, draw_images

WEIGHTINGS = ("routed", "signed", "linear", "softmax", "learned")
SHAPES = {"NCHW": (3, 6, 5, 4), "NHWC": (3, 5, 4, 6), "NLC": (3, 7, 6)}


def sum_by_group(features: list[Tensor], weights: Tensor, is_open: Tensor | None, channel: int) -> Tensor:
    """Each group of channels by itself, sample by sample and edge by edge."""
    total = torch.zeros_like(features[0])
    width = features[0].shape[channel] // weights.shape[2]
    for sample in range(len(weights)):
        for edge, feature in enumerate(features):
            if is_open is None or is_open[sample, edge]:
                for group in range(weights.shape[2]):
                    place = [sample, *[slice(None)] * (feature.ndim - 1)]
                    place[channel] = slice(group * width, (group + 1) * width)
                    total[tuple(place)] += weights[sample, edge, group] * feature[tuple(place)]
    return total


@pytest.mark.parametrize("closing", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("layout", SHAPES)
def test_each_group_has_its_own_sum_and_gradients(layout, groups, closing):
    shape, channel = SHAPES[layout], 1 if layout == "NCHW" else len(SHAPES[layout]) - 1
    features = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    weights = torch.randn(3, 4, groups, dtype=torch.float64, requires_grad=True)
    is_open = torch.rand(3, 4) < 0.6 if closing else None
    found = sum_in_groups(lambda f, w: aggregate(f, w, is_open), features, weights, layout)
    expected = sum_by_group(features, weights, is_open, channel)
    torch.testing.assert_close(found, expected)
    found_grads = torch.autograd.grad(found.square().sum(), [weights, *features])
    for one, other in zip(found_grads, torch.autograd.grad(expected.square().sum(), [weights, *features]), strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        rows = sum_in_groups(lambda f, w: aggregate_rows(f, w, is_open), features, weights, layout)
        torch.testing.assert_close(rows, expected)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@torch.no_grad()
def test_dense_and_sparse_agree_and_what_is_recorded_gives_the_same_again(weighting):
    torch.manual_seed(5)
    network = DynamicCifarResNet((3, 3, 3), channels=(4, 6, 8), weighting=weighting, weight_groups=2)
    if weighting == "learned":
        for stage in find_stages(network.eval()):
            nn.init.normal_(stage.weighting.alpha)
    else:
        draw_and_close(network)
    images = torch.randn(4, 3, 16, 16)
    with record_connectivity(network) as record:
        output = network(images)
    assert [weights.shape[3] for weights in record.edge_weights] == [2, 2, 2]
    for weights, adjacency in zip(record.edge_weights, record.adjacency, strict=True):
        torch.testing.assert_close(weights.mean(3), adjacency)
        if weighting != "softmax":
            assert (weights[..., 0] - weights[..., 1]).abs().max() > 1e-3
    with use_connectivity(network, record.edge_weights):
        torch.testing.assert_close(network(images), output, rtol=1e-4, atol=1e-5)
    if weighting == "learned":
        return
    for form in (set_mode(deepcopy(network), "sparse"), set_sparse(deepcopy(network))):
        torch.testing.assert_close(form(images), output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_groups_that_start_alike_compute_what_one_group_does(weighting):
    options = {"layers": (3, 3, 3), "channels": (4, 6, 8), "weighting": weighting}
    if weighting == "routed":
        options["router_std"] = 0.0
    one, two = DynamicCifarResNet(**options), DynamicCifarResNet(**options, weight_groups=2)
    two.load_state_dict({n: t for n, t in one.state_dict().items() if "weighting" not in n}, strict=False)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(two.eval()(images), one.eval()(images))
    two.train()(images).sum().backward()
    assert all(p.grad is not None for p in two.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["resnet", "swin", "vit"])
@torch.no_grad()
def test_a_network_of_each_layout_converts_with_groups(name):
    static, images = build_static(name), draw_images(name, 3)
    converted = dgnet.convert(static, weighting="signed", weight_groups=2, node_gate="hard")
    torch.testing.assert_close(converted(images), static(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(set_mode(converted, "sparse")(images), static(images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_exported_and_compiled_forms_agree():
    network = draw_and_close(DynamicCifarResNet((3, 3, 3), channels=(4, 6, 8), weighting="signed", weight_groups=2))
    assert_forms_agree(network)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_groups": 3}, "weight_groups=3 does not divide the 16 channels of a stage"),
        ({"weight_groups": 0}, "weight_groups must be a whole number from 1 on, got 0"),
        ({"weight_groups": 2.0}, "weight_groups must be a whole number from 1 on, got 2.0"),
        ({"weighting": "fixed", "weight_groups": 2}, "weight_groups=2 has no effect with weighting='fixed'"),
        ({"router": nn.Linear, "weight_groups": 2}, "weight_groups=2 has no effect with a router of your own"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(UsageError, match=message):
        dgnet.create_model("dg_resnet20", **options)


@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_a_block_and_its_shortcut_read_sums_of_their_own(groups):
    """x_j = relu(f_j(Σ w_ij x_i) + Σ v_ij x_i), with the recorded weights w and v; the output node reads by v."""
    network = DynamicCifarResNet(
        (3, 3, 3), channels=(4, 6, 8), weighting="signed", shortcut="node", two_way=True, weight_groups=groups
    )
    draw_and_close(network)
    stage, images = find_stages(network)[0], torch.randn(3, 3, 16, 16)
    seen: list[Tensor] = []
    stage.register_forward_hook(lambda module, inputs, output: seen.extend((inputs[0], output)))
    with record_connectivity(network) as record:
        output = network(images)
    weights = record.edge_weights[0]
    assert weights.shape == (3, 5, 5, 2 * groups)
    assert (weights[..., 0] - weights[..., -1]).abs().max() > 1e-3
    x, expected = seen
    features = [stage.input(x)]
    for node in range(1, 5):
        w, v = weights[:, node, :node, :groups], weights[:, node, :node, groups:]
        if node == 1:
            raw, passed = w.mean(2)[:, 0, None, None, None] * x, v.mean(2)[:, 0, None, None, None] * features[0]
            y = stage.nodes[0](raw)
            features.append(torch.relu(y + passed) if stage.entry_shortcut else torch.relu(y))
            continue
        passed = sum_by_group(features, v, None, 1)
        features.append(passed if node == 4 else torch.relu(stage.nodes[node - 1](sum_by_group(features, w, None, 1)) + passed))
    torch.testing.assert_close(features[-1], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(set_mode(network, "sparse")(images), output, rtol=1e-4, atol=1e-5)


def test_two_ways_need_a_shortcut_in_the_node():
    with pytest.raises(
        UsageError, match="two_way needs shortcut='node': with shortcut='edge' a node has no shortcut of its own"
    ):
        dgnet.create_model("dg_resnet20", two_way=True)
