"""Presets are the networks that they are named after, block by block."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dgnet
from dgnet.errors import UsageError
from dgnet.graph import find_stages, record_connectivity
from dgnet.inference import set_mode
from dgnet.presets import PRESETS
from tests.helpers.networks import shake_norms


def skip_by_hand(static: nn.Module, ran: list[torch.Tensor], blocks: list[list[str]], images: torch.Tensor) -> torch.Tensor:
    """The logits of a static network whose blocks are left out, image by image, where `ran` says that they did not run."""
    logits = []
    for index in range(len(images)):
        network = copy.deepcopy(static)
        for stage, names in zip(ran, blocks, strict=True):
            for position, name in enumerate(names, start=1):
                if not stage[index, position]:
                    network.set_submodule(name, nn.Identity())
        logits.append(network(images[index : index + 1]))
    return torch.cat(logits)


@pytest.mark.parametrize("preset", ["skipnet", "convnet-aig", "blockdrop"])
@torch.no_grad()
def test_a_skipped_block_of_a_residual_network_is_the_identity(preset):
    static = shake_norms(dgnet.create_model("resnet20")).eval()
    images = torch.randn(5, 3, 32, 32)
    converted = dgnet.convert(static, preset=preset)
    torch.testing.assert_close(converted(images), static(images), rtol=1e-4, atol=1e-4)
    for stage in find_stages(converted):
        nn.init.zeros_(stage.node_gates.bias)
        for reader in stage.node_gates.readers:
            nn.init.normal_(reader.weight)
    with record_connectivity(converted) as record:
        logits = converted(images)
    ran = torch.cat([own[:, 1:-1] for own in record.ran], 1).float().mean()
    assert 0.2 < float(ran) < 0.9
    for matrix, own, stage in zip(record.adjacency, record.ran, find_stages(converted), strict=True):
        alive = own[:, :, None] & own[:, None, :] & stage.topology.mask
        assert torch.equal(matrix, alive.to(matrix.dtype))  # every edge between two nodes that run weighs 1
    blocks = [list(run.blocks) for run in converted.conversion.stages]
    torch.testing.assert_close(skip_by_hand(static, record.ran, blocks, images), logits, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_maskconnect_keeps_the_heaviest_in_edges():
    network = dgnet.create_model("dg_resnet32", preset="maskconnect").eval()
    images = torch.randn(2, 3, 32, 32)
    for stage in find_stages(network):
        nn.init.normal_(stage.weighting.alpha)
    with record_connectivity(network) as record:
        logits = network(images)
    for stage, matrix in zip(find_stages(network), record.adjacency, strict=True):
        for node in range(1, stage.topology.num_nodes):
            senders = list(stage.topology.senders(node))
            alpha = stage.weighting.shared_alpha(node)
            kept = sorted(range(len(senders)), key=lambda edge: -abs(float(alpha[edge])))[:4]
            expected = torch.tensor([float(alpha[edge]) if edge in kept else 0.0 for edge in range(len(senders))])
            torch.testing.assert_close(matrix[:, node, senders], expected.expand(2, -1))
    assert max(int((matrix[0] != 0).sum(1).max()) for matrix in record.adjacency) == 4
    torch.testing.assert_close(set_mode(network, "sparse")(images), logits, rtol=1e-4, atol=1e-5)


def test_a_closed_edge_of_maskconnect_learns_as_if_it_were_open():
    network = dgnet.create_model("dg_resnet20", weighting="learned", keep_edges=1).train()
    stage = find_stages(network)[0]
    nn.init.uniform_(stage.weighting.alpha, 0.5, 1.0)
    network(torch.randn(2, 3, 32, 32)).sum().backward()
    assert (stage.weighting.order.row(stage.weighting.alpha.grad, stage.topology.output) != 0).all()
    alpha = torch.tensor([[1.0, -2.0, 0.5]], requires_grad=True)
    weights = stage.weighting.weigh(3, alpha)
    weights.backward(torch.tensor([[3.0, 4.0, 5.0]]))
    assert weights.tolist() == [[0, -2, 0]]
    assert alpha.grad.tolist() == [[3, 4, 5]]


@torch.no_grad()
def test_denseformer_sums_what_was_summed_before():
    network = shake_norms(dgnet.create_model("dg_resnet20", preset="denseformer")).eval()
    stage = find_stages(network)[1]
    matrix = torch.zeros(stage.topology.num_nodes, stage.topology.num_nodes)
    for node in range(1, stage.topology.num_nodes):
        matrix[node, node - 1] = 1
    with record_connectivity(network) as record:
        network(torch.randn(2, 3, 32, 32))
    assert all(torch.equal(own, matrix.expand(2, -1, -1)) for own in record.adjacency)  # at first, only the last sum
    nn.init.normal_(stage.weighting.alpha)
    x = torch.randn(2, 16, 8, 8)
    first = stage.input(x)
    sums = [first]
    for node in range(1, stage.topology.num_nodes):
        alpha = stage.weighting.shared_alpha(node)
        read = sum(weight * one for weight, one in zip(alpha, sums, strict=True))
        if node == 1:  # the raw input, with one weight; the shortcut is the projected one
            sums.append(torch.relu(stage.nodes[0](alpha[0] * x) + read))
        elif node == stage.topology.output:
            sums.append(read)
        else:
            sums.append(torch.relu(stage.nodes[node - 1](read) + read))
    torch.testing.assert_close(stage(x), sums[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_its_options(preset):
    given = PRESETS[preset]
    named = dgnet.create_model("dg_resnet20", preset=preset)
    spelled = dgnet.create_model("dg_resnet20", **given.options)
    assert named.connectivity_options == spelled.connectivity_options
    # What it is built with can be given beside it, as a resumed run does.
    assert dgnet.create_model("dg_resnet20", preset=preset, **given.options).connectivity_options == named.connectivity_options
    if given.converted is not None:
        static = dgnet.create_model("resnet20")
        converted = dgnet.create_model("resnet20", preset=preset)
        assert converted.connectivity_options == dgnet.convert(static, preset=preset).connectivity_options
        assert (given.converted or given.options).items() <= converted.connectivity_options.items()


def test_presets_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="unknown preset 'skipnets'; did you mean 'skipnet'"):
        dgnet.create_model("dg_resnet20", preset="skipnets")
    with pytest.raises(UsageError, match="preset='skipnet' sets weighting='fixed', and weighting='routed' is given"):
        dgnet.create_model("dg_resnet20", preset="skipnet", weighting="routed")
    with pytest.raises(UsageError, match=r"preset='maskconnect' closes edges from the start, .* resnet20; use a dg_ network"):
        dgnet.create_model("resnet20", preset="maskconnect")
    for given in ({"node_gate": "gumbel"}, {"weighting": "routed"}):  # also a value that is the default
        with pytest.raises(UsageError, match=r"preset='skipnet' sets .* is given"):
            dgnet.convert(dgnet.create_model("resnet20"), **given, preset="skipnet")
    for value in (-1, True, 1.5):
        with pytest.raises(UsageError, match="keep_edges must be a whole number"):
            dgnet.create_model("dg_resnet20", weighting="learned", keep_edges=value)
