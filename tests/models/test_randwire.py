"""Random graphs: what a seed draws, where it is stored, how RandWire's nodes read and a complete graph starts as one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dgnet
from dgnet.graph import find_stages


def test_weights_of_one_random_graph_do_not_load_into_another():
    options = {"num_blocks": 8, "channels": 4, "num_classes": 2}
    first, second = (dgnet.create_model("randwire_small_ba", topology_seed=seed, **options) for seed in (0, 1))
    same = dgnet.create_model("randwire_small_ba", **options)
    assert not torch.equal(first.layer1.mask, second.layer1.mask)
    assert torch.equal(first.layer1.mask, same.layer1.mask)  # seeded
    assert not torch.equal(first.layer1.mask, first.layer2.mask)  # each stage its own
    same.load_state_dict(first.state_dict())
    with pytest.raises(RuntimeError, match="layer1 has other edges than this model's"):
        second.load_state_dict(first.state_dict())


@torch.no_grad()
def test_a_start_opens_the_edges_of_the_random_graph_of_that_seed():
    options = {"num_blocks": 8, "channels": 4, "num_classes": 2, "topology_seed": 3}
    graph = dgnet.create_model("randwire_small_er", er_p=0.3, **options)
    model = dgnet.create_model("dg_randwire_small", router_start="er", er_p=0.3, **options)
    images = torch.randn(2, 3, 64, 64)
    for network in (model, dgnet.create_model("dg_randwire_small", **{**options, **model.stored_options()})):
        with dgnet.record_connectivity(network.train()) as record:
            network(images)
        for alpha, stage in zip(record.alpha, find_stages(graph), strict=True):
            assert torch.equal(alpha > 0.9, stage.mask.expand_as(alpha))
            assert torch.equal(alpha > 0, torch.ones(10, 10, dtype=torch.bool).tril(-1).expand_as(alpha))
            assert alpha[:, ~stage.mask].max() < 0.001


@torch.no_grad()
def test_randwires_entry_nodes_read_the_raw_input_and_its_output_is_the_mean():
    model = dgnet.create_model("randwire_small_er", num_blocks=8, channels=4, topology_seed=2).eval()
    stage = model.layer2
    topology = stage.topology
    sources = [j for j in range(1, 9) if topology.senders(j) == (0,)]
    sinks = topology.senders(9)
    assert list(topology.entry) == sources
    assert len(sources) > 1
    assert len(sinks) > 1
    assert isinstance(stage.input, nn.Identity)
    assert {stage.nodes[j - 1].conv_dw.stride for j in sources} == {(2, 2)}
    x = torch.randn(2, 4, 8, 8)
    with dgnet.record_connectivity(stage) as record:
        output = stage(x)
    weights = record.adjacency[0][0]
    assert (weights[sources, 0] == 1).all()
    torch.testing.assert_close(weights[9, list(sinks)], torch.full((len(sinks),), 1 / len(sinks)))
    free = topology.mask.clone()
    free[:, 0] = free[9] = False
    torch.testing.assert_close(weights[free], torch.tensor(1.0).sigmoid().expand(int(free.sum())))
    features: dict[int, Tensor] = {}
    for j in range(1, 9):
        incoming = [x if i == 0 else weights[j, i] * features[i] for i in topology.senders(j)]
        features[j] = stage.nodes[j - 1](sum(incoming))
    torch.testing.assert_close(output, sum(features[i] for i in sinks) / len(sinks))
