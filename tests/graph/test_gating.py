from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from torch import nn

import dgnet
from dgnet.errors import UsageError
from dgnet.graph import DynamicGraph, FixedWeighting, GateOptions, NodeGates, Topology, accept_cuts, record_connectivity
from dgnet.graph._topology import complete
from dgnet.inference import set_mode, set_sparse


def test_a_gate_in_training_is_0_or_1_with_the_gradient_of_its_probability():
    gates = NodeGates(complete(4), 3, GateOptions("hard", 0.3))
    votes = torch.tensor([[1.0, -2.0], [0.5, 0.2], [-0.2, -0.1]], requires_grad=True)
    gate = gates.decide(2, votes)
    assert gate.tolist() == [0, 1, 1]
    gate.sum().backward()
    probability = (votes.detach().sum(1) + 0.3).sigmoid()
    torch.testing.assert_close(votes.grad, (probability * (1 - probability))[:, None].expand(-1, 2))


def test_noise_opens_a_gate_as_often_as_its_probability_says_and_only_in_training():
    gates = NodeGates(complete(4), 3, GateOptions("gumbel", -1.0))
    votes = torch.zeros(20000, 2)
    share = gates.decide(2, votes).detach()
    assert set(share.tolist()) == {0.0, 1.0}
    assert share.mean().item() == pytest.approx(1 / (1 + math.e), abs=0.02)
    assert not gates.eval().decide(2, votes).any()


@pytest.mark.parametrize(("offset", "expected"), [(0.0, [False, True, True]), (0.2, [False, False, True]), (-0.5, [True] * 3)])
def test_in_evaluation_a_gate_opens_from_a_half_and_the_offset(offset, expected):
    gates = NodeGates(complete(4), 3, GateOptions("gumbel", 0.0)).eval()
    votes = torch.tensor([0.4, 0.6, 0.8]).logit()[:, None]
    assert gates.decide(1, votes, offset).tolist() == expected


def test_a_closed_gate_learns_what_its_block_would_have_brought():
    topology = complete(4)
    stage = DynamicGraph(
        topology,
        FixedWeighting(topology, 3),
        input=nn.Conv2d(2, 3, 1),
        nodes=[nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 3, padding=1)],
        activation=nn.Identity(),
        node_gates=NodeGates(topology, 3, GateOptions("hard")),
    ).double()
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64)

    def output(bias: float) -> torch.Tensor:
        with torch.no_grad():
            stage.node_gates.bias[2] = bias
        return stage(x).sum()

    for column in stage.node_gates.columns.values():
        nn.init.zeros_(column.weight)
    closed = output(-0.7)
    closed.backward()
    # The output is linear in the gate of the last block.
    slope = torch.tensor(-0.7).sigmoid() * torch.tensor(0.7).sigmoid()
    expected = (output(0.7) - closed).detach() * slope
    assert expected.abs() > 1e-3
    torch.testing.assert_close(stage.node_gates.bias.grad[2], expected.double())


@torch.no_grad()
def test_blocks_run_for_some_images_only_and_evaluation_is_the_same_in_any_batch(tiny):
    network = tiny(node_gate="gumbel", node_gate_bias=0.0).eval()
    images = torch.randn(8, 3, 12, 10)
    with record_connectivity(network) as record:
        logits = network(images)
    ran = torch.cat([stage[:, 1:-1] for stage in record.ran], dim=1).float()
    assert 0.2 < ran.mean() < 0.8
    assert (ran.std(0) > 0).any()
    torch.testing.assert_close(torch.cat([network(image[None]) for image in images]), logits, rtol=1e-4, atol=1e-5)


def test_gates_go_with_every_weighting_and_options_that_idle_are_refused():
    for weighting in ("fixed", "learned", "routed"):
        network = dgnet.create_model("dg_resnet20", weighting=weighting, node_gate="hard")
        assert len(network.stages[0].node_gates.columns) == 3  # the last block has nobody to gate
        loss = network(torch.randn(2, 3, 32, 32)).square().sum()
        loss.backward()
        assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
    for options, message in [
        ({"node_gate": "soft"}, "unknown node_gate 'soft'; allowed: none, hard, gumbel"),
        ({"node_gate_bias": 1.0}, "node_gate_bias=1.0 has no effect with node_gate='none'"),
        ({"weighting": "fixed", "threshold_offset": 0.1}, "threshold_offset=0.1 has no effect with"),
    ]:
        with pytest.raises(UsageError, match=message):
            dgnet.create_model("dg_resnet20", **options)
    # Gates read what routers would read.
    dgnet.create_model("dg_resnet20", weighting="fixed", node_gate="hard", threshold_offset=0.1, router_reads="activation")


def test_gates_whose_closing_would_cut_a_stage_are_refused():
    message = r"stage {}: node_gate='hard' is not possible here: every path through the stage leads through block 1, .*--budget"
    for options, stage in [({"topology": "chain"}, 1), ({"topology": "complete,chain,complete"}, 2)]:
        with pytest.raises(UsageError, match=message.format(stage)):
            dgnet.create_model("dg_resnet20", node_gate="hard", **options)
        with accept_cuts():  # what older versions trained
            dgnet.create_model("dg_resnet20", node_gate="hard", **options)
    mask = torch.ones(5, 5).tril(-1)
    mask[4, 0] = mask[4, 1] = mask[3, 0] = mask[3, 1] = 0  # all paths lead through block 2
    mask[1, 0] = 1
    with pytest.raises(UsageError, match="through block 2"):
        NodeGates(Topology(mask), 4, GateOptions("gumbel"))
    dgnet.create_model("dg_resnet20", node_gate="hard", topology="residual")


@torch.no_grad()
def test_gates_that_read_the_stages_input_do_not_depend_on_what_its_blocks_compute(tiny):
    network = tiny(node_gate="hard", node_gate_bias=0.0, gate_reads="stage", topology="residual").eval()
    images = torch.randn(8, 3, 12, 10)
    with record_connectivity(network) as record:
        logits = network(images)
    assert any(0 < float(ran[:, 1:-1].float().mean()) < 1 for ran in record.ran)
    torch.testing.assert_close(set_mode(deepcopy(network), "sparse")(images), logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(set_sparse(deepcopy(network), "native")(images), logits, rtol=1e-4, atol=1e-5)
    stage = network.stages[0]
    for block in stage.nodes:
        nn.init.zeros_(block.conv2.weight)
    with record_connectivity(network) as changed:
        network(images)
    assert torch.equal(changed.ran[0], record.ran[0])
