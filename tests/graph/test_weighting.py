from __future__ import annotations

import pytest
import torch
from torch import nn

from dgnet.errors import UsageError
from dgnet.graph import (
    FixedWeighting,
    GateOptions,
    LearnedOptions,
    LearnedWeighting,
    RoutedOptions,
    RoutedWeighting,
    Router,
    aggregate,
    record_connectivity,
)
from dgnet.graph._router import CLOSED_BIAS
from dgnet.graph._topology import chain, complete
from dgnet.inference import can_skip, set_threshold_offset
from dgnet.models import Connectivity


@pytest.mark.parametrize("num_edges", [1, 2, 5])
def test_aggregate_matches_the_edge_by_edge_sum(num_edges):
    features = [torch.randn(3, 4, 7, 5) for _ in range(num_edges)]  # unequal sizes expose swapped axes
    weights = torch.rand(3, num_edges)
    expected = torch.stack([sum(w * f[b] for w, f in zip(weights[b].tolist(), features, strict=True)) for b in range(3)])
    torch.testing.assert_close(aggregate(features, weights), expected)


def test_a_fresh_edge_is_open_and_weighs_what_the_notes_say():
    weighting = RoutedWeighting(complete(4), 8)
    alpha = weighting.predict(0, torch.zeros(2, 8, 3, 3))
    torch.testing.assert_close(alpha, torch.full((2, 3), 0.9526), rtol=0, atol=1e-4)
    assert weighting.train().find_open(1, alpha, 0.0) is None
    torch.testing.assert_close(weighting.weigh(1, alpha), torch.full((2, 3), 0.687), rtol=0, atol=1e-3)
    assert weighting.eval().find_open(1, alpha, 0.0).all()


def test_an_edge_closes_where_alpha_is_below_the_threshold():
    weighting = RoutedWeighting(complete(4), 8, RoutedOptions(threshold=0.5)).eval()
    alpha = torch.tensor([[0.4, 0.5, 0.6]])
    assert weighting.find_open(3, alpha, 0.0).tolist() == [[False, True, True]]
    assert weighting.find_open(3, alpha, 0.05).tolist() == [[False, False, True]]


@pytest.mark.parametrize(("gate", "inference_weight"), [("psi", "gated"), ("psi", "raw"), ("alpha", "gated")])
def test_gate_and_inference_weight(gate, inference_weight):
    weighting = RoutedWeighting(complete(4), 8, RoutedOptions(gate=gate, inference_weight=inference_weight, threshold=0.2))
    alpha = torch.tensor([[0.3, 0.9]])
    psi = alpha * torch.sigmoid(alpha - 0.2)
    torch.testing.assert_close(weighting.train().weigh(2, alpha), psi if gate == "psi" else alpha)
    in_evaluation = psi if (gate, inference_weight) == ("psi", "gated") else alpha
    torch.testing.assert_close(weighting.eval().weigh(2, alpha), in_evaluation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_routing_runs_in_float32_under_autocast(dtype):
    weighting = RoutedWeighting(complete(4), 8, RoutedOptions(router_std=1.0))
    feature = torch.randn(2, 8, 5, 5).to(dtype)
    expected = weighting.predict(0, feature.float())
    with torch.autocast("cpu", torch.bfloat16):
        alpha = weighting.predict(0, feature)
    assert alpha.dtype == torch.float32
    torch.testing.assert_close(alpha, expected)


def test_learned_weights_are_one_an_edge_and_start_at_one():
    weighting = LearnedWeighting(complete(5), 8)
    assert weighting.alpha.shape == (10,)
    rows = [weighting.shared_alpha(j) for j in range(1, 5)]
    assert [len(row) for row in rows] == [1, 2, 3, 4]
    assert all(bool((row == 1).all()) for row in rows)
    sigmoid = LearnedWeighting(complete(5), 8, LearnedOptions(learned_activation="sigmoid"))
    torch.testing.assert_close(sigmoid.shared_alpha(2), torch.ones(2).sigmoid())


def test_thresholds_can_stay_where_they_are(tiny):
    assert not RoutedWeighting(complete(4), 8, RoutedOptions(learn_threshold=False)).tau.requires_grad
    assert not RoutedWeighting(complete(4), 8, RoutedOptions(gate="alpha")).tau.requires_grad  # it would get no gradient
    assert RoutedWeighting(complete(4), 8).tau.requires_grad


def test_unknown_values_are_refused():
    with pytest.raises(UsageError, match="unknown gate 'pzi'; did you mean 'psi'"):
        RoutedWeighting(complete(4), 8, RoutedOptions(gate="pzi"))
    with pytest.raises(UsageError, match="unknown learned_activation"):
        LearnedWeighting(complete(4), 8, LearnedOptions(learned_activation="tanh"))


def test_a_router_of_the_users_own_sees_pooled_features_of_each_node(tiny):
    seen = []

    class Half(torch.nn.Module):
        def __init__(self, channels: int, num_edges: int) -> None:
            super().__init__()
            self.num_edges = num_edges
            seen.append((channels, num_edges))

        def forward(self, pooled: torch.Tensor) -> torch.Tensor:
            return pooled.new_full((len(pooled), self.num_edges), 0.5)

    network = tiny(router=Half)
    assert seen[:4] == [(4, 4), (4, 3), (4, 2), (4, 1)]
    with record_connectivity(network) as record:
        network(torch.randn(2, 3, 8, 8))
    assert record.alpha[0][:, network.stages[0].topology.mask].unique().tolist() == [0.5]


def test_router_start():
    router = Router(64, 100, bias=-3.0, std=0.1)
    assert router.bias.unique().tolist() == [-3.0]
    assert 0.09 < router.weight.std().item() < 0.11


def test_only_the_edges_of_the_start_begin_open():
    weighting = RoutedWeighting(complete(5), 4, RoutedOptions(router_bias=2.0), start=chain(5))
    for _ in range(2):
        for node in range(4):
            assert weighting.routers[str(node)].bias.tolist() == [2.0] + [CLOSED_BIAS] * (3 - node)
        for parameter in weighting.parameters():
            nn.init.zeros_(parameter)
        weighting.reset_parameters()


@pytest.mark.parametrize("old", ["gate", "share"])
def test_a_weighting_that_overrides_a_method_of_version_0_1_is_refused(old):
    with pytest.raises(UsageError, match=f"Old overrides `{old}` of version 0.1"):
        type("Old", (RoutedWeighting,), {old: lambda self, *arguments: None})


@torch.no_grad()
def test_a_weighting_that_only_says_what_is_open_can_close(tiny):
    class Sparse(FixedWeighting):
        def find_open(self, node: int, alpha: torch.Tensor, offset: float) -> torch.Tensor:
            return alpha >= 1 + offset

    network = tiny(weighting=Sparse).eval()
    assert can_skip(network)
    set_threshold_offset(network, 0.1)
    with record_connectivity(network) as record:
        network(torch.randn(1, 3, 8, 8))
    assert not torch.cat([matrix.flatten() for matrix in record.adjacency]).any()
    assert not can_skip(tiny(weighting=FixedWeighting))


def test_each_group_of_options_checks_itself_alone_and_in_a_connectivity():
    class Mine(Connectivity):
        pass

    for build in (lambda: Mine(gate="nonsense"), lambda: RoutedOptions(gate="nonsense")):
        with pytest.raises(UsageError, match="unknown gate 'nonsense'"):
            build()
    with pytest.raises(UsageError, match="node_gate_bias must be a number"):
        GateOptions("hard", float("nan"))
    with pytest.raises(UsageError, match="learned_start must not be 0"):
        Connectivity(weighting="learned", learned_start=0.0)


@pytest.mark.parametrize("options", [{}, {"gate": "alpha"}, {"router_bias": -1.0, "threshold": -3.0}], ids=str)
@torch.no_grad()
def test_with_a_unit_start_edges_weigh_1_or_0_and_no_more_than_they_learn(options):
    chosen = RoutedOptions(unit_start=True, router_std=0.0, router_start="chain", **options)
    weighting = RoutedWeighting(complete(5), 8, chosen, chain(5))
    feature = torch.randn(2, 8, 3, 3)
    alpha = torch.zeros(2, 5, 5)
    for node in range(4):
        alpha[:, node + 1 :, node] = weighting.predict(node, feature)
    for node in range(1, 5):
        weights = weighting.weigh(node, alpha[:, node, :node])
        expected = torch.zeros(2, node)
        expected[:, -1] = 1
        torch.testing.assert_close(weights, expected, rtol=0, atol=0)
        # The weight follows α: an edge that started closed and one that started open change by the same.
        moved = weighting.weigh(node, torch.full((2, node), 0.7))
        if node > 1:
            _, closed = chosen.start_weights(torch.float32)
            torch.testing.assert_close(moved[:, -1] - moved[:, 0], torch.full((2,), closed), rtol=0, atol=1e-6)
    # Without a part that starts closed nothing is subtracted.
    assert RoutedWeighting(complete(5), 8, chosen, complete(5)).closed is None


def test_with_a_unit_start_an_edge_that_starts_closed_can_learn():
    options = RoutedOptions(unit_start=True, router_std=0.0, router_start="chain")
    weighting = RoutedWeighting(complete(5), 8, options, chain(5))
    alpha = torch.cat([weighting.predict(node, torch.randn(2, 8, 3, 3))[:, 3 - node, None] for node in range(4)], dim=1)
    weighting.weigh(4, alpha).sum().backward()
    closed, opened = (abs(weighting.routers[node].bias.grad[-1]) for node in ("0", "3"))
    assert closed > 0.3 * opened


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gate", ["psi", "alpha"])
def test_edges_can_start_at_exactly_1_and_follow_psi_from_there(gate, dtype):
    options = RoutedOptions(unit_start=True, router_std=0.0, gate=gate, threshold=0.1)
    weighting = RoutedWeighting(complete(4), 8, options).to(dtype)
    alpha = weighting.predict(0, torch.randn(16, 8, 3, 3, dtype=dtype))
    for mode in (True, False):
        assert (weighting.train(mode).weigh(1, alpha) == 1).all()
    plain = RoutedWeighting(complete(4), 8, RoutedOptions(router_std=0.0, gate=gate, threshold=0.1)).to(dtype)
    others = torch.tensor([[0.2, 0.5, 0.99]], dtype=dtype)
    torch.testing.assert_close(weighting.weigh(1, others), plain.weigh(1, others) / plain.weigh(1, alpha[:1]))


def test_normalised_routers_do_not_see_scale_and_shift():
    feature = torch.randn(4, 8, 3, 3)
    torch.manual_seed(0)
    plain, normed = (Router(8, 3, 0.0, std=1.0, norm=norm) for norm in ("none", "layer"))
    plain.load_state_dict(normed.state_dict())
    pooled = feature.mean((2, 3))
    expected = plain((pooled - pooled.mean(1, keepdim=True)) / (pooled.var(1, correction=0, keepdim=True) + 1e-5).sqrt())
    torch.testing.assert_close(normed(pooled), expected)
    torch.testing.assert_close(normed(1000 * pooled + 50), normed(pooled), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"unit_start": True, "router": Router}, "unit_start=True has no effect with a router of your own"),
        ({"router_norm": "layer", "router": Router}, "router_norm='layer' has no effect with a router of your own"),
        ({"unit_start": True, "inference_weight": "raw"}, "unit_start divides the gated weight"),
        ({"unit_start": True, "router_bias": -50.0}, "unit_start needs edges that start open"),
        ({"unit_start": 2}, "unit_start must be true or false, got 2"),
        ({"router_norm": "batch"}, "unknown router_norm 'batch'; allowed: none, layer"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, text):
    with pytest.raises(UsageError, match=text):
        RoutedOptions(**options)
