"""`dgnet::aggregate` as an operator of PyTorch: how it is registered, compiled and exported, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dgnet.graph import _aggregate_form as forms
from dgnet.graph import aggregate_rows
from tests.helpers.twins import draw_case

operator = torch.ops.dgnet.aggregate.default
backward = torch.ops.dgnet.aggregate_backward.default


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("closing", ["none", "some"])
def test_the_operator_is_registered_as_torch_wants_it(layout, closing):
    features, weights, is_open = draw_case(1, (3, 4, 5, 6), 3, torch.float32, layout, closing)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    inputs = ([feature.requires_grad_() for feature in features], weights.requires_grad_(), is_open, None)
    torch.library.opcheck(operator, inputs, test_utils=tests)
    detached = [feature.detach() for feature in features]
    rows = torch.tensor([[0, 0, 1], [2, 1, 0], [1, 1, 1]])
    torch.library.opcheck(operator, (detached, weights.detach(), is_open, rows), test_utils=tests)
    for needed in ((True, [True, True, True]), (True, [False, True, False]), (False, [True, False, True])):
        arguments = (torch.randn(3, 4, 5, 6, requires_grad=True), inputs[0], weights, is_open, *needed)
        torch.library.opcheck(backward, arguments, test_utils=tests)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own use of it, in opcheck
def test_the_operator_itself_is_compiled_and_exported_without_graph_breaks():
    features, weights, is_open = draw_case(1, (3, 4, 5, 6), 3, torch.float32, "channels_last", "some")
    inputs = ([feature.requires_grad_() for feature in features], weights.requires_grad_(), is_open, None)
    torch.library.opcheck(operator, inputs)  # all tests: also with symbolic shapes

    class Sum(torch.nn.Module):
        def forward(self, features: list[Tensor], weights: Tensor) -> Tensor:
            return operator([feature.relu() for feature in features], weights, None, None)

    arguments = ([torch.randn(3, 4, 5, 6, requires_grad=True) for _ in range(3)], weights)
    exported = torch.export.export(Sum(), arguments)
    assert "dgnet.aggregate" in exported.graph_module.code
    torch.testing.assert_close(exported.module()(*arguments), Sum()(*arguments))
    compiled = torch.compile(Sum(), fullgraph=True)
    sources = [weights, *arguments[0]]
    grads = [torch.autograd.grad(form(*arguments).square().sum(), sources) for form in (compiled, Sum())]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": [torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 5)]}, "must have one shape"),
        ({"features": [torch.ones(3, 3, 4, 4), torch.ones(3, 3, 4, 4)]}, "must have one shape, with 2 samples"),
        ({"weights": torch.ones(2, 3)}, "2 features need weights of 2 edges"),
        ({"weights": torch.ones(2, 2, 2)}, r"of 2 groups need features \(B, 2"),
        ({"weights": torch.ones(2)}, r"weights must be \(B, E\)"),
        ({"is_open": torch.ones(2, 2)}, "is_open must be bool"),
        ({"rows": torch.full((2, 2), 5)}, "a feature of 2 samples has no row 5"),
        ({"features": [torch.ones(2, 3, 4, 4, dtype=torch.int32)] * 2}, "16, 32 or 64 bits"),
    ],
)
def test_inputs_that_do_not_fit_together(change, message):
    if forms.find_aggregation("cpu").name != "native":
        pytest.skip("there is no C++ compiler here")
    inputs = {"features": [torch.ones(2, 3, 4, 4)] * 2, "weights": torch.ones(2, 2), "is_open": None, "rows": None} | change
    with pytest.raises((RuntimeError, IndexError), match=message):
        operator(*inputs.values())


def test_gathered_rows_have_no_gradients():
    features = [torch.randn(2, 3, requires_grad=True)]
    rows = torch.tensor([[1, 0]])
    with pytest.raises(NotImplementedError, match="no gradients if it gathers rows"):
        operator(features, torch.ones(2, 1), None, rows)
    assert torch.equal(aggregate_rows(features, torch.ones(2, 1), rows=rows), features[0][[1, 0]])
