"""A node's input x̂_j = Σ_i α_ij x_i (Eq. 3), and its gradients, which are factors of Eqs. (7) to (10).

The backward pass computes for each sample p_ij = ∂L/∂w_ij = ⟨∂L/∂x̂_j, x_i⟩, summed over C, H and W. Eqs. (8) (router weights),
(9) (router biases) and (10) (thresholds) share this factor; their other factors are the gradients of `psi` in _gating.py and
of the router in _router.py. It also computes w_ij · ∂L/∂x̂_j, the gradient that reaches the nodes' own weights (Eq. 7).

Letters: B batch, E in-edges of a node, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dgnet.compat.torch import is_transformed

_BLOCK_ELEMENTS = 512 * 1024
"""On the CPU: elements of a sum that are computed together, few enough to stay in its cache while the edges are added."""

_ROW_ELEMENTS = 4 * 1024
"""On the CPU: from this number of elements of a map on, a call for each sample is faster than gathering samples."""


def aggregate(features: Sequence[Tensor], weights: Tensor, is_open: Tensor | None = None) -> Tensor:
    """Sum a node's incoming features, each sample with its own edge weights (Eq. 3).

    `features`: one tensor for each in-edge, E of them, (B, C, H, W) or of another layout with B first; `weights`: (B, E), or
    (B, E, g) for features of (B, g, …); `is_open`: (B, E), None for all open. The feature of a closed edge never enters the
    sum, even if it is infinite or NaN.

    Sums in float32 if features are in half precision, otherwise in their own precision. Returns a tensor like a feature.
    """
    first = features[0]
    # The compiler fuses the loop into one pass. On a GPU the CPU would have to wait to read which edges are open.
    if torch.compiler.is_compiling() or first.is_meta or (is_open is not None and not first.is_cpu) or is_transformed(first):
        return aggregate_by_loop(features, weights, is_open)
    total: Tensor = _Aggregate.apply(weights, is_open, *features)
    return total


def aggregate_by_loop(features: Sequence[Tensor], weights: Tensor, is_open: Tensor | None = None) -> Tensor:
    """`aggregate` edge by edge in plain operations, which never read values: for compilers, exporters and transforms.

    It is also the twin of `aggregate` in the tests.
    """
    dtype = _sum_dtype(features[0])
    total: Any = None
    for edge, feature in enumerate(features):
        if is_open is not None:
            feature = torch.where(_along(is_open[:, edge], feature), feature, 0)
        # The product promotes to the wider dtype. If the feature were cast, the compiler would keep the wider copy for the
        # backward pass.
        term = feature * _along(weights[:, edge], feature).to(dtype)
        total = term if total is None else total + term
    summed: Tensor = total.to(features[0].dtype)
    return summed


def aggregate_rows(
    features: Sequence[Tensor], weights: Tensor, is_open: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    """`aggregate` without gradients, of features that may hold only some of the samples.

    `rows`: (E, B), the row of each sample in each feature, (B_e, C, H, W); any row of it if the edge is closed. None: the
    features hold all samples in order. On the CPU, large maps of closed edges are not read.
    """
    first = features[0]
    # In the memory format of the features.
    out = torch.empty_like(first) if rows is None else torch.empty_like(first[:1].expand(len(weights), *first.shape[1:]))
    if not first.is_cpu:
        return _sum_blocks(out, features, weights, is_open, rows, size=max(len(out), 1))
    elements = max(first.shape[1:].numel(), 1)
    if is_open is not None and is_open.all():
        is_open = None
    is_partial = rows is not None or is_open is not None
    if weights.ndim == 2 and (elements > _BLOCK_ELEMENTS // 2 or (is_partial and elements >= _ROW_ELEMENTS)):
        return _sum_samples(out, features, weights, is_open, rows)
    return _sum_blocks(out, features, weights, is_open, rows, size=max(_BLOCK_ELEMENTS // elements, 1))


def _sum_samples(
    out: Tensor, features: Sequence[Tensor], weights: Tensor, is_open: Tensor | None, rows: Tensor | None
) -> Tensor:
    """Sample by sample: reads the features of open edges only, without copying them first."""
    dtype = _sum_dtype(out)
    opens = None if is_open is None else is_open.tolist()
    places = None if rows is None else rows.tolist()
    seen = [feature.unbind() for feature in features]  # views made once: a slice costs as much as a small sum
    for sample, (target, row) in enumerate(zip(out.unbind(), weights.tolist(), strict=True)):
        total = target if out.dtype == dtype else torch.empty_like(target, dtype=dtype)
        is_empty = True
        for edge, weight in enumerate(row):
            if opens is not None and not opens[sample][edge]:
                continue
            term = seen[edge][sample if places is None else places[edge][sample]]
            if not is_empty:
                total.add_(term, alpha=weight)
            elif total is target:
                torch.mul(term, weight, out=total)
            else:
                torch.mul(term.to(dtype), weight, out=total)
            is_empty = False
        if is_empty:
            total.zero_()
        if total is not target:
            target.copy_(total)
    return out


def _sum_blocks(
    out: Tensor,
    features: Sequence[Tensor],
    weights: Tensor,
    is_open: Tensor | None,
    rows: Tensor | None,
    size: int,
) -> Tensor:
    """`size` samples at a time. On the CPU an edge that is closed for all of them is skipped."""
    dtype = _sum_dtype(out)
    opens = None if is_open is None or not out.is_cpu else is_open.tolist()
    for start in range(0, len(out), size):
        block = slice(start, start + size)
        target = out[block]
        total = target.zero_() if out.dtype == dtype else torch.zeros_like(target, dtype=dtype)
        for edge, feature in enumerate(features):
            column = None if opens is None else [row[edge] for row in opens[block]]
            if column is not None and not any(column):
                continue
            seen = feature[block] if rows is None else _take(feature, rows[edge, block])
            if is_open is not None and (column is None or not all(column)):
                seen = torch.where(_along(is_open[block, edge], seen), seen, 0)
            total.addcmul_(seen, _along(weights[block, edge], seen).to(dtype))
        if total is not target:
            target.copy_(total)
    return out


def _take(feature: Tensor, rows: Tensor) -> Tensor:
    """Some samples of a feature, in its memory format, which `index_select` does not keep."""
    if feature.ndim != 4 or not feature.is_contiguous(memory_format=torch.channels_last):
        return feature.index_select(0, rows)
    return feature.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)


class _Aggregate(torch.autograd.Function):
    """`aggregate` without the compiler: no term α_ij x_i is stored; the backward pass keeps the features and no other maps."""

    @staticmethod
    def forward(weights: Tensor, is_open: Tensor | None, *features: Tensor) -> Tensor:
        return aggregate_rows(features, weights, is_open)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the weights, p_ij of Eqs. (8) to (10), and of the features, w_ij · ∂L/∂x̂_j (Eq. 7)."""
        weights, is_open, *features = ctx.saved_tensors
        dtype = _sum_dtype(grad)
        grad_sum = grad.to(dtype)
        columns: list[Tensor | None] = []
        feature_grads: list[Tensor | None] = []
        for edge, (feature, needed) in enumerate(zip(features, ctx.needs_input_grad[2:], strict=True)):
            weight = _along(weights[:, edge], feature).to(dtype)
            product = grad_sum * feature.to(dtype) if ctx.needs_input_grad[0] else None
            if is_open is not None:
                edge_is_open = _along(is_open[:, edge], feature)
                weight = torch.where(edge_is_open, weight, 0)
                product = None if product is None else torch.where(edge_is_open, product, 0)
            columns.append(
                None if product is None else product.sum(tuple(range(weights.ndim - 1, product.ndim))).to(weights.dtype)
            )
            feature_grads.append((grad_sum * weight).to(feature.dtype) if needed else None)
        weight_grad = torch.stack(columns, 1) if ctx.needs_input_grad[0] else None  # type: ignore[arg-type]
        return weight_grad, None, *feature_grads


def _along(values: Tensor, feature: Tensor) -> Tensor:
    """One value for each sample, (B,), in the form that multiplies a feature: (B, 1, 1, 1) for (B, C, H, W).

    Also one for each sample and group, (B, g), for a feature of (B, g, …).
    """
    return values.reshape(*values.shape, *[1] * (feature.ndim - values.ndim))


def _sum_dtype(feature: Tensor) -> torch.dtype:
    return torch.promote_types(feature.dtype, torch.float32)
