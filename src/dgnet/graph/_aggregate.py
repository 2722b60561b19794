"""A node's input x̂_j = Σ_i α_ij x_i (Eq. 3), and its gradients, which are factors of Eqs. (7) to (10).

The backward pass computes for each sample p_ij = ∂L/∂w_ij = ⟨∂L/∂x̂_j, x_i⟩, summed over C, H and W. Eqs. (8) (router weights),
(9) (router biases) and (10) (thresholds) share this factor; their other factors are the gradients of `psi` in _gating.py and
of the router in _router.py. It also computes w_ij · ∂L/∂x̂_j, the gradient that reaches the nodes' own weights (Eq. 7).

The sum is an operator, `dgnet::aggregate`; `dgnet::partial_sums` makes several at once. Their kernels: aggregate.cpp on a CPU,
_aggregate_triton.py on a CUDA device if the user wants it, and _aggregate_plain.py elsewhere; _aggregate_form.py chooses.

Letters: B batch, E in-edges of a node, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dgnet.compat.torch import is_batched, is_transformed
from dgnet.graph._aggregate_form import prepare
from dgnet.graph._aggregate_plain import (
    aggregate_backward_plain,
    aggregate_by_loop,
    aggregate_plain,
    empty_sum,
    partial_sums_plain,
    weight_gradients_plain,
)
from dgnet.graph._sharing import Sharing


def aggregate(
    features: Sequence[Tensor], weights: Tensor, is_open: Tensor | None = None, sharing: Sharing | None = None
) -> Tensor:
    """Sum a node's incoming features, each sample with its own edge weights (Eq. 3).

    `features`: one tensor for each in-edge, E of them, (B, C, H, W) or of another layout with B first; `weights`: (B, E), or
    (B, E, g) for features of (B, g, …); `is_open`: (B, E), None for all open. The feature of a closed edge never enters the
    sum, even if it is infinite or NaN. `sharing`: that of the forward pass, if other sums read the same features.

    Sums in float32 if features are in half precision, otherwise in their own precision. Returns a tensor like a feature.
    """
    if not _runs_operator(features[0]):
        return aggregate_by_loop(features, weights, is_open)
    learns = torch.is_grad_enabled() and (weights.requires_grad or any(feature.requires_grad for feature in features))
    prepare(features[0].device.type, learns)
    if learns and sharing is not None and weights.ndim == 2:
        return sharing.sum(features, weights, is_open)
    total: Tensor = torch.ops.dgnet.aggregate(list(features), weights, is_open, None)
    return total


@torch.no_grad()
def aggregate_rows(
    features: Sequence[Tensor], weights: Tensor, is_open: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    """`aggregate` without gradients, of features that may hold only some of the samples.

    `rows`: (E, B), the row of each sample in each feature, (B_e, C, H, W); any row of it if the edge is closed. None: the
    features hold all samples in order. On the CPU, large maps of closed edges are not read.
    """
    prepare(features[0].device.type, False)
    total: Tensor = torch.ops.dgnet.aggregate(list(features), weights, is_open, rows)
    return total


@torch.no_grad()
def partial_sums(features: Sequence[Tensor], weights: Tensor, is_open: Tensor | None = None) -> list[Tensor]:
    """Several sums of the same features, without gradients, in the memory of the features: the first R of them are lost.

    `features`: E tensors of one shape and dtype, (B, C, H, W) or of another layout with B first, none a view of another;
    `weights`: (B, R, E) with R ≤ E; `is_open`: (B, R, E), None for all open. Returns the R sums, each like a feature.
    """
    torch.ops.dgnet.partial_sums(list(features), weights, is_open)
    return list(features[: weights.shape[1]])


def _runs_operator(feature: Tensor) -> bool:
    """Whether the operator runs for `feature`, and not the loop."""
    # The compiler fuses the loop into one pass. The operator has no rules for transforms, nor for tensors of other classes.
    return not (
        torch.compiler.is_compiling()
        or type(feature) not in (Tensor, nn.Parameter)
        or not feature.is_floating_point()
        or is_transformed(feature)
    )


# The operator: what it takes and returns, its shapes, and its derivatives of every order. `aggregate_backward` computes for
# each edge ⟨grad, x_i⟩, summed over C, H and W (or over each group), and w_i · grad. `weight_gradients` computes the former
# alone, of features that may be given as scale · feature + shift, with a number for each channel; it has no derivatives.

_LIBRARY = torch.library.Library("dgnet", "FRAGMENT")  # kept: the operators go with it
_LIBRARY.define("aggregate(Tensor[] features, Tensor weights, Tensor? is_open, Tensor? rows) -> Tensor")
_LIBRARY.define(
    "aggregate_backward(Tensor grad, Tensor[] features, Tensor weights, Tensor? is_open, bool needs_weights,"
    " bool[] needs_features) -> (Tensor, Tensor[])"
)
_LIBRARY.define(
    "weight_gradients(Tensor grad, Tensor[] features, Tensor?[] scales, Tensor?[] shifts, Tensor weights, Tensor? is_open)"
    " -> Tensor"
)
_LIBRARY.define("partial_sums(Tensor(a!)[] features, Tensor weights, Tensor? is_open) -> ()")
# Kernels for all devices; those for one device come before them.
_LIBRARY.impl("aggregate", aggregate_plain, "CompositeExplicitAutograd")
_LIBRARY.impl("aggregate_backward", aggregate_backward_plain, "CompositeExplicitAutograd")
_LIBRARY.impl("weight_gradients", weight_gradients_plain, "CompositeExplicitAutograd")
_LIBRARY.impl("partial_sums", partial_sums_plain, "CompositeExplicitAutograd")


def _fake(features: list[Tensor], weights: Tensor, is_open: Tensor | None, rows: Tensor | None) -> Tensor:
    if any(feature.shape[1:] != features[0].shape[1:] for feature in features):
        shapes = [tuple(feature.shape) for feature in features]
        raise RuntimeError(f"dgnet::aggregate: the features of one sum must have one shape, got {shapes}")
    return empty_sum(features[0], weights.shape[0])


def _fake_backward(
    grad: Tensor,
    features: list[Tensor],
    weights: Tensor,
    is_open: Tensor | None,
    needs_weights: bool,
    needs_features: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    grads = [
        empty_sum(features[0], weights.shape[0], feature.dtype)
        for feature, needed in zip(features, needs_features, strict=True)
        if needed
    ]
    return weights.new_empty(weights.shape if needs_weights else 0), grads


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, weights, is_open, rows = inputs
    if rows is not None:
        raise NotImplementedError("dgnet::aggregate has no gradients if it gathers rows: call it under torch.no_grad()")
    ctx.dtypes = [feature.dtype for feature in features]
    ctx.keeps_features = weights.requires_grad  # only the gradients of the weights depend on them
    ctx.save_for_backward(weights, is_open, *(features if ctx.keeps_features else ()))


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The gradients of the weights, p_ij of Eqs. (8) to (10), and of the features, w_ij · ∂L/∂x̂_j (Eq. 7)."""
    weights, is_open, *features = ctx.saved_tensors
    needs_features, needs_weights = ctx.needs_input_grad[:2]
    features = features or _stand_in(grad, ctx.dtypes)
    if is_batched(grad):  # many gradients at once: `is_grads_batched`
        pull_back = torch.func.vjp(lambda w, *x: aggregate_by_loop(x, w, is_open), weights, *features)[1]
        weights_grad, *features_grads = pull_back(grad)
        return features_grads, weights_grad if needs_weights else None, None, None
    weights_grad, grads = torch.ops.dgnet.aggregate_backward(
        grad, features, weights, is_open, needs_weights, list(needs_features)
    )
    return _at(grads, needs_features), weights_grad if needs_weights else None, None, None


def _set_up_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, features, weights, is_open, ctx.needs_weights, ctx.needed = inputs
    ctx.dtypes = [feature.dtype for feature in features]
    ctx.save_for_backward(grad, weights, is_open, *(features if ctx.needs_weights else ()))


def _differentiate_backward(ctx: Any, weights_up: Tensor, ups: list[Tensor]) -> tuple[Any, ...]:
    """The derivatives of ⟨grad, x_i⟩ and w_i · grad: both are products, so they are sums and products of the same kind.

    `weights_up`: the gradient of the first, (B, E); `ups`: of the second, for each feature that was `needed`.
    """
    grad, weights, is_open, *features = ctx.saved_tensors
    chosen = [edge for edge, needed in enumerate(ctx.needed) if needed]
    opened = None if is_open is None else is_open[:, chosen]
    grad_up: Any = None
    features_up: list[Tensor | None] = [None] * len(ctx.needed)
    weights_again: Tensor | None = None
    if chosen:
        grad_up = torch.ops.dgnet.aggregate(ups, weights[:, chosen], opened, None).to(grad.dtype)
        none = [False] * len(chosen)
        columns, _ = torch.ops.dgnet.aggregate_backward(grad, ups, weights[:, chosen], opened, True, none)
        weights_again = torch.zeros_like(weights).index_add(1, torch.tensor(chosen, device=weights.device), columns)
    if ctx.needs_weights:
        by_weights = torch.ops.dgnet.aggregate(features, weights_up, is_open, None).to(grad.dtype)
        grad_up = by_weights if grad_up is None else grad_up + by_weights
        every = [True] * len(features)
        _, found = torch.ops.dgnet.aggregate_backward(grad, _stand_in(grad, ctx.dtypes), weights_up, is_open, False, every)
        features_up = list(found)
    return grad_up, features_up, weights_again, None, None, None


def _stand_in(grad: Tensor, dtypes: list[torch.dtype]) -> list[Tensor]:
    """Tensors in the place of features whose values are not read, only their shape and dtype."""
    return [grad if dtype == grad.dtype else torch.empty_like(grad, dtype=dtype) for dtype in dtypes]


def _at(values: list[Tensor], places: Sequence[bool]) -> list[Tensor | None]:
    """`values` at the true places, None at the others."""
    left = iter(values)
    return [next(left) if place else None for place in places]


torch.library.register_fake("dgnet::aggregate", _fake, lib=_LIBRARY)
torch.library.register_fake(
    "dgnet::weight_gradients",
    lambda grad, features, scales, shifts, weights, is_open: weights.new_empty(weights.shape),
    lib=_LIBRARY,
)
torch.library.register_fake("dgnet::partial_sums", lambda features, weights, is_open: None, lib=_LIBRARY)
torch.library.register_fake("dgnet::aggregate_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd("dgnet::aggregate", _differentiate, setup_context=_set_up, lib=_LIBRARY)
torch.library.register_autograd(
    "dgnet::aggregate_backward", _differentiate_backward, setup_context=_set_up_backward, lib=_LIBRARY
)
