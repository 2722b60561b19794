"""Gates of a whole network that its first stage decides at once."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dgnet
from dgnet.errors import UsageError
from dgnet.graph import find_stages, record_connectivity, use_connectivity
from dgnet.graph._network_gates import PassedDecisions
from dgnet.inference import set_mode, set_sparse
from dgnet.inference._sparse import SparseWalk
from tests.helpers.networks import shake_norms

POLICIES = ("linear", "convolutional")


@pytest.fixture
def gated(tiny):
    def build(policy: str = "linear", **options: object) -> nn.Module:
        gates = {"node_gate": "hard", "node_gate_bias": 0.0, "gate_reads": "network", "gate_policy": policy}
        return tiny(weighting="fixed", **{**gates, **options})

    return build


def decide_by_hand(network: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Which gates are open, (B, blocks) for each stage, written out."""
    first = network.stages[0]
    feature = first.input(network.forward_intermediates(images, indices=[0])[1][0])
    policy = first.node_gates.policy
    for module in policy.trunk:
        feature = module(feature)
    votes, start, opened = feature.mean((2, 3)) @ policy.head.weight.T, 0, []
    for stage in network.stages:
        gates = len(stage.topology.blocks)
        opened.append(votes[:, start : start + gates] + stage.node_gates.bias[1:-1] >= 0)
        start += gates
    assert start == votes.shape[1]
    return opened


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_the_gates_of_all_stages_follow_from_the_first_stages_input(gated, policy):
    network, images = gated(policy).eval(), torch.randn(8, 3, 16, 16) + 2 * torch.randn(8, 3, 1, 1)
    expected = decide_by_hand(network, images)
    with record_connectivity(network) as record:
        logits = network(images)
    for ran, opened in zip(record.ran, expected, strict=True):
        assert torch.equal(ran[:, 1:-1], opened)
    assert len({tuple(row.tolist()) for row in torch.cat(expected, 1)}) > 2  # the case is not a trivial one
    torch.testing.assert_close(set_mode(copy.deepcopy(network), "sparse")(images), logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(set_sparse(copy.deepcopy(network), "native")(images), logits, rtol=1e-4, atol=1e-5)
    exported = torch.export.export(network, (images,)).module()
    torch.testing.assert_close(exported(images), logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_only_the_first_stage_holds_a_policy_and_it_counts_as_routing(gated):
    network = gated("convolutional")
    without = gated("linear", node_gate="none", node_gate_bias=2.0, gate_reads="senders")
    assert [stage.node_gates.policy is not None for stage in network.stages] == [True, False, False]
    assert dgnet.cost(without, 16).router_multiply_adds == 0
    # Three convolutions of stride 2 on 4 channels and 16×16 pixels, which double the channels; nine gates.
    policy = 8 * 8 * 9 * 4 * 4 + 4 * 4 * 9 * 4 * 8 + 2 * 2 * 9 * 8 * 16 + 16 * 9
    assert dgnet.cost(network, 16).router_multiply_adds == policy


@pytest.mark.parametrize("policy", POLICIES)
def test_every_parameter_of_the_policy_has_a_gradient_also_with_checkpointing(gated, policy):
    network, images = gated(policy).train(), torch.randn(4, 3, 16, 16)
    again = copy.deepcopy(network)
    again.set_grad_checkpointing()
    for model in (network, again):
        model(images).square().sum().backward()
    gradients = dict(again.named_parameters())
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-5)
        if "policy" in name:
            assert parameter.grad.any(), name


@pytest.mark.slow
@torch.no_grad()
def test_compiled_it_is_the_same(gated):
    network, images = gated().eval(), torch.randn(4, 3, 16, 16)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(images), network(images))


@torch.no_grad()
def test_a_stage_takes_the_votes_of_its_own_pass(gated):
    network = gated().eval()
    images = torch.randn(2, 3, 16, 16)
    x = network.forward_intermediates(images, indices=[1], stop_early=True)[1][0]
    network.stages[1](x)  # this pass has stopped before the second stage: its votes were left
    with pytest.raises(UsageError, match="run the whole network"):
        network.stages[1](x)
    with pytest.raises(UsageError, match="run the whole network"):
        copy.deepcopy(network).stages[1](x)


@torch.no_grad()
def test_passes_in_several_threads_do_not_mix(gated):
    network = gated().eval()
    batches = [torch.randn(3, 3, 16, 16) for _ in range(6)]
    expected = [network(images) for images in batches]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda images: network(images).clone(), batches * 5))
    for logits, index in zip(found, list(range(6)) * 5, strict=True):
        torch.testing.assert_close(logits, expected[index])


@torch.no_grad()
def test_weights_imposed_on_the_first_stage_leave_the_other_gates_as_they_are(gated):
    network, images = gated().eval(), torch.randn(6, 3, 16, 16)
    expected = decide_by_hand(network, images)
    first = network.stages[0]
    for mode in ("dense", "sparse"):
        set_mode(network, mode)
        with use_connectivity(first, first.topology.mask.float()[None]), record_connectivity(network) as record:
            network(images)
        assert record.ran[0].all()
        assert torch.equal(record.ran[1][:, 1:-1], expected[1])


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_a_converted_network_keeps_its_function(policy):
    static = shake_norms(dgnet.create_model("resnet20")).eval()
    images = torch.randn(4, 3, 32, 32)
    converted = dgnet.convert(static, node_gate="hard", gate_reads="network", gate_policy=policy)
    torch.testing.assert_close(converted(images), static(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dgnet.to_static(converted)(images), static(images))
    nn.init.normal_(find_stages(converted)[0].node_gates.policy.head.weight, std=5)
    with pytest.raises(UsageError, match="its gates depend on the image"):
        dgnet.to_static(converted)


def test_tokens_have_no_convolutional_policy():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2)
    options = {"node_gate": "hard", "gate_reads": "network"}
    dgnet.convert(vit, **options)
    with pytest.raises(UsageError, match=r"gate_policy='convolutional' is not possible: .* holds tokens"):
        dgnet.convert(vit, gate_policy="convolutional", **options)


def test_a_policy_without_network_gates_is_refused():
    with pytest.raises(UsageError, match="gate_policy='convolutional' has no effect with gate_reads='stage'"):
        dgnet.create_model("dg_resnet20", node_gate="hard", gate_reads="stage", gate_policy="convolutional")


class CountWaits(TorchDispatchMode):
    """Counts how often the samples of a block are asked for, for which the CPU has to wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.waits += function is torch.ops.aten.nonzero.default
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("reads", ["senders", "stage", "network"])
@torch.no_grad()
def test_early_gates_are_read_once(tiny, monkeypatch, reads):
    """Once for each stage, or for the whole network: not at each block."""
    network = tiny(weighting="fixed", node_gate="hard", node_gate_bias=0.0, gate_reads=reads).eval()
    images = torch.randn(8, 3, 16, 16) + 2 * torch.randn(8, 3, 1, 1)
    with record_connectivity(network) as record:
        logits = network(images)
    assert any(0 < float(ran[:, 1:-1].float().mean()) < 1 for ran in record.ran)
    set_mode(network, "sparse")
    copies = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor.shape) or tensor)
    # Rows follow from gates that are on the CPU already: that is no wait.
    monkeypatch.setattr(SparseWalk, "_plan", lambda walk, opened: plan_by_hand(walk, opened))
    with CountWaits() as counted, record_connectivity(network) as again:
        sparse = network(images)
    torch.testing.assert_close(sparse, logits, rtol=1e-4, atol=1e-5)
    assert all(map(torch.equal, again.ran, record.ran))
    assert counted.waits == (9 if reads == "senders" else 0)
    assert len(copies) == {"senders": 0, "stage": 3, "network": 1}[reads]


def plan_by_hand(walk: SparseWalk, opened: torch.Tensor) -> list[torch.Tensor]:
    """The rows of each node of a complete graph: every block reads the input node, so it runs where its gate is open."""
    rows = [torch.tensor([row for row, gate in enumerate(column) if gate], dtype=torch.long) for column in opened.T.tolist()]
    return [torch.arange(len(opened)), *rows]


def test_threads_forget_only_what_is_their_own():
    """While one thread looks through what all threads have left, others add and take."""
    passed, failures = PassedDecisions(), []
    decisions = [torch.zeros(1, 1)] * 3

    def work(_: int) -> None:
        try:
            for _ in range(3000):
                passed.clear()
                passed.put("votes", decisions)
                assert all(passed.take("votes", stage) is not None for stage in range(3))
        except Exception as error:
            failures.append(error)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert not failures
