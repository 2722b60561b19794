from __future__ import annotations

import importlib
from itertools import product
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dgnet.graph import aggregate
from dgnet.graph._aggregate import aggregate_by_loop
from tests.helpers.twins import TOLERANCES, draw_case, sum_by_sample

module = importlib.import_module("dgnet.graph._aggregate")
nodes_module = importlib.import_module("dgnet.graph._nodes")

cases = {
    "seed": st.integers(0, 2**31),
    "shape": st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5)),
    "edges": st.integers(1, 9),
    "dtype": st.sampled_from(list(TOLERANCES)),
    "layout": st.sampled_from(["contiguous", "channels_last", "strided"]),
    "closing": st.sampled_from(["none", "some", "all", "no edge"]),
    "block": st.sampled_from([1, 64, 2**20]),  # one sample at a time, a few, all
}


@given(**cases)
def test_values_and_gradients_match_the_twin(seed, shape, edges, dtype, layout, closing, block):
    features, weights, is_open = draw_case(seed, shape, edges, dtype, layout, closing)
    expected = sum_by_sample(features, weights, is_open)
    upstream = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for form in (aggregate, aggregate_by_loop):
        inputs = [weights.clone().requires_grad_(), *[feature.clone().requires_grad_() for feature in features]]
        with mock.patch.object(module, "_BLOCK_ELEMENTS", block):
            output = form(inputs[1:], inputs[0], is_open)
            with torch.no_grad():
                assert torch.equal(output, form(inputs[1:], inputs[0], is_open))
        assert output.dtype == dtype
        tolerance = TOLERANCES[dtype]
        torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
        output.backward(upstream.to(dtype))
        grad = upstream.to(dtype).double()
        for e, feature in enumerate(features):
            for b in range(len(weights)):
                opened = is_open is None or bool(is_open[b, e])
                by_feature = grad[b] * weights[b, e].double() if opened else torch.zeros_like(grad[b])
                by_weight = (grad[b] * feature[b].double()).sum() if opened else torch.zeros(()).double()
                torch.testing.assert_close(inputs[1 + e].grad[b].double(), by_feature, rtol=tolerance, atol=tolerance)
                precision = min(tolerance, 1e-4)  # summed in float32 at least
                torch.testing.assert_close(inputs[0].grad[b, e].double(), by_weight, rtol=precision, atol=precision)


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


def test_half_precision_is_summed_in_float32():
    """1 + 256 · 2⁻⁸ in bfloat16 stays 1 when each sum is rounded."""
    features = [torch.ones(1, 1, 2, 2, dtype=torch.bfloat16)] + [torch.full((1, 1, 2, 2), 2.0**-8, dtype=torch.bfloat16)] * 256
    for form in (aggregate, aggregate_by_loop):
        assert (form(features, torch.ones(1, 257)) == 2).all()


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


def test_second_derivatives_and_repeated_backward():
    features = [torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weights = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda w, *f: aggregate(f, w), (weights, *features))
    total = aggregate(features, weights).square().sum()
    first = torch.autograd.grad(total, weights, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(total, weights)[0])


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
    """Eager, the loop, and compiled, in float64 from one seed."""
    losses = {}
    for form in ("eager", "loop", "compiled"):
        torch.manual_seed(0)
        torch._dynamo.reset()
        network = tiny(layers=(2, 2, 2)).double()
        images, labels = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.randint(5, (6,))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
        run = torch.compile(network, fullgraph=True) if form == "compiled" else network
        with monkeypatch.context() as patch:
            if form == "loop":
                patch.setattr(nodes_module, "aggregate", aggregate_by_loop)
            losses[form] = []
            for _ in range(20):
                loss = torch.nn.functional.cross_entropy(run(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[form].append(loss.item())
        losses[form] += [parameter.detach() for parameter in network.parameters()]
    for form in ("loop", "compiled"):
        for one, two in zip(losses["eager"], losses[form], strict=True):
            torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(two), rtol=1e-8, atol=1e-8)
    assert losses["eager"][19] < 0.7 * losses["eager"][0]


@given(**cases, row=st.sampled_from([1, 2**20]))
def test_features_that_hold_some_samples_are_read_where_these_lie(seed, shape, edges, dtype, layout, closing, block, row):
    features, _, _ = draw_case(seed, shape, edges, dtype, layout, "none")
    generator = torch.Generator().manual_seed(seed)
    held = [feature[: int(torch.randint(1, len(feature) + 1, (), generator=generator))] for feature in features]
    rows = torch.stack([torch.randint(0, len(feature), (4,), generator=generator) for feature in held])
    _, weights, is_open = draw_case(seed, (4, *shape[1:]), edges, dtype, layout, closing)
    taken = [feature[place].clone() for feature, place in zip(held, rows, strict=True)]
    with mock.patch.object(module, "_BLOCK_ELEMENTS", block), mock.patch.object(module, "_ROW_ELEMENTS", row):
        output = module.aggregate_rows(held, weights, is_open, rows)
    expected = sum_by_sample(taken, weights, is_open)
    torch.testing.assert_close(output.double(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    assert output.dtype == dtype
