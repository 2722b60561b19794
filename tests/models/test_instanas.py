"""InstaNAS: cells whose modules run side by side, and the controller that chooses them for each image."""

from __future__ import annotations

import pytest
import torch
from timm.models import group_parameters
from torch import Tensor, nn

import dgnet
from dgnet._cost import cost_model
from dgnet.errors import UsageError
from dgnet.graph import DynamicGraph, FixedWeighting, parallel
from dgnet.inference import can_skip, set_mode, set_sparse, set_threshold_offset
from dgnet.models import FALLBACK, MODULES, REFERENCE
from tests.helpers.networks import build, build_meta, shake_norms

TINY = {
    "layers": (1, 2),
    "channels": (4, 6),
    "strides": (1, 2),
    "stem_channels": 4,
    "head_channels": 8,
    "controller_channels": (4, 6),
}
"""Cells: one that keeps the shape, one that changes it, one that keeps it."""


def build_choosing() -> nn.Module:
    """A tiny network in evaluation mode whose controller chooses differently for each image."""
    network = shake_norms(build("instanas_cifar", **TINY)).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        nn.init.normal_(network.controller.fc.weight, std=5.0)
        nn.init.constant_(network.controller.fc.bias, -1.0)
    return network


def draw(images: int, cells: int, open_share: float = 0.4) -> Tensor:
    """Modules of each image; those of the first image are all closed, those of the last one all open."""
    chosen = torch.rand(images, cells, len(MODULES), generator=torch.Generator().manual_seed(0)) < open_share
    chosen[0], chosen[-1] = False, True
    return chosen


def run_by_modules(network: nn.Module, image: Tensor, chosen: Tensor) -> Tensor:
    """The logits of one image, (1, C, H, W), from the definition: module by module."""
    x = network.act1(network.bn1(network.conv1(image)))
    for cell, modules in zip(network.cells, chosen.tolist(), strict=True):
        if not any(modules):
            x = x if cell.keeps_shape else cell.nodes[FALLBACK](x)
            continue
        x = sum(node(x) for node, is_open in zip(cell.nodes, modules, strict=False) if is_open)
    return network.forward_head(network.act2(network.bn2(network.conv2(x))))


@torch.no_grad()
def test_each_image_runs_its_own_modules_in_every_mode():
    network, images = build_choosing(), torch.randn(6, 3, 8, 8)
    chosen = draw(6, 3)
    expected = torch.cat([run_by_modules(network, images[i : i + 1], chosen[i]) for i in range(6)])
    alphas = []
    for change in (lambda net: set_mode(net, "dense"), lambda net: set_mode(net, "sparse"), set_sparse):
        change(network)
        with dgnet.record_connectivity(network) as record:
            torch.testing.assert_close(network(images, chosen), expected)
        for cell, ran, modules in zip(network.cells, record.ran, network.complete(chosen).unbind(1), strict=True):
            assert torch.equal(ran[:, 1 : 1 + len(MODULES)], modules)
            if cell.keeps_shape:
                assert torch.equal(ran[:, -2], ~modules.any(1))  # the identity
        alphas.append(record.alpha)
    for alpha in alphas[1:]:
        assert all(torch.equal(one, other) for one, other in zip(alpha, alphas[0], strict=True))


@torch.no_grad()
def test_modules_that_no_image_needs_are_not_called():
    network, chosen = set_mode(build_choosing(), "sparse"), torch.zeros(3, 3, len(MODULES), dtype=torch.bool)
    chosen[1, 2, 0] = chosen[2, 2, 0] = True
    seen: list[tuple[int, int, int]] = []
    for number, cell in enumerate(network.cells):
        for index, node in enumerate(cell.nodes):
            node.register_forward_hook(lambda _, x, y, at=(number, index): seen.append((*at, len(x[0]))))
    network(torch.randn(3, 3, 8, 8), chosen)
    identity = len(MODULES)
    assert seen == [(0, identity, 3), (1, FALLBACK, 3), (2, 0, 2), (2, identity, 1)]


def test_in_training_closed_modules_add_nothing_and_normalise_all_images():
    network, chosen = build("instanas_cifar", **TINY).train(), draw(5, 3)
    images = torch.randn(5, 3, 8, 8)
    cell = network.cells[0]
    x = network.act1(network.bn1(network.conv1(images))).detach()
    twins = [build("instanas_cifar", **TINY).train().cells[0].nodes[index] for index in range(len(MODULES))]
    expected = sum(
        twin(x) * gate[:, None, None, None] for twin, gate in zip(twins, chosen[:, 0].float().unbind(1), strict=True)
    )
    is_empty = ~chosen[:, 0].any(1)
    expected[is_empty] += x[is_empty]
    torch.testing.assert_close(cell(x, cell.complete(chosen[:, 0])), expected)
    network(images, chosen).sum().backward()
    gradients = [p.grad for name, p in network.named_parameters() if not name.startswith("controller")]
    assert all(gradient is not None for gradient in gradients)


def test_recomputed_modules_give_the_same_gradients_and_statistics():
    chosen, images = draw(4, 3), torch.randn(4, 3, 8, 8)
    networks = [build("instanas_cifar", **TINY).train() for _ in range(2)]
    networks[1].set_grad_checkpointing()
    for network in networks:
        network(images, chosen).square().sum().backward()
    plain, recomputed = (dict(network.named_parameters()) for network in networks)
    for name, parameter in plain.items():
        if parameter.grad is not None:
            torch.testing.assert_close(recomputed[name].grad, parameter.grad)
    for own, other in zip(*(network.buffers() for network in networks), strict=True):
        torch.testing.assert_close(own, other)


@torch.no_grad()
def test_an_untrained_controller_opens_all_modules_and_a_trained_one_decides():
    images = torch.randn(16, 3, 8, 8) + 3 * torch.randn(16, 3, 1, 1)
    assert build("instanas_cifar", **TINY).eval().choose(images).all()
    network = build_choosing()
    chosen = network.choose(images)
    assert torch.equal(chosen, network.controller(images).sigmoid() >= 0.5)
    assert len(torch.unique(chosen.flatten(1), dim=0)) > 1
    torch.testing.assert_close(network(images), network(images, chosen))
    assert can_skip(network)
    assert set_threshold_offset(network, 0.49).choose(images).sum() < chosen.sum()


@torch.no_grad()
def test_a_module_runs_for_its_images_only_and_costs_what_it_runs():
    network, images = build_choosing(), torch.randn(6, 3, 8, 8)
    costs = cost_model(network, 8)
    with dgnet.record_connectivity(network) as record:
        network(images, draw(6, 3))
    executed = costs.executed_in(record)
    # Image 0: two identities, and the basic module of the cell that changes the shape; each with an edge to it and one from it.
    own = [
        (stage.nodes[node], stage.edges[node] + stage.edges[-1]) for stage, node in zip(costs.stages, (6, 5, 6), strict=True)
    ]
    assert executed[0] == costs.fixed + sum(map(sum, own))
    assert costs.least <= executed[0] < executed[1:5].min()
    assert executed[1:5].max() < executed[5] < costs.dense  # all modules; the identity does not run beside them


def test_latency_is_the_sum_of_the_modules_that_run():
    network, chosen = build("instanas_cifar", **TINY), draw(4, 3)
    network.latency.copy_(torch.arange(15).view(3, 5) + 1)
    expected = [sum(float(network.latency[c, m]) for c in range(3) for m in range(5) if row[c][m]) for row in chosen.tolist()]
    assert expected[0] == 0
    expected[0] = float(network.latency[1, FALLBACK])
    assert network.estimate_latency(chosen).tolist() == expected


def test_the_reference_modules_alone_are_mobilenetv2():
    static = build_meta("mobilenetv2_100")
    inverted = {"conv_pw", "conv_dw", "conv_pwl"}
    for name, strides in (("instanas_imagenet", [1, 2, 2, 2, 1, 2, 1]), ("instanas_cifar", [1, 1, 2, 2, 1, 2, 1])):
        network = build_meta(name)
        nodes = [cell.nodes[REFERENCE] for cell in network.cells]
        own = [tuple(node.get_submodule(part).weight.shape) for node in nodes[1:] for part in sorted(inverted)]
        blocks = [block for stage in static.blocks for block in stage][1:]  # the first has no expansion there
        assert own == [tuple(block.get_submodule(part).weight.shape) for block in blocks for part in sorted(inverted)]
        assert [next(iter(getattr(network, n))).nodes[0].conv_dw.stride[0] for n in network.stage_names] == strides
        assert len(network.cells) == 17


@torch.no_grad()
def test_features_and_groups_answer_as_in_timm():
    network = build_choosing()
    images = torch.randn(2, 3, 8, 8)
    last, features = network.forward_intermediates(images)
    assert [tuple(feature.shape[1:]) for feature in features] == [(4, 8, 8), (4, 8, 8), (6, 4, 4)]
    torch.testing.assert_close(network.forward_head(last), network(images))
    extractor = dgnet.create_model("instanas_cifar", features_only=True, out_indices=(1, 2), **TINY).eval()
    assert [tuple(feature.shape[1:]) for feature in extractor(images)] == [(4, 8, 8), (6, 4, 4)]
    groups = group_parameters(network, network.group_matcher())
    assert sum(map(len, groups.values())) == len(list(network.parameters()))
    assert len(groups) == 1 + 3 + 1


def test_a_stage_takes_the_gates_that_it_is_given():
    topology = parallel(4)
    options = {"input": nn.Identity(), "nodes": [nn.Identity(), nn.Identity()], "activation": nn.Identity()}
    stage = DynamicGraph(topology, FixedWeighting(topology, 2), entry_shortcut=False, takes_gates=True, **options).eval()
    x = torch.randn(3, 2, 4, 4)
    gates = torch.tensor([[True, True], [True, False], [False, False]])
    torch.testing.assert_close(stage(x, gates), x * torch.tensor([2.0, 1.0, 0.0])[:, None, None, None])
    with pytest.raises(UsageError, match=r"is given its gates: call stage\(x, gates\)"):
        stage(x)
    with pytest.raises(UsageError, match=r"gates are \(B, 2\), one for each block, got \(3, 1\)"):
        stage(x, gates[:, :1])
    own = DynamicGraph(topology, FixedWeighting(topology, 2), entry_shortcut=False, **options).eval()
    with pytest.raises(UsageError, match="this stage takes no gates"):
        own(x, gates)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (1, 2, 3)}, "channels lists a number for each of 3 stages, got"),
        ({"layers": ()}, r"layers lists a number for each of the stages, got \[\]"),
        ({"strides": (1, 0)}, "strides must be"),
        ({"stem_stride": 3}, "stem_stride must be"),
        ({"weighting": "learned"}, "instanas_cifar has no option 'weighting'"),
        ({"node_gate": "hard"}, "instanas_cifar has no option 'node_gate'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message) as caught:
        dgnet.create_model("instanas_cifar", **{**TINY, **options})
    assert "is static" not in str(caught.value)


def test_modules_of_another_shape_are_refused():
    with pytest.raises(UsageError, match=r"the modules of an image are \(3, 5\), got \(2, 5\)"):
        build("instanas_cifar", **TINY)(torch.zeros(1, 3, 8, 8), draw(1, 2))
