"""`dgnet::weight_gradients`: gradients of weights from features that are not in memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dgnet.graph._aggregate_form import find_aggregation
from dgnet.graph._aggregate_plain import weight_gradients_plain
from tests.helpers.aggregates import CASES
from tests.helpers.twins import draw_case

backward = torch.ops.dgnet.aggregate_backward.default


@given(
    seed=st.integers(0, 2**31),
    shape=st.one_of(
        st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(0, 9), st.integers(1, 12)),
        st.sampled_from([(2, 24, 15, 13), (1, 1025, 2, 3), (2, 3, 41, 40), (1, 600, 7, 7)]),  # of several chunks
    ),
    dtype=CASES["dtype"],
    others=st.sampled_from([None, torch.bfloat16, torch.float32]),
    layout=CASES["layout"],
    closing=CASES["closing"],
    normalised=st.lists(st.booleans(), min_size=1, max_size=5),
)
def test_gradients_of_weights_without_the_features_they_need(seed, shape, dtype, others, layout, closing, normalised):
    """Features scale · z + shift that are not in memory; the twin computes them. `others`: precision of all but the first."""
    find_aggregation("cpu")
    sources, weights, is_open = draw_case(seed, shape, len(normalised), dtype, layout, closing)
    if others is not None and dtype != torch.float64:
        sources[1:] = [source.to(others) for source in sources[1:]]
    generator = torch.Generator().manual_seed(seed)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    grad = torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
    if seed % 3 == 0:
        grad = grad[:1, :, :1].expand(shape) if shape[0] and shape[2] else grad
    numbers = [torch.randn(2, shape[1], dtype=torch.float64, generator=generator).to(exact) for _ in sources]
    scales, shifts = ([one[row] if some else None for one, some in zip(numbers, normalised, strict=True)] for row in (0, 1))
    expected = torch.zeros(len(weights), len(sources), dtype=torch.float64)
    for edge, (source, some) in enumerate(zip(sources, normalised, strict=True)):
        scale, shift = numbers[edge].double().view(2, -1, 1, 1) if some else (1, 0)
        expected[:, edge] = (grad.double() * (scale * source.double() + shift)).sum((1, 2, 3))
    if is_open is not None:
        expected[~is_open] = 0
    tolerance = 1e-10 if dtype == torch.float64 else 2e-3
    for form in (torch.ops.dgnet.weight_gradients, weight_gradients_plain):
        found = form(grad, sources, scales, shifts, weights, is_open)
        assert found.dtype == weights.dtype
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("other", [torch.float64, torch.float32, torch.float16, torch.int64])
def test_a_gradient_of_another_precision(dtype, other):
    find_aggregation("cpu")
    features, weights, grad = [torch.ones(1, 3, 4, 4, dtype=dtype)] * 2, torch.ones(1, 2), torch.ones(1, 3, 4, 4, dtype=other)
    ones = [torch.ones(3), None]
    for found in (
        torch.ops.dgnet.weight_gradients(grad, features, ones, ones, weights, None),
        backward(grad, features, weights, None, True, [False, False])[0] + torch.tensor([[48, 0]]),
    ):
        assert found.tolist() == [[96, 48]]


def test_what_scales_and_shifts_must_be():
    if find_aggregation("cpu").name != "native":
        pytest.skip("there is no C++ compiler here")
    ones, weights = [torch.ones(2, 3, 4, 4)] * 2, torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="features of 3 channels need as many scales and shifts"):
        torch.ops.dgnet.weight_gradients(ones[0], ones, [torch.ones(4), None], [torch.ones(4), None], weights, None)
    with pytest.raises(RuntimeError, match="scales and shifts for 2 features"):
        torch.ops.dgnet.weight_gradients(ones[0], ones, [None], [None], weights, None)
