"""Sums and their gradients, of every layout and precision, against slow twins."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dgnet.graph import _aggregate_plain as plain_module
from dgnet.graph import aggregate, aggregate_by_loop, aggregate_rows
from dgnet.graph._aggregate_plain import aggregate_plain
from tests.helpers.aggregates import CASES, sum_plain
from tests.helpers.twins import TOLERANCES, draw_case, sum_by_sample

operator = torch.ops.dgnet.aggregate.default
backward = torch.ops.dgnet.aggregate_backward.default

FORMS = (aggregate, sum_plain, aggregate_by_loop)


@given(**CASES)
def test_values_and_gradients_match_the_twin(seed, shape, edges, dtype, layout, closing, block):
    features, weights, is_open = draw_case(seed, shape, edges, dtype, layout, closing)
    expected = sum_by_sample(features, weights, is_open)
    upstream = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for form in FORMS:
        inputs = [weights.clone().requires_grad_(), *[feature.clone().requires_grad_() for feature in features]]
        with mock.patch.object(plain_module, "_BLOCK_ELEMENTS", block):
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


def test_half_precision_is_summed_in_float32():
    """1 + 256 · 2⁻⁸ in bfloat16 stays 1 when each sum is rounded."""
    features = [torch.ones(1, 1, 2, 2, dtype=torch.bfloat16)] + [torch.full((1, 1, 2, 2), 2.0**-8, dtype=torch.bfloat16)] * 256
    for form in FORMS:
        assert (form(features, torch.ones(1, 257)) == 2).all()


@given(**CASES, row=st.sampled_from([1, 2**20]))
def test_features_that_hold_some_samples_are_read_where_these_lie(seed, shape, edges, dtype, layout, closing, block, row):
    features, _, _ = draw_case(seed, shape, edges, dtype, layout, "none")
    generator = torch.Generator().manual_seed(seed)
    held = [feature[: int(torch.randint(1, len(feature) + 1, (), generator=generator))] for feature in features]
    rows = torch.stack([torch.randint(0, len(feature), (4,), generator=generator) for feature in held])
    _, weights, is_open = draw_case(seed, (4, *shape[1:]), edges, dtype, layout, closing)
    taken = [feature[place].clone() for feature, place in zip(held, rows, strict=True)]
    with mock.patch.object(plain_module, "_BLOCK_ELEMENTS", block), mock.patch.object(plain_module, "_ROW_ELEMENTS", row):
        outputs = [form(held, weights, is_open, rows) for form in (aggregate_rows, aggregate_plain)]
    expected = sum_by_sample(taken, weights, is_open)
    for output in outputs:
        torch.testing.assert_close(output.double(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
        assert output.dtype == dtype


@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(0, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5)),
    edges=st.integers(1, 6),
    dtype=st.sampled_from(list(TOLERANCES)),
    order=st.sampled_from([(0, 1, 2, 3, 4), (0, 3, 4, 1, 2), (0, 3, 1, 2, 4), (3, 0, 1, 2, 4)]),
    closing=st.booleans(),
)
def test_groups_of_weights_in_every_layout(seed, shape, edges, dtype, order, closing):
    """`order`: the axes (B, g, C/g, H, W) as they lie in memory: channels first, last, and others."""
    generator = torch.Generator().manual_seed(seed)
    back = [order.index(axis) for axis in range(5)]

    def draw() -> Tensor:
        return torch.randn([shape[axis] for axis in order], generator=generator).to(dtype).permute(back)

    features, upstream = [draw() for _ in range(edges)], draw()
    weights = torch.rand(shape[0], edges, shape[1], generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    is_open = torch.rand(shape[0], edges, generator=generator) < 0.6 if closing else None
    results = []
    for form in (aggregate, aggregate_by_loop):
        inputs = [weights.clone().requires_grad_(), *[feature.clone().requires_grad_() for feature in features]]
        output = form(inputs[1:], inputs[0], is_open)
        results.append([output, *torch.autograd.grad(output, inputs, upstream)])
    tolerance = TOLERANCES[dtype]
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2 * tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("groups", [None, 3])
def test_maps_of_many_chunks(dtype, layout, groups):
    """Larger than what the kernel sums at once, and no multiple of a vector."""
    features, weights, is_open = draw_case(5, (3, 9, 41, 37), 6, dtype, layout, "some")
    upstream = torch.randn(3, 9, 41, 37).to(dtype)
    if groups:
        weights = torch.rand(3, 6, groups)
        features, upstream = [f.unflatten(1, (groups, -1)) for f in features], upstream.unflatten(1, (groups, -1))
    results = []
    for form, precision in ((aggregate, dtype), (aggregate_by_loop, torch.float64)):
        inputs = [weights.to(precision if precision == torch.float64 else torch.float32).requires_grad_()]
        inputs += [feature.to(precision).requires_grad_() for feature in features]
        output = form(inputs[1:], inputs[0], is_open)
        grads = torch.autograd.grad(output, inputs, upstream.to(precision))
        results.append([one.double() for one in (output, *grads)])
    tolerance = TOLERANCES[dtype]
    for index, (found, expected) in enumerate(zip(*results, strict=True)):
        precision = 1e-4 if index == 1 else tolerance  # the weights' gradients are float32
        torch.testing.assert_close(found, expected, rtol=precision, atol=precision * (10 if index == 1 else 1))


@pytest.mark.parametrize("form", [aggregate, sum_plain])
def test_features_of_several_precisions(form):
    """As under autocast, where layer normalisation returns float32 and a convolution bfloat16."""
    features = [torch.randn(2, 3, 5, 5).to(dtype) for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float64)]
    weights = torch.rand(2, 4)
    inputs = [weights.requires_grad_(), *[feature.requires_grad_() for feature in features]]
    output = form(inputs[1:], weights)
    grads = torch.autograd.grad(output, inputs, torch.ones_like(output))
    assert output.dtype == torch.bfloat16
    assert [grad.dtype for grad in grads[1:]] == [feature.dtype for feature in features]
    expected = sum_by_sample([feature.detach() for feature in features], weights.detach(), None)
    torch.testing.assert_close(output.double(), expected, rtol=8e-3, atol=8e-3)
    torch.testing.assert_close(grads[0], torch.stack([f.detach().float().sum((1, 2, 3)) for f in features], 1))


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_batch(form):
    features = [torch.randn(0, 3, 4, 4, requires_grad=True) for _ in range(2)]
    weights = torch.rand(0, 2, requires_grad=True)
    output = form(features, weights)
    assert output.shape == (0, 3, 4, 4)
    assert [grad.shape for grad in torch.autograd.grad(output.sum(), [weights, *features])] == [(0, 2)] + 2 * [(0, 3, 4, 4)]


def test_views_are_read_where_they_lie():
    """Parts of a batch, one map for all samples, and features in unequal memory formats."""
    whole = torch.randn(6, 3, 4, 5)
    features = [whole[2:4], whole[:1].expand(2, -1, -1, -1), whole[::3].to(memory_format=torch.channels_last)]
    weights = torch.rand(2, 3)
    torch.testing.assert_close(aggregate(features, weights), aggregate_by_loop(features, weights))
    assert aggregate(features[::-1], weights).is_contiguous(memory_format=torch.channels_last)


def test_a_closed_edge_gets_no_gradient_and_gives_none():
    """Even if its feature, its weight and the gradient of the sum are NaN."""
    nan = float("nan")
    features = [torch.full((1, 2, 3, 3), nan, requires_grad=True), torch.ones(1, 2, 3, 3, requires_grad=True)]
    weights = torch.tensor([[nan, 2.0]], requires_grad=True)
    is_open = torch.tensor([[False, True]])
    output = aggregate(features, weights, is_open)
    assert (output == 2).all()
    grads = torch.autograd.grad(output, [weights, *features], torch.full_like(output, nan), retain_graph=True)
    assert grads[0][0, 0] == 0
    assert (grads[1] == 0).all()
    assert torch.equal(torch.autograd.grad(output.sum(), weights)[0], torch.tensor([[0.0, 18.0]]))


def test_two_runs_are_equal_bit_for_bit_on_any_number_of_threads():
    features, weights, is_open = draw_case(2, (5, 16, 33, 31), 7, torch.float32, "channels_last", "some")
    upstream = torch.randn(5, 16, 33, 31)
    runs = []
    try:
        for threads in (1, 1, 3):
            torch.set_num_threads(threads)
            weights_grad, grads = backward(upstream, features, weights, is_open, True, [True] * 7)
            runs.append([operator(features, weights, is_open, None), weights_grad, *grads])
    finally:
        torch.set_num_threads(1)
    for one, two, three in zip(*runs, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
