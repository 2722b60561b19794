"""A stage computes the same in every layout: its features are (B, C, H, W), (B, H, W, C) or (B, L, C)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dgnet.errors import UsageError
from dgnet.graph import (
    LAYOUTS,
    DynamicGraph,
    GateOptions,
    NodeGates,
    RoutedOptions,
    RoutedWeighting,
    record_connectivity,
    to_map,
)
from dgnet.graph._topology import complete
from dgnet.inference import set_mode
from tests.helpers.networks import spread_routers

CHANNELS, HEIGHT, WIDTH = 5, 3, 4


def from_map(feature: Tensor, layout: str) -> Tensor:
    """(B, C, H, W) in another layout."""
    if layout == "NCHW":
        return feature
    last = feature.permute(0, 2, 3, 1)
    return last if layout == "NHWC" else last.flatten(1, 2)


class Pointwise(nn.Linear):
    """A linear layer over the channels of maps, (B, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).tanh().permute(0, 3, 1, 2)


class PointwiseLast(nn.Linear):
    """A linear layer over the channels of features with channels last."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).tanh()


def build(layout: str) -> DynamicGraph:
    """The same stage in any layout: three blocks, edges and gates that differ from sample to sample."""
    torch.manual_seed(3)
    topology = complete(5)
    weighting = RoutedWeighting(topology, CHANNELS, RoutedOptions(threshold=0.45))
    gates = NodeGates(topology, CHANNELS, GateOptions("hard", 0.3))
    block = Pointwise if layout == "NCHW" else PointwiseLast
    nodes = [block(CHANNELS, CHANNELS) for _ in range(3)]
    stage = DynamicGraph(topology, weighting, nn.Identity(), nodes, nn.Identity(), node_gates=gates, layout=layout)
    spread_routers(stage)
    return stage.double()


def images() -> Tensor:
    return torch.randn(8, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_values_gradients_and_connectivity_are_those_of_maps(layout):
    expected, stage = build("NCHW"), build(layout)
    x, y = images().requires_grad_(), from_map(images(), layout).requires_grad_()
    for training in (True, False):
        with record_connectivity(expected.train(training)) as of_maps, record_connectivity(stage.train(training)) as found:
            a, b = expected(x), stage(y)
        torch.testing.assert_close(b, from_map(a, layout))
        torch.testing.assert_close(found.adjacency[0], of_maps.adjacency[0])
    assert 0 < (found.adjacency[0][:, stage.topology.mask] == 0).double().mean() < 1
    for output in (a, b):
        output.square().sum().backward()
    torch.testing.assert_close(y.grad, from_map(x.grad, layout))
    for one, other in zip(expected.parameters(), stage.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_sparse_mode_equals_the_dense_one(layout):
    stage = build(layout).eval()
    y = from_map(images(), layout)
    with torch.no_grad(), record_connectivity(stage) as dense:
        expected = stage(y)
    sparse = set_mode(copy.deepcopy(stage), "sparse")
    with torch.no_grad(), record_connectivity(sparse) as found:
        output = sparse(y)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(found.adjacency[0], dense.adjacency[0])
    assert not found.ran[0].all()
    assert torch.equal(found.ran[0], dense.ran[0])


def test_a_map_is_a_view_of_the_feature():
    for layout in LAYOUTS:
        feature = from_map(images(), layout).contiguous()
        seen = to_map(feature, layout)
        assert seen.shape[:2] == (8, CHANNELS)
        assert seen.untyped_storage().data_ptr() == feature.untyped_storage().data_ptr()
        torch.testing.assert_close(seen.mean((2, 3)), images().mean((2, 3)))


def test_an_unknown_layout_is_refused():
    with pytest.raises(UsageError, match="unknown layout 'NCL'"):
        DynamicGraph(complete(3), RoutedWeighting(complete(3), 2), nn.Identity(), [nn.Identity()], nn.Identity(), layout="NCL")
