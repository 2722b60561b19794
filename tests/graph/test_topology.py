from __future__ import annotations

import pytest
import torch
from torch import nn

from dgnet.errors import UsageError
from dgnet.graph import (
    DynamicGraph,
    FixedWeighting,
    LearnedWeighting,
    RandomGraphOptions,
    RoutedWeighting,
    Topology,
    build_topology,
    record_connectivity,
)
from dgnet.graph._topology import chain, complete, residual


def test_named_topologies_have_the_papers_edges():
    def edges(topology):
        return {(i, j) for j in range(topology.num_nodes) for i in topology.senders(j)}

    assert edges(complete(5)) == {(i, j) for j in range(5) for i in range(j)}
    assert edges(residual(5)) == {(i, j) for i in range(5) for j in (i + 1, i + 2) if j < 5}
    assert edges(chain(5)) == {(i, i + 1) for i in range(4)}


def test_a_stage_of_b_blocks_has_the_edges_that_the_notes_count():
    for blocks in (1, 2, 6):
        assert complete(blocks + 2).num_edges == (blocks + 1) * (blocks + 2) // 2


def test_senders_and_receivers_are_the_rows_and_columns_of_the_mask():
    mask = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0]])
    topology = Topology(mask)
    assert topology.senders(3) == (0, 2)
    assert topology.receivers(0) == (1, 3)
    assert topology.reads_input_node
    assert not chain(4).reads_input_node


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 3), "square matrix, got shape"),
        (torch.ones(2, 2).tril(-1), "at least 3 nodes"),
        (torch.ones(3, 3).tril(), "input node and has no in-edges"),
        (torch.tensor([[0, 0, 0], [1, 0, 1], [1, 1, 0]]), "acyclic: node 1 has an in-edge from node 2"),
        (torch.tensor([[0, 0, 0], [1, 0, 0], [1, 0, 0]]), "node 1 lies on no path"),
        (torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0]]), "node 2 lies on no path"),
        ([[0, 0, 0], [1, 0]], "square matrix of 0 and 1, got"),
        ([["a", "b"], ["c", "d"]], "square matrix of 0 and 1, got"),
        (None, "square matrix of 0 and 1, got None"),
    ],
)
def test_a_bad_mask_is_refused(mask, message):
    with pytest.raises(UsageError, match=message):
        Topology(mask)


def test_entry_nodes_read_the_raw_input_only():
    with pytest.raises(UsageError, match="entry node 2 reads the raw stage input only"):
        Topology(torch.ones(4, 4).tril(-1), entry=(1, 2))
    with pytest.raises(UsageError, match="an entry node is a block node"):
        Topology(torch.ones(4, 4).tril(-1), entry=(3,))


def test_a_topology_is_a_name_a_mask_or_a_callable():
    mask = torch.ones(4, 4).tril(-1)
    for given in ("complete", mask, Topology(mask), complete, lambda num_nodes: mask):
        assert torch.equal(build_topology(given, 4).mask, mask.bool())
    with pytest.raises(UsageError, match="the stage has 5 nodes"):
        build_topology(mask, 5)
    with pytest.raises(UsageError, match="unknown topology 'compleet'; did you mean 'complete'"):
        build_topology("compleet", 4)


@pytest.mark.parametrize("weighting", [FixedWeighting, LearnedWeighting, RoutedWeighting])
def test_pinned_nodes_keep_their_constant(weighting):
    """RandWire's form: two entry nodes, edges to the output weigh the mean."""
    mask = torch.tensor([[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 0, 1, 0]])
    topology = Topology(mask, entry=(1, 2), pinned={1: 1.0, 2: 1.0, 4: 0.5})
    stage = DynamicGraph(
        topology, weighting(topology, 2), torch.nn.Identity(), [torch.nn.Identity()] * 3, torch.nn.Identity()
    ).eval()
    x = torch.rand(2, 2, 3, 3)
    with record_connectivity(stage) as record:
        output = stage(x)
    free = record.adjacency[0][:, 3, [1, 2]]
    third = x * free.sum(1)[:, None, None, None]
    torch.testing.assert_close(output, 0.5 * x + 0.5 * third)
    assert torch.equal(record.adjacency[0][:, 1, 0], torch.ones(2))


def test_the_constant_of_a_pinned_node_is_not_rounded_to_the_precision_of_the_images():
    topology = Topology(torch.ones(3, 3).tril(-1), pinned={2: 1 / 3})
    stage = DynamicGraph(topology, FixedWeighting(topology, 2), nn.Identity(), [nn.Identity()], nn.Identity()).eval()
    with record_connectivity(stage) as record:
        stage(torch.rand(1, 2, 3, 3, dtype=torch.bfloat16))
    assert record.adjacency[0][0, 2, :2].tolist() == pytest.approx([1 / 3] * 2, rel=1e-6)


def find_cut_by_closing(topology: Topology) -> int | None:
    """`find_cut` by counting paths: powers of the adjacency without one block's edges."""
    for block in topology.blocks:
        matrix = topology.mask.double().clone()
        matrix[block] = matrix[:, block] = 0
        paths = sum(torch.linalg.matrix_power(matrix, length) for length in range(1, topology.num_nodes))
        if not paths[topology.output, 0]:
            return block
    return None


def test_the_block_that_is_on_every_path_is_found():
    for name, cut in [("complete", None), ("residual", None), ("chain", 1)]:
        assert build_topology(name, 6).find_cut() == cut
    # Two rows of blocks that meet in block 3.
    mask = torch.zeros(7, 7)
    for i, j in [(0, 1), (0, 2), (1, 3), (2, 3), (3, 4), (3, 5), (4, 6), (5, 6)]:
        mask[j, i] = 1
    assert Topology(mask).find_cut() == 3
    for seed in range(30):
        for name in ("er", "ba", "ws"):
            topology = build_topology(name, 10, RandomGraphOptions(topology_seed=seed, er_p=0.5, ba_m=2))
            assert topology.find_cut() == find_cut_by_closing(topology)
