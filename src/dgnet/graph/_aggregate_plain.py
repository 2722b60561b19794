"""The kernels of `dgnet::aggregate` in PyTorch's operators: for every device, where no compiled ones run.

Letters: B batch, E in-edges of a node, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 512 * 1024
"""On the CPU: elements of a sum that are computed together, few enough to stay in its cache while the edges are added."""

_ROW_ELEMENTS = 4 * 1024
"""On the CPU: from this number of elements of a map on, a call for each sample is faster than gathering samples."""


def sum_dtype(feature: Tensor) -> torch.dtype:
    """The precision of sums over `feature`: float32 at least."""
    return torch.promote_types(feature.dtype, torch.float32)


def along(values: Tensor, feature: Tensor) -> Tensor:
    """One value for each sample, (B,), in the form that multiplies a feature: (B, 1, 1, 1) for (B, C, H, W).

    Also one for each sample and group, (B, g), for a feature of (B, g, …).
    """
    return values.reshape(*values.shape, *[1] * (feature.ndim - values.ndim))


def empty_sum(like: Tensor, samples: int, dtype: torch.dtype | None = None) -> Tensor:
    """An empty sum of features as `like`, for `samples` samples: in their memory format, each sample one block of memory."""
    # On the meta device, because only the strides that torch chooses are wanted.
    sample = torch.empty_like(torch.empty_strided(like.shape[1:], like.stride()[1:], device="meta"))
    return torch.empty_strided(
        (samples, *sample.shape), (sample.numel(), *sample.stride()), dtype=dtype or like.dtype, device=like.device
    )


def aggregate_by_loop(features: Sequence[Tensor], weights: Tensor, is_open: Tensor | None = None) -> Tensor:
    """`aggregate` edge by edge in plain operations, which never read values: for compilers, exporters and transforms.

    It is also the twin of `aggregate` in the tests.
    """
    dtype = sum_dtype(features[0])
    total: Any = None
    for edge, feature in enumerate(features):
        if is_open is not None:
            feature = torch.where(along(is_open[:, edge], feature), feature, 0)
        # The product promotes to the wider dtype. If the feature were cast, the compiler would keep the wider copy for the
        # backward pass.
        term = feature * along(weights[:, edge], feature).to(dtype)
        total = term if total is None else total + term
    summed: Tensor = total.to(features[0].dtype)
    return summed


def aggregate_plain(
    features: Sequence[Tensor], weights: Tensor, is_open: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    """The forward kernel. On the CPU, large maps of closed edges are not read."""
    first = features[0]
    out = empty_sum(first, len(weights))
    if not first.is_cpu:
        return _sum_blocks(out, features, weights, is_open, rows, size=max(len(out), 1))
    elements = max(first.shape[1:].numel(), 1)
    if is_open is not None and is_open.all():
        is_open = None
    is_partial = rows is not None or is_open is not None
    if weights.ndim == 2 and (elements > _BLOCK_ELEMENTS // 2 or (is_partial and elements >= _ROW_ELEMENTS)):
        return _sum_samples(out, features, weights, is_open, rows)
    return _sum_blocks(out, features, weights, is_open, rows, size=max(_BLOCK_ELEMENTS // elements, 1))


def partial_sums_plain(features: Sequence[Tensor], weights: Tensor, is_open: Tensor | None = None) -> None:
    """The kernel of `partial_sums`, sample by sample, so that few sums lie beside the features."""
    if weights.shape[1] > len(features):
        raise RuntimeError(f"dgnet::partial_sums: {len(features)} features have no memory for {weights.shape[1]} sums")
    for sample in range(len(weights)):
        own = slice(sample, sample + 1)
        seen = [feature[own] for feature in features]
        sums = [
            aggregate_plain(seen, weights[own, row], None if is_open is None else is_open[own, row])
            for row in range(weights.shape[1])
        ]
        for feature, total in zip(seen, sums, strict=False):
            feature.copy_(total)


def aggregate_backward_plain(
    grad: Tensor,
    features: Sequence[Tensor],
    weights: Tensor,
    is_open: Tensor | None,
    needs_weights: bool,
    needs_features: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:
    """The backward kernel. It never reads values, so a GPU need not be waited for."""
    dtype = sum_dtype(grad)
    columns: list[Tensor] = []
    feature_grads: list[Tensor] = []
    grad_sum = grad.to(dtype) if needs_weights else grad
    for edge, (feature, needed) in enumerate(zip(features, needs_features, strict=True)):
        weight = along(weights[:, edge], feature).to(dtype)
        edge_is_open = None if is_open is None else along(is_open[:, edge], feature)
        if needs_weights:
            product = grad_sum * feature.to(dtype)
            if edge_is_open is not None:
                product = torch.where(edge_is_open, product, 0)
            columns.append(product.sum(tuple(range(weights.ndim - 1, product.ndim))).to(weights.dtype))
        if needed:
            weight = weight if edge_is_open is None else torch.where(edge_is_open, weight, 0)
            feature_grads.append(torch.mul(grad_sum, weight, out=empty_sum(features[0], len(feature), feature.dtype)))
    return torch.stack(columns, 1) if needs_weights else weights.new_empty(0), feature_grads


def weight_gradients_plain(
    grad: Tensor,
    features: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    shifts: Sequence[Tensor | None],
    weights: Tensor,
    is_open: Tensor | None,
) -> Tensor:
    """The kernel of `weight_gradients`: ⟨grad, scale · feature + shift⟩ from the sums over each channel, without the map.

    Where a channel's mean is far above its deviation, this is less exact than the map would be.
    """
    columns = []
    grad = grad.to(sum_dtype(grad))
    by_channel = _sum_channels(grad)
    for edge, (feature, scale, shift) in enumerate(zip(features, scales, shifts, strict=True)):
        products = _sum_channels(grad * feature.to(sum_dtype(feature)))
        if scale is not None and shift is not None:
            products = products * scale + by_channel * shift
        column = products.sum(1)
        columns.append(column if is_open is None else torch.where(is_open[:, edge], column, 0))
    return torch.stack(columns, 1).to(weights.dtype)


def _sum_channels(feature: Tensor) -> Tensor:
    """The sum over all positions, (B, C)."""
    return feature.sum(tuple(range(2, feature.ndim))) if feature.ndim > 2 else feature


def _sum_samples(
    out: Tensor, features: Sequence[Tensor], weights: Tensor, is_open: Tensor | None, rows: Tensor | None
) -> Tensor:
    """Sample by sample: reads the features of open edges only, without copying them first."""
    dtype = sum_dtype(out)
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
    dtype = sum_dtype(out)
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
                seen = torch.where(along(is_open[block, edge], seen), seen, 0)
            total.addcmul_(seen, along(weights[block, edge], seen).to(dtype))
        if total is not target:
            target.copy_(total)
    return out


def _take(feature: Tensor, rows: Tensor) -> Tensor:
    """Some samples of a feature, in its memory format, which `index_select` does not keep."""
    if feature.ndim != 4 or not feature.is_contiguous(memory_format=torch.channels_last):
        return feature.index_select(0, rows)
    return feature.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
