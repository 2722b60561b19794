"""Features that the backward pass computes again: `dgnet.graph._renormalize`. The twin keeps them."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from dgnet.graph import _aggregate as aggregate_module


class Blocks(nn.Module):
    """Three blocks that end with a batch normalisation and read all features before theirs, with learned weights."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), norm(4)) for _ in range(3))
        self.weights = nn.ParameterList(torch.randn(5, node + 1) for node in range(3))
        for block in self.blocks:
            nn.init.normal_(block[1].weight)
            nn.init.normal_(block[1].bias)
        self.double()
        self.kept: list[StorageWeakRef] = []

    def forward(self, x: Tensor, call=lambda block, x: block(x)) -> Tensor:
        features = [x]
        for block, weights in zip(self.blocks, self.weights, strict=True):
            features.append(call(block, torch.relu(aggregate_module.aggregate(features, weights))))
        self.kept = [StorageWeakRef(feature.untyped_storage()) for feature in features[1:-1]]
        return features[-1].square()  # keeps the last one


def images() -> Tensor:
    return torch.randn(5, 4, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(network: nn.Module, around=nullcontext, **options) -> list[Tensor]:
    with around():
        output = network(images(), **options)
    output.sum().backward()
    return [parameter.grad for parameter in network.parameters() if parameter.requires_grad]


@pytest.fixture
def twin(monkeypatch):
    """The gradients if all features are kept."""

    def run(network: nn.Module) -> list[Tensor]:
        with monkeypatch.context() as patch:
            patch.setattr(aggregate_module, "keep_inputs_of_norms", lambda features: nullcontext())
            return gradients(network)

    return run


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("training", [True, False])
def test_normalised_features_are_not_kept_and_gradients_stay(twin, training):
    network = Blocks().train(training)
    output = network(images())
    assert [reference.expired() for reference in network.kept] == [True, True]
    found = torch.autograd.grad(output.sum(), list(network.parameters()), retain_graph=True)
    again = torch.autograd.grad(output.sum(), list(network.parameters()))
    statistics = {name: value.clone() for name, value in network.named_buffers()}
    assert_close(list(found), twin(Blocks().train(training)))
    assert_close(list(again), list(found))
    for name, value in network.named_buffers():  # computing again does not count as a pass
        assert torch.equal(value, statistics[name])


def test_other_features_are_kept(twin):
    network = Blocks(partial(nn.GroupNorm, 2))
    output = network(images())
    assert [reference.expired() for reference in network.kept] == [False, False]
    assert_close(list(torch.autograd.grad(output.sum(), list(network.parameters()))), twin(Blocks(partial(nn.GroupNorm, 2))))


def test_a_frozen_normalisation_keeps_its_feature(twin):
    network, kept = Blocks(), Blocks()
    for one in (network, kept):
        one.blocks[0][1].requires_grad_(False)
    output = network(images())
    assert [reference.expired() for reference in network.kept] == [False, True]
    assert output.requires_grad
    assert_close(gradients(network), twin(kept))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks(twin, reentrant):
    network = Blocks()
    found = gradients(network, call=lambda block, x: checkpoint(block, x, use_reentrant=reentrant))
    assert_close(found, twin(Blocks()))


def test_a_checkpointed_network_keeps_nothing(twin):
    network = Blocks()
    output = checkpoint(network, images().requires_grad_(), use_reentrant=False)
    assert [reference.expired() for reference in network.kept] == [True, True]
    assert_close(list(torch.autograd.grad(output.sum(), list(network.parameters()))), twin(Blocks()))


def test_hooks_of_others_go_first(twin):
    assert_close(gradients(Blocks(), save_on_cpu), twin(Blocks()))
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        found = gradients(Blocks())
    assert_close(found, twin(Blocks()))


def test_gradients_of_gradients(monkeypatch):
    def second() -> list[Tensor]:
        network = Blocks()
        parameters = list(network.parameters())
        first = torch.autograd.grad(network(images()).sum(), parameters, create_graph=True)
        return list(torch.autograd.grad(sum(gradient.square().sum() for gradient in first), parameters))

    found = second()
    monkeypatch.setattr(aggregate_module, "keep_inputs_of_norms", lambda features: nullcontext())
    assert_close(found, second())


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parameter_that_has_changed_is_an_error(name):
    network = Blocks()
    output = network(images())
    with torch.no_grad():
        getattr(network.blocks[0][1], name).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
