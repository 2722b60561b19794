from __future__ import annotations

import pytest
import torch
from torch import nn

from dgnet.errors import UsageError
from dgnet.graph import (
    DynamicGraph,
    FixedWeighting,
    RoutedOptions,
    RoutedWeighting,
    StageOptions,
    Topology,
    record_connectivity,
    use_connectivity,
)
from dgnet.graph._topology import complete
from tests.helpers.networks import close_some
from tests.helpers.pairs import pairwise
from tests.helpers.twins import run_stage_by_edges


def stage_input(network: nn.Module, index: int, images: torch.Tensor) -> torch.Tensor:
    return network.forward_intermediates(images, indices=[index])[1][0]


@pairwise(
    options=[
        {},
        {"topology": "residual"},
        {"shortcut": "node"},
        {"gate": "alpha"},
        {"inference_weight": "raw"},
        {"router_reads": "activation"},
        {"node_gate": "hard", "node_gate_bias": 1.0},
        {"node_gate": "hard", "node_gate_bias": 2.0, "threshold_offset": 0.05},
        {"node_gate": "hard", "node_gate_bias": 0.3, "topology": "residual"},
        {"node_gate": "hard", "node_gate_bias": 0.5, "gate_reads": "stage"},
        {"node_gate": "hard", "node_gate_bias": 0.5, "gate_reads": "stage", "shortcut": "node"},
    ],
    index=[0, 1],
    training=[True, False],
)
@torch.no_grad()
def test_a_stage_matches_the_edge_by_edge_twin(tiny, training, index, options):
    network = tiny(**options)
    images = torch.randn(5, 3, 12, 10)
    close_some(network, images)
    network.train(training)
    x = stage_input(network, index, images)
    stage = network.stages[index]
    with record_connectivity(stage) as record:
        output = stage(x)
    expected, adjacency, alpha, ran = run_stage_by_edges(stage, x)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(record.adjacency[0], adjacency, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(record.alpha[0], alpha, rtol=1e-4, atol=1e-6)  # a dead node's are 0
    assert torch.equal(record.ran[0][:, :-1], ran)
    closed = (adjacency == 0)[:, stage.topology.mask].float().mean()
    if not training:
        assert 0.1 < closed < 0.9  # the case is not a trivial one
        assert torch.equal(ran[:, 1:], (adjacency[:, 1:-1] != 0).any(2))
    elif "node_gate" in options:
        # A closed gate in training stops what its block sends, and leaves the block's own in-edges.
        assert ran[:, 1:].any()
        assert 0 < closed < 0.9
        assert (adjacency[:, 1:-1] != 0).any(2)[~ran[:, 1:]].any()
    else:
        assert closed == 0


def small_stage(dtype: torch.dtype = torch.float64) -> DynamicGraph:
    """Four nodes, linear blocks: everything between the features can be worked out by hand."""
    topology = complete(4)
    stage = DynamicGraph(
        topology,
        RoutedWeighting(topology, 3, RoutedOptions(router_bias=0.3, router_std=0.5, threshold=0.2)),
        input=nn.Conv2d(2, 3, 1),
        nodes=[nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 3, padding=1)],
        activation=nn.Identity(),
    )
    return stage.to(dtype)


def test_gradients_match_the_papers_formulas():
    """Eqs. (7) to (10), with the ψ factor that (8) and (9) leave out."""
    stage = small_stage()
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64)
    features: dict[int, torch.Tensor] = {}
    sums: dict[int, torch.Tensor] = {}

    def keep(store, key):
        def hook(module, inputs, output):
            output.retain_grad()
            store[key] = output

        return hook

    def keep_input(key):
        def hook(module, inputs):
            inputs[0].retain_grad()
            sums[key] = inputs[0]

        return hook

    stage.input.register_forward_hook(keep(features, 0))
    for j, node in enumerate(stage.nodes, start=1):
        node.register_forward_pre_hook(keep_input(j))
        node.register_forward_hook(keep(features, j))
    with record_connectivity(stage) as record:
        sums[3] = stage(x)
    sums[3].retain_grad()
    (sums[3] ** 2).sum().backward()

    alpha, tau = record.alpha[0], stage.weighting.tau.detach()
    dz = torch.zeros_like(alpha)  # ∂L/∂z_ij at [:, j, i]
    dtau = torch.zeros_like(tau)
    for j in (1, 2, 3):
        for i in range(j):
            source = x if j == 1 else features[i].detach()  # node 1 is the entry node
            p = (sums[j].grad * source).sum((1, 2, 3))
            a = alpha[:, j, i]
            s = torch.sigmoid(a - tau[j])
            dz[:, j, i] = p * (s + a * s * (1 - s)) * a * (1 - a)
            dtau[j] += (p * -a * s * (1 - s)).sum()
    torch.testing.assert_close(stage.weighting.tau.grad, dtau)
    for i in range(3):
        router = stage.weighting.routers[str(i)]
        pooled = features[i].detach().mean((2, 3))
        columns = dz[:, i + 1 :, i]
        torch.testing.assert_close(router.weight.grad, columns.T @ pooled)
        torch.testing.assert_close(router.bias.grad, columns.sum(0))
        # ∂L/∂x_i: through the consumers' sums, and through the router's pooling.
        size = features[i].shape[2] * features[i].shape[3]
        expected = (columns @ router.weight.detach())[:, :, None, None].expand_as(features[i]) / size
        for j in range(i + 1, 4):
            if j > 1:
                expected = expected + record.adjacency[0][:, j, i, None, None, None] * sums[j].grad
        torch.testing.assert_close(features[i].grad, expected)


def test_gradcheck_in_float64():
    stage = small_stage()
    x = torch.randn(2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    names, values = zip(*stage.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(stage, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values))


@torch.no_grad()
def test_each_image_alone_gives_what_it_gives_in_a_batch(tiny):
    network = tiny()
    images = torch.randn(7, 3, 12, 10)
    close_some(network, images)
    together = network(images)
    alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_closing_a_nodes_in_edges_gives_the_network_without_it(tiny, training):
    network = tiny()
    images = torch.randn(4, 3, 12, 10)
    x = stage_input(network.eval(), 1, images)
    stage = network.stages[1].train(training)
    adjacency = torch.rand(4, 5, 5).tril(-1) * stage.topology.mask
    closed = adjacency.clone()
    closed[:, 2] = 0
    with use_connectivity(stage, [closed]):
        output = stage(x)
    keep = [0, 1, 3, 4]
    topology = complete(4)
    without = DynamicGraph(
        topology, FixedWeighting(topology, 6), stage.input, [stage.nodes[0], stage.nodes[2]], stage.activation
    ).train(training)
    with use_connectivity(without, [adjacency[:, keep][:, :, keep]]):
        expected = without(x)
    torch.testing.assert_close(output, expected)


@torch.no_grad()
def test_dead_nodes_pass_on(tiny):
    """Node 2 hears only from node 1; when node 1 dies, so does node 2, and the open edges (2, 3), (2, 4) carry nothing."""
    stage = tiny().stages[0].eval()
    x = torch.randn(2, 4, 6, 6)
    weights = torch.rand(5, 5).tril(-1) + 0.1 * stage.topology.mask
    weights[2, 0] = 0
    weights[1, 0] = 0
    with record_connectivity(stage) as record, use_connectivity(stage, [weights]):
        output = stage(x)
    survivors = record.adjacency[0][0] != 0
    assert survivors.nonzero().tolist() == [[3, 0], [4, 0], [4, 3]]
    third = stage.nodes[2]((weights[3, 0] * x).relu())
    torch.testing.assert_close(output, (weights[4, 0] * x + weights[4, 3] * third).relu())


@torch.no_grad()
def test_an_output_node_without_open_in_edges_sums_to_zero(tiny):
    stage = tiny().stages[0].eval()
    with use_connectivity(stage, [torch.zeros(5, 5)]):
        assert stage(torch.randn(2, 4, 6, 6)).abs().max() == 0


@torch.no_grad()
@pytest.mark.parametrize(("option", "value"), [("shortcut", "node"), ("router_reads", "activation")])
def test_options_of_a_stage_change_the_function_not_the_shape(tiny, option, value):
    torch.manual_seed(1)
    default = tiny().eval()
    other = tiny(**{option: value}).eval()
    other.load_state_dict(default.state_dict())
    images = torch.randn(2, 3, 12, 12)
    assert default(images).shape == other(images).shape
    assert not torch.allclose(default(images), other(images))


@torch.no_grad()
def test_with_the_shortcut_in_the_node_the_entry_adds_the_weighted_projection():
    topology = complete(3)
    f, projection = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1)
    stage = DynamicGraph(topology, FixedWeighting(topology, 3), projection, [f], nn.ReLU(), StageOptions(shortcut="node"))
    x = torch.randn(2, 2, 4, 4)
    weights = torch.tensor([[0.0, 0, 0], [0.5, 0, 0], [0.3, 0.7, 0]])
    with use_connectivity(stage, [weights]):
        output = stage(x)
    block = (f(0.5 * x) + 0.5 * projection(x)).relu()
    torch.testing.assert_close(output, 0.3 * projection(x) + 0.7 * block)


def test_the_number_of_nodes_must_fit():
    topology = Topology(torch.ones(5, 5).tril(-1))
    with pytest.raises(UsageError, match="5 nodes has 3 blocks, got 1"):
        DynamicGraph(topology, FixedWeighting(topology, 4), nn.Identity(), [nn.Identity()], nn.ReLU())
