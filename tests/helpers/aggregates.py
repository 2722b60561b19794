"""Cases for tests of `dgnet::aggregate`, and its plain kernels with gradients."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dgnet.graph._aggregate_plain import aggregate_backward_plain, aggregate_plain
from tests.helpers.twins import TOLERANCES

CASES = {
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
