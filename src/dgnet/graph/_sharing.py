"""Features that several sums read, in the backward pass: one gradient map for each node, and no copy of normalised features.

**Gradients.** By itself autograd would compute w_ij · ∂L/∂x̂_j for each edge, and add these maps one after the other. Here each
sum that reads a feature stores ∂L/∂x̂_j as it is. When all of them have done so, ∂L/∂x_i = Σ_j w_ij · ∂L/∂x̂_j is one aggregation
of those gradients (Eq. 3): one map is read for each edge, and one written for each node.

**Features.** The gradients of the weights need x_i. If x_i is the output of a batch normalisation, γ(z − μ)/σ + β, it is not
kept: the normalisation keeps z anyway, and the gradients of the weights are computed from it (`dgnet::weight_gradients`).

Letters: B batch, E in-edges of a node, R sums that read a feature, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgnet.compat.torch import BatchNorm, current_backward, find_batch_norm, is_batched, will_run
from dgnet.graph._aggregate_plain import aggregate_by_loop
from dgnet.graph._gating import stack_alive


class Sharing:
    """The features of one forward pass of a stage. It belongs to the walk, and goes with it."""

    def __init__(self) -> None:
        self._known: dict[int, _Shared] = {}

    def sum(self, features: Sequence[Tensor], weights: Tensor, is_open: Tensor | None) -> Tensor:
        """Σ_i w_i · x_i, (B, C, H, W), of E features, with gradients. `weights` and `is_open`: (B, E); None: all open."""
        shared = [self._share(feature) if feature.requires_grad else None for feature in features]
        kept = [
            None if one is not None and one.is_normalised else feature for feature, one in zip(features, shared, strict=True)
        ]
        tokens = [None if one is None else one.token for one in shared]
        total: Tensor = _Sum.apply(tuple(features), tuple(kept), is_open, weights, *tokens)
        return total

    def _share(self, feature: Tensor) -> _Shared:
        shared = self._known.get(id(feature))
        if shared is None or shared.is_stale:
            norm = find_batch_norm(feature)
            token = _Token.apply(feature, *(norm or ()))
            shared = self._known[id(feature)] = _Shared(feature, feature.grad_fn, feature._version, token, norm is not None)
        return shared


class _Shared(NamedTuple):
    """A feature and its token. The feature is held so that its identity stays its own."""

    feature: Tensor
    grad_fn: Any
    version: int
    token: Tensor
    is_normalised: bool

    @property
    def is_stale(self) -> bool:
        """Whether an operation has changed the feature in place since."""
        return self.feature.grad_fn is not self.grad_fn or self.feature._version != self.version


class _EdgeGradient(NamedTuple):
    """What a sum stores for a feature: ∂L/∂x̂_j, (B, C, H, W), and weight and openness of the edge, (B,)."""

    grad: Tensor
    weight: Tensor
    is_open: Tensor | None


class _Token(torch.autograd.Function):
    """An empty tensor that stands for a feature among the inputs of sums.

    Autograd runs its backward pass when those of all sums that read the feature have run. Its node in autograd's graph holds
    what the sums store, for each backward pass, and what a normalised feature is computed from (`BatchNorm`).
    """

    @staticmethod
    def forward(ctx: Any, feature: Tensor, *norm: Tensor) -> Tensor:
        ctx.dtype = feature.dtype
        ctx.passes = {}  # number of the backward pass -> list of _EdgeGradient
        ctx.save_for_backward(*norm)
        return feature.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        stored = ctx.passes.pop(current_backward(), [])
        others = [None] * (len(ctx.needs_input_grad) - 1)
        if not stored:
            return None, *others
        grads, weights, opened = zip(*reversed(stored), strict=True)
        # In the precision of the feature, which a sum of features of several precisions need not have.
        return _sum_edges([grad.to(ctx.dtype) for grad in grads], weights, opened), *others


def _store(token: Tensor, gradient: _EdgeGradient) -> None:
    """Store a gradient in the backward pass that runs, for the feature of a token."""
    node: Any = token.grad_fn
    if will_run(node):  # a pass that does not run the token would never take out what it has stored
        node.passes.setdefault(current_backward(), []).append(gradient)


def _normalisation(token: Tensor) -> BatchNorm:
    """What the feature of a token is computed from, if it is not kept."""
    node: Any = token.grad_fn
    return BatchNorm(*node.saved_tensors)


class _Normalise(torch.autograd.Function):
    """A feature that is not kept, (B, C, H, W), from its token, with gradients: for gradients of gradients."""

    @staticmethod
    def forward(ctx: Any, token: Tensor) -> Tensor:
        ctx.save_for_backward(token)
        norm, dtype = _normalisation(token), token.dtype
        scale, shift = (values.view(-1, *[1] * (norm.input.ndim - 2)) for values in (norm.scale, norm.shift))
        return torch.addcmul(shift, norm.input, scale).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (token,) = ctx.saved_tensors
        _store(token, _EdgeGradient(grad, grad.new_ones(len(grad)), None))
        return grad.new_zeros(0)


class _Sum(torch.autograd.Function):
    """`dgnet::aggregate` of features that have tokens.

    `features` and `kept` are tuples, so that autograd does not take them for inputs: the tokens are inputs in their place.
    `kept`: None for normalised features; `tokens`: None for features without gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: tuple[Tensor, ...],
        kept: tuple[Tensor | None, ...],
        is_open: Tensor | None,
        weights: Tensor,
        *tokens: Tensor | None,
    ) -> Tensor:
        # Only the gradients of the weights depend on the features.
        kept = kept if weights.requires_grad else (None,) * len(kept)
        ctx.save_for_backward(weights, is_open, *kept, *tokens)
        total: Tensor = torch.ops.dgnet.aggregate(list(features), weights, is_open, None)
        ctx.stride = total.stride()
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, is_open, *saved = ctx.saved_tensors
        kept, tokens = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        if not is_batched(grad) and grad.stride() != ctx.stride:  # such as an expanded one: the sums would have its layout
            grad = torch.empty_strided(grad.shape, ctx.stride, dtype=grad.dtype, device=grad.device).copy_(grad)
        by_weights = _weight_gradients(grad, kept, tokens, weights, is_open) if ctx.needs_input_grad[3] else None
        edges = is_open.unbind(1) if is_open is not None else [None] * len(tokens)
        for token, weight, opened in zip(tokens, weights.unbind(1), edges, strict=True):
            if token is not None:
                _store(token, _EdgeGradient(grad, weight, opened))
        empty = [None if token is None else grad.new_zeros(0) for token in tokens]
        return None, None, None, by_weights, *empty


def _sum_edges(grads: Sequence[Tensor], weights: Sequence[Tensor], opened: Sequence[Tensor | None]) -> Tensor:
    """Σ_j w_j · g_j, (B, C, H, W), of R gradients. `weights` and `opened`: (B,) for each; None: open for all samples."""
    rows, is_open = torch.stack(list(weights), 1), stack_alive(opened)
    if any(is_batched(grad) for grad in grads):  # many gradients at once: `is_grads_batched`
        return aggregate_by_loop(grads, rows, is_open)
    total: Tensor = torch.ops.dgnet.aggregate(list(grads), rows, is_open, None)
    return total


def _weight_gradients(
    grad: Tensor, kept: Sequence[Any], tokens: Sequence[Any], weights: Tensor, is_open: Tensor | None
) -> Tensor:
    """p_ij of Eqs. (8) to (10) for each in-edge, (B, E): ⟨∂L/∂x̂_j, x_i⟩, 0 where an edge is closed.

    `kept`, `tokens`: as in `_Sum`; a feature that is not kept has a token.
    """
    if is_batched(grad) or torch.is_grad_enabled():
        kept = [one if one is not None else _Normalise.apply(token) for one, token in zip(kept, tokens, strict=True)]
    if is_batched(grad):
        batched: tuple[Tensor] = torch.func.vjp(lambda w: aggregate_by_loop(kept, w, is_open), weights)[1](grad)
        return batched[0]
    if all(one is not None for one in kept):
        none = [False] * len(kept)
        by_weights: Tensor = torch.ops.dgnet.aggregate_backward(grad, kept, weights, is_open, True, none)[0]
        return by_weights
    norms: list[tuple[Tensor, Tensor | None, Tensor | None]] = [
        (one, None, None) if one is not None else _normalisation(token) for one, token in zip(kept, tokens, strict=True)
    ]
    read, scales, shifts = zip(*norms, strict=True)
    normalised: Tensor = torch.ops.dgnet.weight_gradients(grad, list(read), list(scales), list(shifts), weights, is_open)
    return normalised
