"""Aggregation under autograd, `torch.compile`, `torch.func` and export."""

from __future__ import annotations

import importlib
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dgnet.graph import aggregate, aggregate_by_loop, compile_options
from tests.helpers.aggregates import sum_plain
from tests.helpers.twins import TOLERANCES, draw_case, sum_by_sample

nodes_module = importlib.import_module("dgnet.graph._nodes")


ON_CPUS = list(product(["contiguous", "channels_last"], [torch.float32, torch.bfloat16], ["none", "some"]))


@pytest.mark.parametrize(
    ("layout", "dtype", "closing"),
    [pytest.param(*case, marks=() if case == ON_CPUS[-1] else pytest.mark.slow) for case in ON_CPUS],
)
def test_the_compiled_form_matches_the_twin(dtype, layout, closing):
    torch._dynamo.reset()
    compiled = torch.compile(aggregate, fullgraph=True)
    features, weights, is_open = draw_case(3, (4, 16, 5, 7), 5, dtype, layout, closing)
    inputs = [weights.requires_grad_(), *[feature.requires_grad_() for feature in features]]
    output = compiled(inputs[1:], inputs[0], is_open)
    tolerance = TOLERANCES[dtype]
    expected = sum_by_sample([f.detach() for f in features], weights.detach(), is_open)
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
    upstream = torch.randn_like(output)
    grads = torch.autograd.grad(output, inputs, upstream)
    expected_grads = torch.autograd.grad(aggregate_by_loop(inputs[1:], inputs[0], is_open), inputs, upstream)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=max(tolerance, 1e-4), atol=max(tolerance, 1e-4))


def test_only_the_features_and_weights_are_kept_for_the_backward_pass():
    features = [torch.randn(2, 3, 4, 4, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    weights = torch.rand(2, 3).requires_grad_()
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        aggregate(features, weights).sum().backward()
    assert sorted(kept) == sorted(tensor.untyped_storage().data_ptr() for tensor in (weights, *features))


def test_features_are_not_kept_if_the_weights_do_not_learn():
    features = [torch.randn(2, 3, 4, 4).requires_grad_() for _ in range(3)]
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    weights = torch.rand(2, 3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = aggregate(features, weights)
    assert [tensor.data_ptr() for tensor in kept] == [weights.data_ptr()]
    grads = torch.autograd.grad(output, features, torch.ones_like(output))
    assert torch.equal(torch.stack(grads, 1), weights[:, :, None, None, None].expand(2, 3, 3, 4, 4))


def test_second_derivatives_and_repeated_backward():
    features = [torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weights = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda w, *f: aggregate(f, w), (weights, *features))
    total = aggregate(features, weights).square().sum()
    first = torch.autograd.grad(total, weights, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(total, weights)[0])
    is_open = torch.tensor([[True, False, True], [False, False, True]])
    for needed in product([True, False], repeat=2):  # of the weights, and of one feature
        inputs = (weights.detach().requires_grad_(needed[0]), features[0].detach().requires_grad_(needed[1]), *features[1:])
        assert torch.autograd.gradgradcheck(lambda w, *f: aggregate(f, w, is_open), inputs)


def test_many_gradients_at_once():
    features = [torch.randn(2, 3, 4, 5, requires_grad=True) for _ in range(3)]
    weights = torch.rand(2, 3, requires_grad=True)
    output, upstream = aggregate(features, weights), torch.randn(4, 2, 3, 4, 5)
    together = torch.autograd.grad(output, [weights, *features], upstream, retain_graph=True, is_grads_batched=True)
    for number in range(4):
        alone = torch.autograd.grad(output, [weights, *features], upstream[number], retain_graph=True)
        for one, two in zip(together, alone, strict=True):
            torch.testing.assert_close(one[number], two)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own use of it, in jvp
def test_checkpoint_and_torch_func():
    features = [torch.randn(2, 2, 3, 3, requires_grad=True) for _ in range(3)]
    weights = torch.rand(2, 3, requires_grad=True)

    def loss(w: Tensor, *f: Tensor) -> Tensor:
        return aggregate(f, w).square().sum()

    expected = torch.autograd.grad(loss(weights, *features), (weights, *features))
    again = torch.autograd.grad(checkpoint(loss, weights, *features, use_reentrant=False), (weights, *features))
    functional = torch.func.grad(loss, argnums=(0, 1, 2, 3))(weights, *features)
    for one, two, three in zip(expected, again, functional, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, three)
    each = torch.func.vmap(lambda w, *f: aggregate([one[None] for one in f], w[None])[0])(weights, *features)
    torch.testing.assert_close(each, aggregate(features, weights))
    tangents = [torch.randn_like(one) for one in (weights, *features)]
    _, tangent = torch.func.jvp(lambda w, *f: aggregate(f, w), (weights, *features), tuple(tangents))
    torch.testing.assert_close(tangent, aggregate(features, tangents[0]) + aggregate(tangents[1:], weights))


def test_export():
    class Sum(torch.nn.Module):
        def forward(self, features: list[Tensor], weights: Tensor) -> Tensor:
            return aggregate(features, weights)

    features, weights, _ = draw_case(0, (3, 2, 4, 4), 3, torch.float32, "contiguous", "none")
    exported = torch.export.export(Sum(), (features, weights)).module()
    torch.testing.assert_close(exported(features, weights), aggregate(features, weights))


@pytest.mark.slow
def test_twenty_steps_agree_in_every_form(tiny, monkeypatch):
    """The operator, the plain kernels, the loop, and compiled, in float64 from one seed."""
    losses = {}
    for form in ("eager", "plain", "loop", "compiled"):
        torch.manual_seed(0)
        torch._dynamo.reset()
        network = tiny(layers=(2, 2, 2)).double()
        images, labels = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.randint(5, (6,))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
        options = compile_options(network)
        run = torch.compile(network, fullgraph=True, options=options) if form == "compiled" else network
        with monkeypatch.context() as patch:
            if form in ("loop", "plain"):
                replaced = {"loop": aggregate_by_loop, "plain": sum_plain}[form]
                patch.setattr(nodes_module, "aggregate", lambda *sums, is_open, sharing, run=replaced: run(*sums, is_open))
            losses[form] = []
            for _ in range(20):
                loss = torch.nn.functional.cross_entropy(run(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[form].append(loss.item())
        losses[form] += [parameter.detach() for parameter in network.parameters()]
    for form in ("plain", "loop", "compiled"):
        for one, two in zip(losses["eager"], losses[form], strict=True):
            torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(two), rtol=1e-8, atol=1e-8)
    assert losses["eager"][19] < 0.7 * losses["eager"][0]
