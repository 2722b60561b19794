"""α = σ(Wᵀφ + b): what a node predicts for its out-edges (Eq. 4).

Letters: B batch, E out-edges of a node, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLOSED_BIAS = -8.0
"""b of an edge that starts closed: α = 0.0003, so that thirty such edges together weigh next to nothing."""


class PooledLinear(nn.Linear):
    """A linear layer on pooled features in their precision, (B, C) -> (B, E).

    Parameters in half precision are cast up: what is compared with a hard threshold must not be rounded.
    """

    def forward(self, pooled: Tensor) -> Tensor:
        weight = self.weight.to(pooled.dtype)
        bias = None if self.bias is None else self.bias.to(pooled.dtype)
        if not torch.compiler.is_compiling() or self.training:
            return F.linear(pooled, weight, bias)
        # A sum of products joins the kernel of pooling and gate: for a few edges a library call costs more than its work.
        summed = (pooled[:, None] * weight).sum(2)
        return summed if bias is None else summed + bias


class Router(PooledLinear):
    """α = σ(z), z = Wᵀφ + b, one row of W for each out-edge (Eq. 4): (B, C) -> (B, E).

    W starts at N(0, `std`). b starts at `bias`, one value for all edges or one for each: +3 lets an edge start open,
    σ(3) = 0.953 (§6.4). Autograd of this module computes the gradients of W, Eq. (8), and of b, Eq. (9):
    ∂L/∂z · φ and ∂L/∂z, summed over the batch.
    """

    def __init__(self, channels: int, num_edges: int, bias: float | Sequence[float], std: float) -> None:
        self.start = (bias, std)
        super().__init__(channels, num_edges)

    def reset_parameters(self) -> None:
        bias, std = self.start
        nn.init.normal_(self.weight, std=std)
        with torch.no_grad():
            self.bias.copy_(torch.tensor(bias))

    def forward(self, pooled: Tensor) -> Tensor:
        return super().forward(pooled).sigmoid()
