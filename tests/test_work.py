"""What is counted, and to which place it is booked."""

from __future__ import annotations

from itertools import chain as flatten
from itertools import combinations
from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dgnet
from dgnet._cost import CostModel, StageCost, cost_model
from dgnet.graph import DynamicGraph, FixedWeighting, GateOptions, NodeGates, RoutedOptions, RoutedWeighting, accept_cuts
from dgnet.graph._topology import RandomGraphOptions, complete, erdos_renyi
from tests.helpers.networks import build_meta


class Functional(nn.Module):
    """Applies a function to a parameter and an image's tokens, (B, 16, 3)."""

    def __init__(self, shape: tuple[int, ...], function) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x.flatten(2).mT, self.weight)


def attend(x: Tensor, weight: Tensor) -> Tensor:
    queries = F.linear(x, weight)
    return F.scaled_dot_product_attention(queries, queries, queries)


@pytest.mark.parametrize(
    ("layer", "convolutions", "products"),
    [
        (nn.Conv2d(3, 4, 3, padding=1, groups=1), 16 * 4 * 27, 0),
        (nn.Conv2d(3, 6, 3, padding=1, groups=3), 16 * 6 * 9, 0),
        (nn.ConvTranspose2d(3, 5, 2, stride=2), 16 * 3 * 5 * 4, 0),
        (nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 5, 1)), 16 * 15, 0),
        (nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 5, (3, 1, 1))), 16 * 15, 0),
        (Functional((5, 3, 1), lambda x, w: F.conv1d(x.mT, w)), 16 * 15, 0),
        (Functional((5, 3), F.linear), 0, 16 * 15),
        (Functional((5, 3), attend), 0, 16 * 15 + 2 * 16 * 16 * 5),
        (Functional((5, 3), lambda x, w: torch.einsum("blc,dc->bld", x, w)), 0, 16 * 15),
        (Functional((5, 3), lambda x, w: torch.baddbmm(x.new_ones(1, 16, 5), x, w.mT[None])), 0, 16 * 15),
        (Functional((5, 3), lambda x, w: torch.addbmm(x.new_ones(16, 5), x, w.mT[None])), 0, 16 * 15),
        (Functional((3,), lambda x, w: x @ w), 0, 16 * 3),
        (Functional((3,), lambda x, w: torch.addmv(x.new_ones(16), x[0], w)), 0, 16 * 3),
        (Functional((3,), lambda x, w: x[0, 0] @ w), 0, 3),
        (Functional((5, 3, 3), lambda x, w: F.bilinear(x, x, w)), 0, 16 * 5 * 9),
        (Functional((1,), lambda x, w: x * w), 0, 0),
    ],
)
def test_an_operator_is_counted_whoever_calls_it(layer, convolutions, products):
    cost = dgnet.cost(layer, 4)
    assert (cost.multiply_adds, cost.linear_multiply_adds) == (convolutions, products)


def test_a_module_may_take_a_parameter():
    """As class tokens in CaiT: torch's counter fails on such an argument if it needs a gradient."""

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.linear = nn.Parameter(torch.ones(1, 3)), nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.token.expand(1, -1)) + x.sum()

    assert dgnet.cost(Given(), 4).linear_multiply_adds == 15


class Recurrent(nn.Module):
    """Attention and recurrence, fused on the CPU. `reads_values`: it cannot run on the meta device."""

    def __init__(self, reads_values: bool) -> None:
        super().__init__()
        self.reads_values = reads_values
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.lstm = nn.LSTM(4, 3, batch_first=True, bidirectional=True)

    def forward(self, images: Tensor) -> Tensor:
        tokens = F.pad(images.flatten(2).mT, (0, 1))
        if self.reads_values:
            tokens = tokens[:, : max(16, int(tokens.sum().item()))]
        tokens = self.encoder(tokens)
        return self.lstm(self.attention(tokens, tokens, tokens)[0])[0]


def test_a_network_that_reads_values_is_counted_on_the_cpu():
    size, width, hidden = 16, 4, 8
    attention = 4 * size * width**2 + 2 * size**2 * width
    recurrence = 2 * size * 4 * 3 * (width + 3)
    costs = [dgnet.cost(Recurrent(reads_values), 4) for reads_values in (False, True)]
    assert [cost.linear_multiply_adds for cost in costs] == [2 * attention + 2 * size * width * hidden + recurrence] * 2


class OnTokens(nn.Module):
    """A linear layer on the channels of a map."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.linear = nn.Linear(before, after)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.movedim(1, -1)).movedim(-1, 1)


def make_stage(nodes: list[nn.Module], gated: bool = False, **options: object) -> DynamicGraph:
    """A complete graph on 4 channels; the input node makes them from 3."""
    topology = complete(len(nodes) + 2)
    weighting = RoutedWeighting(topology, 4, RoutedOptions(**options))
    gates = NodeGates(topology, 4, GateOptions(node_gate="hard")) if gated else None
    return DynamicGraph(topology, weighting, OnTokens(3, 4), nodes, nn.Identity(), node_gates=gates)


def test_the_work_of_nodes_and_routers_lies_in_its_place():
    stage = make_stage([OnTokens(3, 4), nn.Conv2d(4, 4, 3, padding=1)], gated=True)
    network = nn.Sequential(nn.Conv2d(3, 3, 1), stage, nn.Flatten(), nn.Linear(4 * 16, 7))
    costs = cost_model(network, 4)
    assert costs.fixed == 16 * 9 + 64 * 7
    (found,) = costs.stages
    assert found.nodes == [16 * 12, 16 * 12, 16 * 4 * 36, 0]
    assert found.routers == [4 * (3 + 2), 4 * (2 + 1), 4, 0]  # one column for each edge and for each gate
    assert found.edges == [0, 3 * 16, 4 * 16, 4 * 16]
    cost = dgnet.cost(network, 4)
    assert (cost.multiply_adds, cost.linear_multiply_adds) == (16 * 9 + 16 * 144, 2 * 16 * 12 + 64 * 7)
    assert (cost.router_multiply_adds, cost.activations) == (36, 16 * 3 + 16 * 4)


def test_all_that_a_router_of_your_own_does_is_a_routers_work():
    class Own(nn.Module):
        def __init__(self, channels: int, num_edges: int) -> None:
            super().__init__()
            self.hidden = nn.Conv1d(channels, 6, 1)
            self.weight = nn.Parameter(torch.ones(num_edges, 6))

        def forward(self, pooled: Tensor) -> Tensor:
            return torch.einsum("bc,ec->be", self.hidden(pooled[:, :, None])[:, :, 0], self.weight).sigmoid()

    costs = cost_model(make_stage([OnTokens(3, 4), OnTokens(4, 4)], router=Own), 4)
    assert costs.stages[0].routers == [24 + 6 * 3, 24 + 6 * 2, 24 + 6, 0]
    assert costs.fixed == 0
    assert dgnet.cost(make_stage([OnTokens(3, 4), OnTokens(4, 4)], router=Own), 4).multiply_adds == 0


def test_a_module_that_is_called_again_counts_again():
    shared = OnTokens(4, 4)
    twice = nn.Sequential(shared, shared)
    network = nn.Sequential(OnTokens(3, 4), shared, OnTokens(4, 3), make_stage([OnTokens(3, 4), shared, shared, twice]), shared)
    costs = cost_model(network, 4)
    assert costs.stages[0].nodes == [16 * 12, 16 * 12, 16 * 16, 16 * 16, 2 * 16 * 16, 0]
    assert costs.stages[0].routers == [4 * 5, 4 * 4, 4 * 3, 4 * 2, 4, 0]
    assert costs.fixed == 2 * 16 * (12 + 16)  # outside the stage it always runs

    stage = make_stage([OnTokens(3, 4)])
    back = OnTokens(4, 3)
    once, again = (cost_model(nn.Sequential(*layers), 4) for layers in ((stage, back), (stage, back, stage, back)))
    assert again.dense == 2 * once.dense


def test_work_on_parameters_counts_once_for_an_image():
    """A network may derive weights from parameters, as position biases in Swin V2: their work is that of a batch of one."""

    class Derived(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.linear = nn.Parameter(torch.ones(9, 3)), nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.linear(self.table).mT[:, :3, None, None].contiguous())

    cost = dgnet.cost(Derived(), 4)
    assert (cost.multiply_adds, cost.linear_multiply_adds) == (16 * 5 * 3, 9 * 15)


def least_of_all(stage: StageCost) -> int:
    """The slow twin of `least`: every set of blocks that may be alive together."""
    topology, found = stage.topology, []
    blocks = list(topology.blocks)
    for chosen in flatten.from_iterable(combinations(blocks, count) for count in range(len(blocks) + 1)):
        alive = {0, *chosen, topology.output}
        senders = {node: alive.intersection(topology.senders(node)) for node in alive - {0}}
        if alive.issuperset(stage.always) and all(senders.values()):
            edges = sum(stage.edges[node] * len(those) for node, those in senders.items())
            found.append(edges + sum(stage.nodes[node] + stage.routers[node] for node in alive))
    return min(found)


@pytest.mark.parametrize("topology", ["complete", "residual", "chain", "er", "ba", "ws"])
@pytest.mark.parametrize("weighting", ["routed", "fixed"])
@pytest.mark.parametrize("node_gate", ["none", "hard"])
def test_the_least_cost_is_that_of_the_cheapest_wiring(topology, weighting, node_gate, tiny):
    layers = (7, 8, 9)
    with accept_cuts():  # networks of older versions have gates on any topology
        network = tiny(layers=layers, topology=topology, weighting=weighting, node_gate=node_gate)
    costs = cost_model(network, 16)
    assert costs.least == costs.fixed + sum(map(least_of_all, costs.stages))
    can_close = weighting == "routed" or node_gate == "hard"
    is_free = {"complete": True, "chain": False}.get(topology, can_close)
    assert (costs.least < costs.dense) == (costs.skippable > 0) == (can_close and is_free)
    for stage, depth in zip(costs.stages, layers, strict=True):
        pinned = [node for node in stage.topology.pinned if node in stage.topology.blocks]
        if node_gate == "hard":
            assert stage.always == (0, depth + 1)
        elif weighting == "routed":  # the input node keeps the nodes alive that it sends to with a constant weight
            assert stage.always == (0, *pinned, depth + 1)
        else:
            assert stage.always == tuple(range(depth + 2))


@pytest.mark.parametrize("seed", range(60))
def test_the_least_cost_with_any_costs(seed):
    rng = Random(seed)
    topology = erdos_renyi(9, RandomGraphOptions(er_p=0.4), rng)
    nodes, routers, edges = ([rng.randrange(30) for _ in range(9)] for _ in range(3))
    always = {0, 8}
    for node in topology.blocks:
        if always.intersection(topology.senders(node)) and rng.random() < 0.2:
            always.add(node)
    stage = StageCost(topology, nodes, routers, edges, tuple(sorted(always)))
    assert stage.least == least_of_all(stage)


def test_the_skippable_share():
    topology = complete(4)
    always = (0, 3)
    stage = StageCost(topology, nodes=[0, 30, 50, 0], routers=[3, 2, 1, 0], edges=[0, 1, 1, 1], always=always)
    costs = CostModel(10, [stage])
    assert (stage.dense, stage.least) == (30 + 50 + 6 + 6, 3 + 1)
    assert costs.skippable == pytest.approx(1 - 14 / 102)
    assert CostModel(10, []).skippable == CostModel(0, []).skippable == 0


def test_fixed_weights_close_nothing():
    topology = complete(3)
    graph = DynamicGraph(topology, FixedWeighting(topology, 4), OnTokens(3, 4), [OnTokens(3, 4)], nn.Identity())
    assert cost_model(graph, 4).skippable == 0


@pytest.mark.parametrize("name", ["resnet18", "test_convnext", "test_vit", "swin_tiny_patch4_window7_224"])
def test_a_converted_network_costs_what_its_network_costs(name):
    """Besides routers and aggregation, for each layout; and the nodes hold what its blocks cost."""
    static = build_meta(name, in_chans=2)
    converted = dgnet.convert(static)
    size = static.pretrained_cfg["input_size"][1:]
    before, after = dgnet.cost(static, size), dgnet.cost(converted, size)
    assert (after.multiply_adds, after.linear_multiply_adds) == (before.multiply_adds, before.linear_multiply_adds)
    assert after.router_multiply_adds > 0
    costs = cost_model(converted, size)
    assert all(all(stage.nodes[1:-1]) and stage.nodes[0] == 0 for stage in costs.stages)
    assert costs.skippable > 0
