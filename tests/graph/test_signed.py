"""Weightings with static weights of either sign, and how static weights start."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

import dgnet
from dgnet.errors import UsageError
from dgnet.graph import (
    LearnedOptions,
    LearnedWeighting,
    LinearWeighting,
    SignedOptions,
    SignedWeighting,
    SoftmaxWeighting,
    Weighting,
    aggregate,
    find_stages,
    record_connectivity,
)
from dgnet.graph._topology import complete, residual
from dgnet.inference import set_mode, set_sparse
from dgnet.models import Connectivity
from dgnet.models.cifar_resnet import DynamicCifarResNet
from tests.helpers.networks import assert_forms_agree, draw_and_close

NETWORKS = {
    "signed": {"weighting": "signed", "static_start": "normal"},
    "signed, plain α": {"weighting": "signed", "static_start": "normal", "gate": "alpha"},
    "linear": {"weighting": "linear", "static_start": "normal"},
    "linear, identity, soft": {"weighting": "linear", "linear_function": "identity", "edge_gate": "soft"},
    "softmax": {"weighting": "softmax"},
    "softmax, gates": {"weighting": "softmax", "node_gate": "hard"},
}
CHANNELS = 6


def build(kind: type[Weighting], **options: object) -> Weighting:
    """A weighting of five nodes whose router weights and thresholds are not those of the start."""
    weighting = kind(complete(5), CHANNELS, SignedOptions(**options))
    for name, parameter in weighting.named_parameters():
        if "routers" in name:
            nn.init.normal_(parameter, std=2.0)
    nn.init.uniform_(weighting.tau, 0.1, 0.4)
    return weighting


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def score(weighting: Weighting, sender: int, receiver: int, pooled: list[float]) -> float:
    """uᵀn(φ) + b of one edge for one sample, from the definition: φ has mean 0 and length 1."""
    mean = sum(pooled) / len(pooled)
    variance = sum((value - mean) ** 2 for value in pooled) / len(pooled)
    normed = [(value - mean) / math.sqrt(variance + 1e-5) / math.sqrt(len(pooled)) for value in pooled]
    router = weighting.routers[str(sender)]
    row = weighting.topology.free_receivers(sender).index(receiver)
    bias = 0.0 if router.bias is None else float(router.bias[row])
    return sum(u * value for u, value in zip(router.weight[row].tolist(), normed, strict=True)) + bias


def weigh_by_edges(weighting: Weighting, features: list[Tensor], node: int, sample: int) -> list[float]:
    """The weights of the in-edges of `node` for one sample before closing, from the definitions, one edge at a time."""
    z = [score(weighting, i, node, features[i][sample].mean((1, 2)).tolist()) for i in range(node)]
    if isinstance(weighting, SoftmaxWeighting):
        return [node * math.exp(value) / sum(map(math.exp, z)) for value in z]
    first = sum(range(node))  # of the complete graph: nodes 1, 2, … have 1, 2, … in-edges
    static = weighting.static[first : first + node].tolist()
    if isinstance(weighting, LinearWeighting):
        g = math.tanh if weighting.options.linear_function == "tanh" else float
        return [s + float(weighting.scale) * g(value) for s, value in zip(static, z, strict=True)]
    tau = float(weighting.tau[node])
    if weighting.options.gate == "alpha":
        return [s * sigmoid(value) / 0.5 for s, value in zip(static, z, strict=True)]
    start = 0.5 * sigmoid(0.5 - 0.0)
    return [s * sigmoid(value) * sigmoid(sigmoid(value) - tau) / start for s, value in zip(static, z, strict=True)]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SignedWeighting, {"static_start": "normal"}),
        (SignedWeighting, {"static_start": "normal", "gate": "alpha"}),
        (LinearWeighting, {"static_start": "normal"}),
        (LinearWeighting, {"linear_function": "identity", "linear_scale": 0.7}),
        (LinearWeighting, {"edge_gate": "soft"}),
        (SoftmaxWeighting, {}),
        (SoftmaxWeighting, {"edge_gate": "soft"}),
    ],
)
@torch.no_grad()
def test_weights_and_openness_are_those_of_the_definition(kind, options):
    weighting = build(kind, **options).eval()
    features = [torch.randn(3, CHANNELS, 4, 4) for _ in range(4)]
    predicted = [weighting.predict(i, features[i]) for i in range(4)]
    for node in range(1, 5):
        receivers = [weighting.topology.free_receivers(i).index(node) for i in range(node)]
        alpha = torch.stack([predicted[i][:, row] for i, row in zip(range(node), receivers, strict=True)], 1)
        found, is_open = weighting.weigh(node, alpha), weighting.find_open(node, alpha, 0.05)
        tau = float(weighting.tau[node])
        for sample in range(3):
            expected = weigh_by_edges(weighting, features, node, sample)
            compared = [abs(weight) for weight in expected]
            if isinstance(weighting, SignedWeighting):
                compared = alpha[sample].tolist()
            elif options.get("edge_gate") == "soft":
                expected = [weight * sigmoid((abs(weight) - tau) / 0.1) for weight in expected]
            torch.testing.assert_close(found[sample], torch.tensor(expected), rtol=1e-4, atol=1e-5)
            assert is_open[sample].tolist() == [value >= tau + 0.05 for value in compared]


@pytest.mark.parametrize("weighting", ["signed", "linear"])
@pytest.mark.parametrize("start", ["ones", "identity", "normal", "ws"])
def test_they_start_at_their_static_form_to_the_bit(weighting, start):
    images = torch.randn(2, 3, 16, 16)
    options = {"ws_k": 2} if start == "ws" else {}
    sizes = {"layers": (4, 4, 4), "channels": (4, 6, 8)}
    networks = [DynamicCifarResNet(weighting=name, static_start=start, **sizes, **options) for name in ("learned", weighting)]
    static, dynamic = networks
    dynamic.load_state_dict({n: t for n, t in static.state_dict().items() if "weighting" not in n}, strict=False)
    for one, other in zip(find_stages(static), find_stages(dynamic), strict=True):
        other.weighting.static.data.copy_(one.weighting.alpha.data)
    for is_training in (True, False):
        with torch.no_grad():
            expected, found = (deepcopy(network).train(is_training)(images) for network in networks)
        assert torch.equal(found, expected)


def test_softmax_starts_with_every_edge_at_1():
    network = dgnet.create_model("dg_resnet20", weighting="softmax").eval()
    with torch.no_grad(), record_connectivity(network) as record:
        network(torch.randn(2, 3, 16, 16))
    for adjacency, stage in zip(record.adjacency, find_stages(network), strict=True):
        torch.testing.assert_close(adjacency, stage.topology.mask.float().expand_as(adjacency))


def test_starts():
    topology = complete(5)

    def start(name: str | Tensor) -> Tensor:
        weighting = LearnedWeighting(topology, 4, LearnedOptions(static_start=name))
        matrix = torch.zeros(5, 5)
        for node in range(1, 5):
            matrix[node, :node] = weighting.shared_alpha(node).detach()
        return matrix

    assert torch.equal(start("ones"), topology.mask.float())
    assert torch.equal(start("identity"), torch.eye(5).roll(1, 0).tril(-1))
    given = torch.randn(5, 5).tril(-1)
    assert torch.equal(start(given), given)
    wide = LearnedWeighting(complete(60), 4, LearnedOptions(static_start="normal"))
    last = wide.shared_alpha(59).detach()
    assert 0.5 < float(last.std()) * 59**0.5 < 1.5
    assert last.min() < 0 < last.max()


def test_a_random_start_has_the_edges_of_the_random_graph():
    options = {"topology_seed": 4, "layers": (8, 8, 8), "er_p": 0.4, "channels": (4, 6, 8)}
    network = DynamicCifarResNet(weighting="linear", static_start="er", **options)
    graph = DynamicCifarResNet(topology="er", weighting="fixed", **options)
    for one, other in zip(find_stages(network), find_stages(graph), strict=True):
        for node in range(1, one.topology.num_nodes):
            row = one.weighting.order.row(one.weighting.static, node)
            assert torch.equal(row != 0, other.topology.mask[node, :node])
            expected = other.topology.pinned.get(node, 1.0)
            assert all(value == pytest.approx(expected) for value in row[row != 0].tolist())


@pytest.mark.parametrize("kind", [SignedWeighting, LinearWeighting])
def test_an_edge_that_starts_at_0_opens_where_the_target_needs_it(kind):
    """The output node's sum must be twice the first sender's feature; only the last sender's edge starts open."""
    topology = residual(3)
    weighting = kind(topology, CHANNELS, SignedOptions(static_start="identity"))
    features = [torch.randn(8, CHANNELS, 2, 2) for _ in range(2)]
    optimiser = torch.optim.Adam(weighting.parameters(), lr=0.05)
    for step in range(200):
        alpha = torch.stack([weighting.predict(i, features[i])[:, -1] for i in range(2)], 1)
        weights = weighting.weigh(2, alpha)
        if not step:
            assert weights[:, 0].eq(0).all()
        loss = (aggregate(features, weights) - 2 * features[0]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        if not step:
            assert weighting.static.grad[1] != 0
        optimiser.step()
    assert float(loss.detach()) < 0.05
    assert float(weights.detach()[:, 0].mean()) > 1.5


def test_an_edge_below_the_threshold_weighs_0_in_training_and_may_open_again():
    weighting = build(LinearWeighting, static_start="ones").train()
    nn.init.constant_(weighting.tau, 1.5)
    alpha = torch.zeros(1, 3, requires_grad=True)
    weights = weighting.weigh(3, alpha)
    assert weights.eq(0).all()
    weights.sum().backward()
    assert (alpha.grad > 0).all()
    assert weighting.tau.grad[3] < 0  # a lower threshold would open it


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_dense_sparse_and_native_agree(name):
    network = draw_and_close(DynamicCifarResNet(layers=(4, 4, 4), channels=(4, 6, 8), **NETWORKS[name]))
    images = torch.randn(6, 3, 16, 16)
    with record_connectivity(network) as expected:
        output = network(images)
    if "soft" not in name.replace("softmax", ""):
        opened = sum(int((adjacency != 0).sum()) for adjacency in expected.adjacency)
        assert 0.05 < opened / len(images) / sum(stage.topology.num_edges for stage in find_stages(network)) < 0.98
    for form in (set_mode(deepcopy(network), "sparse"), set_sparse(deepcopy(network), "native")):
        with record_connectivity(form) as found:
            torch.testing.assert_close(form(images), output, rtol=1e-4, atol=1e-4)
        for one, other in zip(expected.adjacency, found.adjacency, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear, identity, soft", "softmax, gates"])
@torch.no_grad()
def test_exported_and_compiled_forms_agree(name):
    network = draw_and_close(DynamicCifarResNet(layers=(3, 3, 3), channels=(4, 6, 8), **NETWORKS[name]))
    assert_forms_agree(network)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_gets_a_gradient(name):
    network = dgnet.create_model("dg_resnet20", channels=(4, 6, 8), **NETWORKS[name]).train()
    network(torch.randn(4, 3, 16, 16)).square().sum().backward()
    missing = [n for n, p in network.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())]
    assert missing == []


@pytest.mark.parametrize("weighting", ["signed", "linear", "softmax"])
def test_they_convert_a_network_without_changing_it(weighting):
    static = dgnet.create_model("resnet20").eval()
    converted = dgnet.convert(static, weighting=weighting, node_gate="hard")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(converted(images), static(images), rtol=1e-5, atol=1e-6)
    assert torch.equal(dgnet.to_static(converted)(images), static(images))
    nn.init.normal_(find_stages(converted)[0].weighting.routers["0"].weight)
    with pytest.raises(UsageError, match="its weights depend on the image"):
        dgnet.to_static(converted)


@pytest.mark.parametrize("weighting", ["signed", "linear"])
def test_dg_networks_start_as_the_static_one(weighting):
    static = dgnet.create_model("resnet20").eval()
    options = dgnet.models.static_start_options(dgnet.create_model("dg_resnet20"), {"weighting": weighting})
    network = dgnet.create_model("dg_resnet20", **options).eval()
    dgnet.load_static_weights(network, static.state_dict(), start="static")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(network(images), static(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"weighting": "softmax", "topology": "er", "er_p": 0.9},
            r"weighting='softmax' needs the in-edges of every node",
        ),
        ({"static_start": "normal"}, r"static_start='normal' has no effect with weighting='routed'; leave it out, or use"),
        ({"weighting": "linear", "static_start": "unknown"}, r"unknown static_start .unknown."),
        ({"weighting": "linear", "static_start": 3}, r"static_start is ones, identity, .* got 3$"),
        ({"weighting": "linear", "static_start": torch.ones(2, 2)}, r"static_start of stage 1 must be 5×5 finite numbers"),
        (
            {"weighting": "linear", "static_start": torch.ones(5, 5)},
            r"static_start of stage 1 weighs an edge",
        ),
        (
            {"weighting": "linear", "static_start": "er", "topology": "chain", "er_p": 1.0},
            r"weighs an edge",
        ),
        ({"weighting": "linear", "static_start": ["ones"]}, r"static_start lists 1 stages, the network has more"),
        ({"weighting": "linear", "linear_function": "relu"}, r"unknown linear_function .relu."),
        ({"weighting": "signed", "edge_gate": "soft"}, r"edge_gate='soft' has no effect with weighting='signed'"),
        ({"weighting": "linear", "linear_scale": float("nan")}, r"linear_scale must be"),
        (
            {"weighting": "learned", "static_start": "normal", "learned_activation": "sigmoid"},
            r"static_start has no effect",
        ),
    ],
)
def test_refusals(options, message):
    with pytest.raises(UsageError, match=message):
        dgnet.create_model("dg_resnet20", **options)


def test_the_options_of_a_start_are_stored():
    network = DynamicCifarResNet((4, 4, 4), weighting="signed", static_start="ws", ws_k=2)
    stored = network.stored_options()
    assert (stored["static_start"], stored["ws_k"]) == ("ws", 2)
    assert "router_bias" not in stored
    assert Connectivity(weighting="learned").plain_options()["static_start"] == "ones"
