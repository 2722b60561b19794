"""The gradient of a feature, summed at once over all nodes that read it.

By itself autograd would compute w_ij · ∂L/∂x̂_j for each edge, and add these maps one after the other: five maps are read or
written for each edge, and a map for each node is held from the start of a stage's backward pass on. Here the sum that reads a
feature hands over ∂L/∂x̂_j as it is. When all have done so, ∂L/∂x_i = Σ_j w_ij · ∂L/∂x̂_j is one aggregation (Eq. 3) of those
gradients: one map is read for each edge, and one written for each node.

In autograd's graph a feature is connected with the sums by a *token*, a tensor without elements. Letters: B batch, E in-edges
of a node, R readers of a feature, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dgnet.compat.torch import current_backward, is_batched
from dgnet.graph._aggregate_plain import aggregate_by_loop

_COLLECTED = WeakTensorKeyDictionary()  # feature -> _Collected, while a pass holds the feature


class _Reader(NamedTuple):
    """What a sum hands over: ∂L/∂x̂_j, (B, C, H, W), and weight and openness of the edge, (B,)."""

    grad: Tensor
    weight: Tensor
    is_open: Tensor | None


class _Readers:
    """What the readers of a feature have handed over in the backward pass that runs."""

    def __init__(self) -> None:
        self.handed: list[_Reader] = []
        self.backward = -1  # the backward pass that they belong to

    def add(self, reader: _Reader) -> None:
        """Hand over. What a backward pass has left that did not need this feature's gradient is dropped."""
        if self.backward != current_backward():
            self.handed, self.backward = [], current_backward()
        self.handed.append(reader)

    def take(self) -> list[_Reader]:
        """All that was handed over, in the order of the nodes, which is that of the forward pass."""
        handed, self.handed = self.handed, []
        return handed[::-1]


class _Collected(NamedTuple):
    token: Tensor
    readers: _Readers


def can_collect(features: Sequence[Tensor], weights: Tensor) -> bool:
    """Whether `sum_and_collect` takes these: one weight for each edge, and features that are results of others."""
    return weights.ndim == 2 and all(feature.grad_fn is not None or not feature.requires_grad for feature in features)


def sum_and_collect(features: Sequence[Tensor], weights: Tensor, is_open: Tensor | None) -> Tensor:
    """Σ_i w_i · x_i, (B, C, H, W), of E features, with gradients; `weights` and `is_open`: (B, E), `is_open` None: all open."""
    collected = [_collect(feature) if feature.requires_grad else None for feature in features]
    tokens = [found.token for found in collected if found is not None]
    readers = [None if found is None else found.readers for found in collected]
    total: Tensor = _Sum.apply(weights, is_open, readers, *features, *tokens)
    return total


def _collect(feature: Tensor) -> _Collected:
    if feature not in _COLLECTED:
        readers = _Readers()
        _COLLECTED[feature] = _Collected(_Token.apply(feature, readers), readers)
    found: _Collected = _COLLECTED[feature]
    return found


class _Token(torch.autograd.Function):
    """The token of a feature. Its backward pass runs when all readers have handed over their gradients."""

    @staticmethod
    def forward(ctx: Any, feature: Tensor, readers: _Readers) -> Tensor:
        ctx.readers, ctx.dtype = readers, feature.dtype
        return feature.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, None]:
        grads, weights, opened = zip(*ctx.readers.take(), strict=True)
        return sum_of_edges(grads, weights, opened).to(ctx.dtype), None


def sum_of_edges(grads: Sequence[Tensor], weights: Sequence[Tensor], opened: Sequence[Tensor | None]) -> Tensor:
    """Σ_j w_j · g_j, (B, C, H, W). `weights` and `opened`: (B,) for each; None: open for all samples."""
    rows = torch.stack(list(weights), 1)
    is_open = None
    if any(column is not None for column in opened):
        is_open = torch.stack(
            [rows.new_ones(len(rows), dtype=torch.bool) if column is None else column for column in opened], 1
        )
    if any(is_batched(grad) for grad in grads):  # many gradients at once: `is_grads_batched`
        return aggregate_by_loop(grads, rows, is_open)
    total: Tensor = torch.ops.dgnet.aggregate(list(grads), rows, is_open, None)
    return total


class _Sum(torch.autograd.Function):
    """`dgnet::aggregate` of features, of which those that need gradients have readers and, behind all features, a token."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, is_open: Tensor | None, readers: list[_Readers | None], *tensors: Tensor) -> Tensor:
        features = tensors[: len(readers)]
        ctx.readers = readers
        ctx.keeps_features = weights.requires_grad  # only the gradients of the weights depend on them
        ctx.save_for_backward(weights, is_open, *(features if ctx.keeps_features else ()))
        total: Tensor = torch.ops.dgnet.aggregate(list(features), weights, is_open, None)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, is_open, *features = ctx.saved_tensors
        edges = is_open.unbind(1) if is_open is not None else [None] * weights.shape[1]
        for readers, weight, opened in zip(ctx.readers, weights.unbind(1), edges, strict=True):
            if readers is not None:
                readers.add(_Reader(grad, weight, opened))
        tokens = [grad.new_zeros(0) for readers in ctx.readers if readers is not None]
        by_weights = weights_gradient(grad, features, weights, is_open) if ctx.needs_input_grad[0] else None
        return by_weights, None, None, *[None] * len(ctx.readers), *tokens


def weights_gradient(grad: Tensor, features: Sequence[Tensor], weights: Tensor, is_open: Tensor | None) -> Tensor:
    """p_ij of Eqs. (8) to (10) for each in-edge, (B, E): ⟨∂L/∂x̂_j, x_i⟩, 0 where an edge is closed."""
    if is_batched(grad):
        batched: tuple[Tensor] = torch.func.vjp(lambda w: aggregate_by_loop(features, w, is_open), weights)[1](grad)
        return batched[0]
    none = [False] * len(features)
    by_weights: Tensor = torch.ops.dgnet.aggregate_backward(grad, list(features), weights, is_open, True, none)[0]
    return by_weights
