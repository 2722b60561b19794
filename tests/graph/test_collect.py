"""The gradients of features that several nodes read: `dgnet.graph._collect`. The twin is autograd of the loop over edges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dgnet.graph import aggregate, aggregate_by_loop
from tests.helpers.twins import TOLERANCES

backward = torch.ops.dgnet.aggregate_backward.default
forward = torch.ops.dgnet.aggregate.default


class Stage:
    """Nodes that each read all earlier ones, as a function of leaves: `inputs` holds what needs gradients."""

    def __init__(
        self, seed: int, nodes: int = 4, dtype: torch.dtype = torch.float64, fixed: bool = False, closing=True
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.nodes, self.dtype = nodes, dtype
        self.x = self.draw(3, 4, 2, 5).to(dtype).requires_grad_()
        self.weights = [self.draw(3, node).float().requires_grad_(not fixed) for node in range(1, nodes + 1)]
        if dtype == torch.float64:
            self.weights = [weights.detach().double().requires_grad_(not fixed) for weights in self.weights]
        self.opened = [self.draw(3, node) > -0.5 if closing and node % 2 == 0 else None for node in range(1, nodes + 1)]
        self.inputs = [self.x] if fixed else [self.x, *self.weights]

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def run(self, form) -> Tensor:
        features = [self.x * 1.5]
        for weights, is_open in zip(self.weights, self.opened, strict=True):
            features.append(torch.tanh(form(features, weights, is_open)))
        return features[-1]

    def gradients(self, form, **options) -> tuple[Tensor, ...]:
        output = self.run(form)
        return torch.autograd.grad(output, self.inputs, torch.ones_like(output), **options)


def assert_close(found, expected, dtype=torch.float64):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@given(
    seed=st.integers(0, 2**31),
    nodes=st.integers(1, 6),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    fixed=st.booleans(),
    closing=st.booleans(),
)
def test_gradients_match_the_twin(seed, nodes, dtype, fixed, closing):
    stage = Stage(seed, nodes, dtype, fixed, closing)
    assert_close(stage.gradients(aggregate), stage.gradients(aggregate_by_loop), dtype)


def test_half_precision_is_no_less_exact_than_the_twin():
    stage, exact = Stage(0, 5, torch.bfloat16), Stage(0, 5, torch.float64)
    exact.x.data = stage.x.detach().double()
    exact.weights = [weights.detach().double().requires_grad_() for weights in stage.weights]
    exact.inputs = [exact.x, *exact.weights]
    found, twin, wanted = stage.gradients(aggregate), stage.gradients(aggregate_by_loop), exact.gradients(aggregate_by_loop)
    assert [gradient.dtype for gradient in found] == [torch.bfloat16, *[torch.float32] * 5]
    for one, other, right in zip(found, twin, wanted, strict=True):
        assert (one.double() - right).norm() <= 1.2 * (other.double() - right).norm() + 1e-3 * right.norm()


class Calls(TorchDispatchMode):
    """Counts the calls of the operators in a backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.sums, self.written = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.sums += function == forward
        if function == backward:
            self.written += sum(args[5])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("fixed", [True, False])
def test_the_backward_pass_writes_one_map_for_each_node_not_for_each_edge(fixed):
    stage = Stage(0, 5, fixed=fixed)
    output = stage.run(aggregate)
    with Calls() as calls:
        output.sum().backward()
    assert (calls.sums, calls.written) == (5, 0)  # 15 edges, from five nodes


def test_a_graph_can_be_run_backward_again():
    stage = Stage(1)
    output = stage.run(aggregate)
    expected = stage.gradients(aggregate_by_loop)
    for _ in range(2):
        assert_close(torch.autograd.grad(output, stage.inputs, torch.ones_like(output), retain_graph=True), expected)
    # One that does not need the features' gradients leaves nothing for the next.
    (alone,) = torch.autograd.grad(output, stage.weights[-1:], torch.ones_like(output), retain_graph=True)
    torch.testing.assert_close(alone, expected[-1])
    assert_close(torch.autograd.grad(output, stage.inputs, torch.ones_like(output)), expected)


def test_gradients_of_gradients_match_the_twin():
    def second(form):
        stage = Stage(2, 3)
        total = sum((gradient.square().sum() for gradient in stage.gradients(form, create_graph=True)), torch.zeros(()))
        return torch.autograd.grad(total, stage.inputs)

    assert_close(second(aggregate), second(aggregate_by_loop))


def test_many_gradients_at_once_match_the_twin():
    def batched(form):
        stage = Stage(3)
        output = stage.run(form)
        many = Stage(4).draw(7, *output.shape)
        return torch.autograd.grad(output, stage.inputs, many, is_grads_batched=True)

    assert_close(batched(aggregate), batched(aggregate_by_loop))


def test_features_without_gradients_and_a_feature_twice():
    def run(form):
        x = Stage(5).draw(2, 3, 4, 4).requires_grad_()
        weights = Stage(6).draw(2, 4).requires_grad_()
        feature, constant = x.exp(), Stage(7).draw(2, 3, 4, 4)
        first = form([feature, constant, feature, constant], weights)
        second = form([constant, first.sin(), feature, first], weights)
        return torch.autograd.grad(second.square().sum(), [x, weights])

    assert_close(run(aggregate), run(aggregate_by_loop))


def test_what_lies_behind_a_closed_edge_reaches_no_gradient():
    stage = Stage(8, 3)
    stage.opened[2] = torch.tensor([[True, False, True]] * 3)
    features = [stage.x * 1.5]
    features.append(features[0] * torch.inf)
    features.append(features[0] * 2)
    total = aggregate(features, stage.weights[2], stage.opened[2])
    by_x, by_weights = torch.autograd.grad(total.sum(), [stage.x, stage.weights[2]], allow_unused=True)
    assert by_weights.isfinite().all()
    assert (by_weights[:, 1] == 0).all()
    # x · ∞ is read by nobody: its gradient is 0, and 0 · ∞ is that operation's own matter.
    assert total.isfinite().all()
    assert by_x.isnan().all()
