"""x̂_j = Σ α_ij x_i: a node's input (Eq. 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def aggregate(features: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Sum a node's incoming features, each sample with its own edge weights (Eq. 3).

    `features`: one (B, C, H, W) tensor for each in-edge, E of them; `weights`: (B, E), 0 where closed.
    Returns (B, C, H, W) in the features' dtype.
    """
    columns = weights.to(features[0].dtype).unbind(1)
    total = features[0] * columns[0][:, None, None, None]
    for feature, column in zip(features[1:], columns[1:], strict=True):
        total = torch.addcmul(total, feature, column[:, None, None, None])
    return total
