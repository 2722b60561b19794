from __future__ import annotations

import pytest
import torch
from torch import nn

from dgnet.errors import UsageError
from dgnet.graph import record_connectivity, use_connectivity
from tests.helpers.networks import close_some


@torch.no_grad()
def test_forwards_append_along_the_batch_until_cleared(tiny):
    network = tiny().eval()
    with record_connectivity(network) as record:
        network(torch.randn(2, 3, 8, 8))
        network(torch.randn(3, 3, 8, 8))
        assert [matrix.shape for matrix in record.adjacency] == [(5, 5, 5)] * 3
        assert [matrix.shape for matrix in record.alpha] == [(5, 5, 5)] * 3
        assert [tau.shape for tau in record.threshold] == [(5,)] * 3
        record.clear()
        network(torch.randn(1, 3, 8, 8))
    network(torch.randn(4, 3, 8, 8))  # outside: not recorded
    assert len(record.adjacency[0]) == 1


def test_a_record_is_detached_and_rows_hold_in_edges(tiny):
    network = tiny()
    with record_connectivity(network) as record:
        network(torch.randn(2, 3, 8, 8)).sum().backward()
    assert not record.adjacency[0].requires_grad
    assert (record.adjacency[0].triu() == 0).all()
    assert (record.adjacency[0][:, torch.ones(5, 5).tril(-1).bool()] > 0).all()


@torch.no_grad()
def test_imposing_a_record_gives_the_forward_again(tiny):
    network = tiny()
    images = torch.randn(4, 3, 12, 10)
    close_some(network, images)
    with record_connectivity(network) as record:
        expected = network(images)
    with use_connectivity(network, record.adjacency), record_connectivity(network) as again:
        assert torch.equal(network(images), expected)
    for first, second in zip(record.adjacency, again.adjacency, strict=True):
        assert torch.equal(first, second)


@torch.no_grad()
def test_impose_one_matrix_on_all_or_on_some_stages(tiny):
    network = tiny().eval()
    images = torch.randn(4, 3, 8, 8)
    with record_connectivity(network) as record:
        plain = network(images)
    mean = [matrix.mean(0) for matrix in record.adjacency]
    with use_connectivity(network, mean):
        imposed = network(images)
    with use_connectivity(network, [None, None, None]):
        assert torch.equal(network(images), plain)
    assert not torch.equal(imposed, plain)
    assert torch.equal(network(images), plain)  # nothing stays behind


def test_what_does_not_fit_is_refused(tiny):
    network = tiny().eval()
    ones = torch.ones(5, 5).tril(-1)
    with pytest.raises(UsageError, match="3 dynamic stages, got 1"), use_connectivity(network, [ones]):
        pass
    with pytest.raises(UsageError, match=r"stage 2: an adjacency is \(5, 5\)"):
        use_connectivity(network, [ones, torch.ones(4, 4), ones]).__enter__()
    with pytest.raises(UsageError, match="stage 1: the adjacency weighs an edge that the topology lacks"):
        use_connectivity(network, [torch.ones(5, 5), ones, ones]).__enter__()
    with pytest.raises(UsageError, match="2 samples, the batch 3"), use_connectivity(network, [ones.expand(2, 5, 5)] * 3):
        network(torch.randn(3, 3, 8, 8))
    with pytest.raises(UsageError, match="Linear has no dynamic stages"), record_connectivity(nn.Linear(1, 1)):
        pass
    with record_connectivity(network) as record, pytest.raises(UsageError, match="nothing was recorded"):
        _ = record.adjacency


def test_a_checkpointed_forward_is_recorded_once(tiny):
    network = tiny()
    images = torch.randn(2, 3, 8, 8)
    with record_connectivity(network) as record:
        torch.utils.checkpoint.checkpoint(network, images.requires_grad_(), use_reentrant=False).sum().backward()
    assert len(record.adjacency[0]) == 2


def test_two_records_at_once(tiny):
    network = tiny().eval()
    with record_connectivity(network) as outer:
        network(torch.randn(1, 3, 8, 8))
        with record_connectivity(network) as inner:
            network(torch.randn(2, 3, 8, 8))
    assert (len(outer.adjacency[0]), len(inner.adjacency[0])) == (3, 2)


@pytest.mark.parametrize(
    ("options", "groups"), [({}, 1), ({"weight_groups": 2}, 2), ({"two_way": True, "shortcut": "node"}, 2)]
)
def test_imposed_weights_of_groups_have_the_groups_of_the_stage(tiny, options, groups):
    network = tiny(**options).eval()
    with record_connectivity(network) as record:
        logits = network(torch.ones(1, 3, 8, 8))
    with use_connectivity(network, record.edge_weights):
        torch.testing.assert_close(network(torch.ones(1, 3, 8, 8)), logits)
    for wrong in (3, 4):
        weights = torch.ones(5, 5).tril(-1)[None, :, :, None].expand(1, 5, 5, wrong)
        with pytest.raises(UsageError, match=rf"stage 1: an adjacency is .*, got \(1, 5, 5, {wrong}\)"):
            use_connectivity(network, [weights] * 3).__enter__()
    assert groups == network.stages[0].weighting.edge_weights
