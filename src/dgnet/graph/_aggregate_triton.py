"""The kernels of `dgnet::aggregate` in Triton, for CUDA devices. They have not been timed, so they run only on request.

A program computes one tile of one sample: a weight is one scalar, the number of edges is a constant of the kernel, and a closed
edge is masked in the load. The backward kernel reads each feature once; it writes the features' gradients, and for each tile
the sums of the weights' gradients, which are added after it in a fixed order.

Letters: B batch, E in-edges of a node, g groups of channels. A sample of a map is one block of `size` elements in memory, and
element k belongs to group (k // inner) % g.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgnet.graph._aggregate_plain import empty_sum, sum_dtype

_TILE = 2048
"""Elements of a map that one program computes."""


@cache
def register() -> None:
    """Make these kernels those of CUDA devices."""
    torch.library.impl("dgnet::aggregate", "cuda", aggregate_triton)
    torch.library.impl("dgnet::aggregate_backward", "cuda", aggregate_backward_triton)


def aggregate_triton(
    features: Sequence[Tensor], weights: Tensor, is_open: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    """The forward kernel. Returns what `aggregate_plain` returns."""
    out = empty_sum(features[0], len(weights))
    maps = tuple(_arrange(feature, out) for feature in features)
    groups, inner, size = _find_groups(out, weights)
    if out.numel():
        tiles = triton.cdiv(size, _TILE)
        _sum_kernel[(tiles * len(weights),)](
            maps,
            _to_sums(weights, out),
            _or_first(is_open, maps),
            _or_first(rows, maps),
            out,
            tiles,
            len(weights),
            size,
            inner,
            GROUPS=groups,
            EDGES=len(maps),
            HAS_CLOSED=is_open is not None,
            HAS_ROWS=rows is not None,
            TILE=_TILE,
        )
    return out


def aggregate_backward_triton(
    grad: Tensor,
    features: Sequence[Tensor],
    weights: Tensor,
    is_open: Tensor | None,
    needs_weights: bool,
    needs_features: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:
    """The backward kernel. Returns what `aggregate_backward_plain` returns."""
    batch, edges = weights.shape[:2]
    like = empty_sum(features[0], 0)
    grad = _arrange(grad, like)
    maps = tuple(_arrange(feature, like) for feature in features)
    grads = [
        empty_sum(features[0], batch, feature.dtype) if needed else None
        for feature, needed in zip(features, needs_features, strict=True)
    ]
    groups, inner, size = _find_groups(like, weights)
    tiles = triton.cdiv(size, _TILE)
    dtype = sum_dtype(features[0])
    partial = grad.new_zeros((batch, edges, groups, tiles) if needs_weights else 1, dtype=dtype)
    if batch and size and (needs_weights or any(needs_features)):
        _backward_kernel[(tiles * batch,)](
            grad,
            maps,
            _to_sums(weights, like),
            _or_first(is_open, maps),
            tuple(grad if found is None else found for found in grads),
            partial,
            tiles,
            size,
            inner,
            GROUPS=groups,
            EDGES=edges,
            HAS_CLOSED=is_open is not None,
            NEEDS_WEIGHTS=needs_weights,
            NEEDED=sum(1 << edge for edge, needed in enumerate(needs_features) if needed),
            TILE=_TILE,
        )
    found = [one for one in grads if one is not None]
    if not needs_weights:
        return weights.new_empty(0), found
    return partial.sum(-1).reshape(weights.shape).to(weights.dtype), found


def _arrange(feature: Tensor, like: Tensor) -> Tensor:
    """`feature` with its samples as those of `like`, one block after the other: itself, or a copy."""
    size = feature.shape[1:].numel()
    expected, found = [size, *like.stride()[1:]], feature.stride()
    if all(length == 1 or one == other for length, one, other in zip(feature.shape, found, expected, strict=True)):
        return feature
    return torch.empty_strided(feature.shape, expected, dtype=feature.dtype, device=feature.device).copy_(feature)


def _find_groups(like: Tensor, weights: Tensor) -> tuple[int, int, int]:
    """The number of groups, the elements that follow each other in one group, and the elements of a sample."""
    size = like.shape[1:].numel()
    groups = weights.shape[2] if weights.ndim == 3 else 1
    return groups, like.stride(1) if groups > 1 else max(size, 1), size


def _to_sums(weights: Tensor, like: Tensor) -> Tensor:
    return weights.to(sum_dtype(like)).contiguous()


def _or_first(values: Tensor | None, maps: tuple[Tensor, ...]) -> Tensor:
    """`values` without gaps; any tensor if there are none, which is not read."""
    if values is None:
        return maps[0]
    return (values.view(torch.uint8) if values.dtype == torch.bool else values).contiguous()


# The annotations of jitted functions are read by Triton.


@triton.jit  # type: ignore[untyped-decorator]
def _sum_kernel(  # type: ignore[no-untyped-def]
    maps,
    weights,
    is_open,
    rows,
    out,
    tiles,
    batch,
    size,
    inner,
    GROUPS: tl.constexpr,  # noqa: N803
    EDGES: tl.constexpr,  # noqa: N803
    HAS_CLOSED: tl.constexpr,  # noqa: N803
    HAS_ROWS: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
):
    tile = tl.program_id(0) % tiles
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    at = tile * TILE + tl.arange(0, TILE)
    is_in = at < size
    total = tl.zeros((TILE,), weights.dtype.element_ty)
    for edge in tl.static_range(EDGES):
        place = sample * EDGES + edge
        reads = is_in
        if HAS_CLOSED:
            opened = tl.load(is_open + place) != 0
            reads = is_in & opened
        row = sample
        if HAS_ROWS:
            row = tl.load(rows + edge * batch + sample)
        values = tl.load(maps[edge] + row * size + at, mask=reads, other=0.0).to(total.dtype)
        weight = tl.load(weights + place if GROUPS == 1 else weights + place * GROUPS + (at // inner) % GROUPS)
        if HAS_CLOSED:
            total += tl.where(opened, weight * values, 0.0)  # the weight of a closed edge may be NaN too
        else:
            total += weight * values
    tl.store(out + sample * size + at, total.to(out.dtype.element_ty), mask=is_in)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_kernel(  # type: ignore[no-untyped-def]
    grad,
    maps,
    weights,
    is_open,
    grads,
    partial,
    tiles,
    size,
    inner,
    GROUPS: tl.constexpr,  # noqa: N803
    EDGES: tl.constexpr,  # noqa: N803
    HAS_CLOSED: tl.constexpr,  # noqa: N803
    NEEDS_WEIGHTS: tl.constexpr,  # noqa: N803
    NEEDED: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
):
    tile = tl.program_id(0) % tiles
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    at = tile * TILE + tl.arange(0, TILE)
    is_in = at < size
    upstream = tl.load(grad + sample * size + at, mask=is_in, other=0.0).to(weights.dtype.element_ty)
    group = (at // inner) % GROUPS
    for edge in tl.static_range(EDGES):
        place = sample * EDGES + edge
        reads = is_in
        if HAS_CLOSED:
            opened = tl.load(is_open + place) != 0
            reads = is_in & opened
        if NEEDS_WEIGHTS:
            values = tl.load(maps[edge] + sample * size + at, mask=reads, other=0.0).to(upstream.dtype)
            products = tl.where(reads, upstream * values, 0.0)
            for one in range(GROUPS):
                mine = products
                if GROUPS > 1:
                    mine = tl.where(group == one, products, 0.0)
                tl.store(partial + (place * GROUPS + one) * tiles + tile, tl.sum(mine, 0))
        if (NEEDED >> edge) & 1:
            weight = tl.load(weights + place if GROUPS == 1 else weights + place * GROUPS + group)
            found = upstream * weight
            if HAS_CLOSED:
                found = tl.where(opened, found, 0.0)
            tl.store(grads[edge] + sample * size + at, found.to(grads[edge].dtype.element_ty), mask=is_in)
