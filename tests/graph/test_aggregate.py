from __future__ import annotations

import importlib
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dgnet.graph import _aggregate_plain as plain_module
from dgnet.graph import aggregate, aggregate_by_loop, aggregate_rows, compile_options
from dgnet.graph._aggregate_form import find_aggregation
from dgnet.graph._aggregate_plain import aggregate_backward_plain, aggregate_plain, weight_gradients_plain
from tests.helpers.twins import TOLERANCES, draw_case, sum_by_sample

nodes_module = importlib.import_module("dgnet.graph._nodes")
operator = torch.ops.dgnet.aggregate.default
backward = torch.ops.dgnet.aggregate_backward.default

cases = {
    "seed": st.integers(0, 2**31),
    "shape": st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5)),
    "edges": st.integers(1, 9),
    "dtype": st.sampled_from(list(TOLERANCES)),
    "layout": st.sampled_from(["contiguous", "channels_last", "strided"]),
    "closing": st.sampled_from(["none", "some", "all", "no edge"]),
    "block": st.sampled_from([1, 64, 2**20]),  # one sample at a time, a few, all
}


class _Plain(torch.autograd.Function):
    """`dgnet::aggregate` with the plain kernels, which run where there is no C++ compiler."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, is_open: Tensor | None, *features: Tensor) -> Tensor:
        ctx.save_for_backward(weights, is_open, *features)
        return aggregate_plain(features, weights, is_open)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weights, is_open, *features = ctx.saved_tensors
        needed = ctx.needs_input_grad
        weights_grad, grads = aggregate_backward_plain(grad, features, weights, is_open, needed[0], [True] * len(features))
        return weights_grad if needed[0] else None, None, *grads


def sum_plain(features: list[Tensor], weights: Tensor, is_open: Tensor | None = None) -> Tensor:
    return _Plain.apply(weights, is_open, *features)


FORMS = (aggregate, sum_plain, aggregate_by_loop)


@given(
    seed=st.integers(0, 2**31),
    shape=st.one_of(
        st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(0, 9), st.integers(1, 12)),
        st.sampled_from([(2, 24, 15, 13), (1, 1025, 2, 3), (2, 3, 41, 40), (1, 600, 7, 7)]),  # of several chunks
    ),
    dtype=cases["dtype"],
    others=st.sampled_from([None, torch.bfloat16, torch.float32]),
    layout=cases["layout"],
    closing=cases["closing"],
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


@given(**cases)
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
    for form in FORMS:
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
    is_open = torch.tensor([[True, False, True], [False, False, True]])
    for needed in product([True, False], repeat=2):  # of the weights, and of one feature
        inputs = (weights.detach().requires_grad_(needed[0]), features[0].detach().requires_grad_(needed[1]), *features[1:])
        assert torch.autograd.gradgradcheck(lambda w, *f: aggregate(f, w, is_open), inputs)


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


@given(**cases, row=st.sampled_from([1, 2**20]))
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


def test_many_gradients_at_once():
    features = [torch.randn(2, 3, 4, 5, requires_grad=True) for _ in range(3)]
    weights = torch.rand(2, 3, requires_grad=True)
    output, upstream = aggregate(features, weights), torch.randn(4, 2, 3, 4, 5)
    together = torch.autograd.grad(output, [weights, *features], upstream, retain_graph=True, is_grads_batched=True)
    for number in range(4):
        alone = torch.autograd.grad(output, [weights, *features], upstream[number], retain_graph=True)
        for one, two in zip(together, alone, strict=True):
            torch.testing.assert_close(one[number], two)
