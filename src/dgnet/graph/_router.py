"""α = σ(Wᵀφ + b), which a node predicts for its out-edges (Eq. 4).

Letters: B batch, E out-edges of a node, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgnet.graph._edge_weights import GroupOptions
from dgnet.options import option

CLOSED_BIAS = -8.0
"""Initial b of an edge that starts closed: α = 0.0003. Thirty such edges together weigh about 0.01."""


NORMS = ("none", "layer", "unit")
"""How a pooled feature is normalised before a router or a gate reads it."""


@dataclass(frozen=True, kw_only=True)
class RouterOptions(GroupOptions):
    """Options of routers and block gates alike."""

    router_norm: str = option(
        "none",
        "normalisation of a pooled feature before a router or gate reads it; layer: to mean 0 and variance 1; unit: to mean 0"
        " and length 1",
        NORMS,
        {"weighting": ("routed",), "node_gate": ("hard", "gumbel")},
    )


class PooledLinear(nn.Linear):
    """A linear layer on pooled features in their precision, which is float32 at least, (B, C) -> (B, E).

    Parameters in half precision are cast up: the result is compared with a hard threshold and must not be rounded.
    `norm`: "layer" for layer normalisation without parameters, for features that are not of unit scale; "unit": the same,
    divided by √C, so that an output does not grow with the number of channels.
    """

    def __init__(self, channels: int, num_edges: int, bias: bool = True, norm: str = "none") -> None:
        super().__init__(channels, num_edges, bias)
        self.norm = norm

    def forward(self, pooled: Tensor) -> Tensor:
        if self.norm != "none":
            pooled = F.layer_norm(pooled, pooled.shape[1:])
        if self.norm == "unit":
            pooled = pooled * pooled.shape[1] ** -0.5
        weight = self.weight.to(pooled.dtype)
        bias = None if self.bias is None else self.bias.to(pooled.dtype)
        if not torch.compiler.is_compiling() or torch.compiler.is_exporting() or self.training:
            return F.linear(pooled, weight, bias)
        # The compiler fuses a sum of products with pooling and gate. For few edges a library call takes longer.
        # Exported files keep the linear layer: OpenVINO 2026.4 adds the bias wrongly to such a sum of several images.
        summed = (pooled[:, None] * weight).sum(2)
        return summed if bias is None else summed + bias


class Router(PooledLinear):
    """α = σ(z), z = Wᵀφ + b, one row of W for each out-edge (Eq. 4): (B, C) -> (B, E).

    W is initialised from a normal distribution with standard deviation `std`. `bias`: initial b, one value for all edges or one
    for each; with +3 an edge starts open, σ(3) = 0.953 (§6.4). `norm`: of φ, see `PooledLinear`.

    Autograd computes the gradients of W, ∂L/∂z · φ (Eq. 8), and of b, ∂L/∂z (Eq. 9), summed over the batch.
    """

    def __init__(self, channels: int, num_edges: int, bias: float | Sequence[float], std: float, norm: str = "none") -> None:
        self.start = (bias, std)
        super().__init__(channels, num_edges, norm=norm)

    def reset_parameters(self) -> None:
        bias, std = self.start
        nn.init.normal_(self.weight, std=std)
        with torch.no_grad():
            self.bias.copy_(torch.tensor(bias))

    def forward(self, pooled: Tensor) -> Tensor:
        return super().forward(pooled).sigmoid()
