"""The dense walk of inference against the plain one, and what it holds."""

from __future__ import annotations

import weakref

import torch
from torch import nn

import dgnet
from dgnet.graph import DenseWalk, FoldingWalk, find_stages, record_connectivity, use_connectivity
from tests.helpers.networks import draw_and_close, spread_routers
from tests.helpers.pairs import pairwise


@pairwise(
    connectivity=[
        {},
        {"topology": "residual"},
        {"topology": "chain"},
        {"topology": "er", "er_p": 0.6},
        {"weighting": "fixed", "node_gate": "hard", "node_gate_bias": 0.3},
        {"node_gate": "hard", "node_gate_bias": 0.3, "gate_reads": "stage"},
        {"weighting": "signed", "static_start": "normal"},
        {"weighting": "linear", "static_start": "normal"},
        {"weighting": "softmax"},
        {"weighting": "learned", "static_start": "normal", "weight_groups": 2},
        {"weighting": "signed", "shortcut": "node", "two_way": True, "weight_groups": 2},
        {"shortcut": "node"},
    ],
    layers=[(2, 3, 6), (7, 1, 4)],
    closes=[False, True],
)
@torch.no_grad()
def test_it_computes_what_the_plain_walk_does(tiny, connectivity, layers, closes):
    network = tiny(layers=layers, channels=(4, 4, 8), **connectivity).eval()
    images = torch.randn(4, 3, 12, 12)
    if closes and all(stage.weighting.threshold is not None for stage in network.stages):
        draw_and_close(network)
    seen = []
    for walk in (DenseWalk, FoldingWalk):
        for stage in find_stages(network):
            stage.inference_walk = walk
        with record_connectivity(network) as record:
            logits = network(images)
        with use_connectivity(network, record.edge_weights):
            imposed = network(images)
        seen.append((logits, imposed, record))
    (plain, plain_imposed, before), (folded, folded_imposed, after) = seen
    torch.testing.assert_close(folded, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(folded_imposed, plain_imposed, rtol=1e-5, atol=1e-5)
    for one, other in zip(before.edge_weights + before.ran, after.edge_weights + after.ran, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def count_features(network: nn.Module, images: torch.Tensor, walk: type[DenseWalk]) -> int:
    """The largest number of maps of a stage's width that are alive when one of its blocks starts, besides the block's input."""
    stage = network.stages[0]
    stage.inference_walk = walk
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    class Watched(walk):
        def put(self, node: int, feature: torch.Tensor) -> None:
            alive.append(weakref.ref(feature))
            super().put(node, feature)

        def compute(self, node: int) -> torch.Tensor:
            nonlocal most
            feature = super().compute(node)
            partial = sum(len(sums) for sums in getattr(self, "partial", {}).values())
            most = max(most, partial + sum(one() is not None for one in alive))
            return feature

    stage.inference_walk = Watched
    network(images)
    return most


@torch.no_grad()
def test_it_holds_half_of_the_features_of_a_complete_graph():
    network = dgnet.create_model("dg_resnet56", channels=(4, 4, 4)).eval()  # nine blocks, eleven nodes
    images = torch.randn(1, 3, 8, 8)
    assert count_features(network, images, DenseWalk) == 10
    assert count_features(network, images, FoldingWalk) <= 6
    chain = dgnet.create_model("dg_resnet56", channels=(4, 4, 4), topology="chain", weighting="fixed").eval()
    assert count_features(chain, images, FoldingWalk) <= 2


def test_with_gradients_every_feature_stays(tiny):
    network = tiny().eval()
    spread_routers(network.stages[0])
    images = torch.randn(2, 3, 12, 12, requires_grad=True)
    network(images).sum().backward()
    gradient = images.grad.clone()
    for stage in network.stages:
        stage.inference_walk = DenseWalk
    images.grad = None
    network(images).sum().backward()
    torch.testing.assert_close(images.grad, gradient)


@torch.no_grad()
def test_a_closed_gate_drops_what_was_folded_even_if_it_is_not_a_number():
    network = dgnet.create_model("dg_resnet32", channels=(4, 4, 4), weighting="fixed", node_gate="hard").eval()
    stage = network.stages[0]
    stage.node_gates.bias[1] = stage.node_gates.bias[5] = -9.0
    stage.nodes[0].register_forward_hook(lambda module, inputs, output: output * torch.nan)  # of a dead node: never read
    assert network(torch.randn(2, 3, 8, 8)).isfinite().all()
