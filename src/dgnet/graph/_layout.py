"""The layouts of features: maps with channels first, maps with channels last, and tokens.

Letters: B batch, C channels, H and W height and width, L tokens.
"""

from __future__ import annotations

from torch import Tensor

LAYOUTS = ("NCHW", "NHWC", "NLC")
"""(B, C, H, W), (B, H, W, C) and (B, L, C), as timm writes them."""


def to_map(feature: Tensor, layout: str) -> Tensor:
    """A feature of any layout as a view of shape (B, C, H, W), as routers read it. Of tokens it is (B, C, L, 1)."""
    if layout == "NHWC":
        return feature.permute(0, 3, 1, 2)
    return feature.transpose(1, 2)[..., None] if layout == "NLC" else feature


def from_map(feature: Tensor, layout: str) -> Tensor:
    """The inverse of `to_map`."""
    if layout == "NHWC":
        return feature.permute(0, 2, 3, 1)
    return feature[..., 0].transpose(1, 2) if layout == "NLC" else feature
