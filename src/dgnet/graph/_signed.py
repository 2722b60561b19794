"""Weights that start at static ones of either sign, and a part that depends on the image and starts at nothing.

Letters: B batch, N nodes of a stage, E edges, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dgnet.errors import UsageError, check_range
from dgnet.graph._edge_weights import count_edge_weights, mean_of_edge, of_whole_edges
from dgnet.graph._pooling import global_average_pool
from dgnet.graph._router import PooledLinear
from dgnet.graph._static import EdgeOrder, StaticOptions, find_start
from dgnet.graph._topology import Topology
from dgnet.graph._weighting import RoutedOptions, RoutedWeighting, Weighting, gather_biases, predict_edges
from dgnet.options import option

_UNBOUNDED = {"weighting": ("linear", "softmax")}


@dataclass(frozen=True)
class SignedOptions(RoutedOptions, StaticOptions):
    """Options of the weightings of this module."""

    linear_function: str = option(
        "tanh", "function of the part that depends on the image", ("tanh", "identity"), {"weighting": ("linear",)}
    )
    linear_scale: float = option(0.1, "initial a, the scale of that part", used_by={"weighting": ("linear",)})
    edge_gate: str = option(
        "straight",
        "how an edge closes in training: straight: it weighs 0 if |w| < τ, with the gradient of a soft gate (straight-through);"
        " soft: w · σ((|w| - τ) / 0.1), in evaluation too",
        ("straight", "soft"),
        _UNBOUNDED,
    )

    def check(self) -> None:
        """Raises UsageError for an invalid value."""
        check_range("linear_scale", self.linear_scale)


class SignedWeighting(RoutedWeighting):
    """Routed weights with a learned factor of either sign: w_ij = s_ij · ψ(α_ij) / ψ(½), α = σ(uᵀn(φ) + b).

    n(φ) is φ with mean 0 and length 1. u and b start at 0, so an edge starts at the weight s_ij whatever the image; α moves it
    between 0 and more than twice that. Thresholds close edges as in `RoutedWeighting`. `stage`: counted from 1, for starts that
    are drawn.
    """

    def __init__(self, topology: Topology, channels: int, options: SignedOptions | None = None, stage: int = 1) -> None:
        given = options or SignedOptions()
        routed = RoutedOptions(
            router_bias=0.0,
            router_std=0.0,
            router_norm="unit",
            unit_start=True,
            router_pool=given.router_pool,
            gate=given.gate,
            threshold=given.threshold,
            learn_threshold=given.learn_threshold,
            weight_groups=given.weight_groups,
            two_way=given.two_way,
        )
        super().__init__(topology, channels, routed)
        self.order = EdgeOrder(topology, self.edge_weights)
        self.start = find_start(topology, given, stage)
        self.static = nn.Parameter(torch.empty(self.order.shape))
        self.order.fill(self.static, self.start)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.order.fill(self.static, self.start)

    def weigh(self, node: int, alpha: Tensor) -> Tensor:
        return self.order.row(self.static, node).to(alpha.dtype) * super().weigh(node, alpha)


_TEMPERATURE = 0.1
"""Of soft gates, in units of a weight."""


class _UnboundedWeighting(Weighting):
    """Weights that are no probabilities: an edge closes if |w| < τ of the receiving node.

    A subclass gives w in `value`. The gate is relative to the start: with τ = 0 every edge is open.
    """

    bias = False

    def __init__(self, topology: Topology, channels: int, options: SignedOptions | None = None) -> None:
        super().__init__(topology, channels)
        self.options = options or SignedOptions()
        self.edge_weights, self.two_way = count_edge_weights(self.options, channels), self.options.two_way
        self.pool = self.options.router_pool or global_average_pool
        self.routers = nn.ModuleDict(
            {
                str(node): PooledLinear(
                    channels, len(topology.free_receivers(node)) * self.edge_weights, bias=self.bias, norm="unit"
                )
                for node in range(topology.output)
                if topology.free_receivers(node)
            }
        )
        self.tau = nn.Parameter(torch.empty(topology.num_nodes), requires_grad=self.options.learn_threshold)  # (N,), as τ

    def reset_parameters(self) -> None:
        nn.init.constant_(self.tau, self.options.threshold)
        for parameter in self.routers.parameters():
            nn.init.zeros_(parameter)

    @property
    def threshold(self) -> Tensor:
        return self.tau

    @property
    def temperature(self) -> float:
        """That of the soft gate that an edge has in evaluation too, in units of a weight; 0 if it has none."""
        return _TEMPERATURE if self.options.edge_gate == "soft" else 0.0

    def value(self, node: int, alpha: Tensor) -> Tensor:
        """w of the node's in-edges before closing, (B, E)."""
        raise NotImplementedError

    def score(self, node: int, feature: Tensor) -> Tensor:
        """uᵀn(φ) + b of the node's free out-edges, (B, E), in float32, as routers compute it."""
        return predict_edges(self.routers, node, feature, self.pool, self.edge_weights)

    def weigh(self, node: int, alpha: Tensor) -> Tensor:
        weight = self.value(node, alpha)
        tau = self.tau[node].to(weight.dtype)
        size = mean_of_edge(weight.abs())
        soft = of_whole_edges(torch.sigmoid((size - tau) / _TEMPERATURE), weight)
        if self.options.edge_gate == "soft":
            return weight * soft
        if not self.training:
            return weight
        return weight * (of_whole_edges(size >= tau, weight).to(weight.dtype) + (soft - soft.detach()))

    def find_open(self, node: int, alpha: Tensor, offset: float) -> Tensor | None:
        if self.training:
            return None
        weight = mean_of_edge(self.value(node, alpha).abs())
        return weight >= self.tau[node].to(weight.dtype) + offset


class LinearWeighting(_UnboundedWeighting):
    """A static weight plus a part that depends on the image: w_ij = s_ij + a·g(u_ijᵀn(φ(x_i))).

    n(φ) is φ with mean 0 and length 1; g is tanh or the identity. u starts at 0, so an edge starts at s_ij; its gradient is
    full there, also if s_ij is 0. α is the second term. `stage`: counted from 1, for starts that are drawn.
    """

    def __init__(self, topology: Topology, channels: int, options: SignedOptions | None = None, stage: int = 1) -> None:
        super().__init__(topology, channels, options)
        self.order = EdgeOrder(topology, self.edge_weights)
        self.start = find_start(topology, self.options, stage)
        self.static = nn.Parameter(torch.empty(self.order.shape))
        self.scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.order.fill(self.static, self.start)
        nn.init.constant_(self.scale, self.options.linear_scale)

    def predict(self, node: int, feature: Tensor) -> Tensor:
        score = self.score(node, feature)
        bounded = score.tanh() if self.options.linear_function == "tanh" else score
        return self.scale.to(score.dtype) * bounded

    def constant_alpha(self, node: int) -> Tensor | None:
        if any(parameter.any() for parameter in self.routers.parameters()):
            return None
        return self.order.row(torch.zeros_like(self.static), node)

    def value(self, node: int, alpha: Tensor) -> Tensor:
        return self.order.row(self.static, node).to(alpha.dtype) + alpha


class SoftmaxWeighting(_UnboundedWeighting):
    """Weights that compete: w_ij = E_j · softmax over i of α_ij, α_ij = u_ijᵀn(φ(x_i)) + b_ij; E_j: the in-edges of node j.

    u and b start at 0, so every edge starts at 1. The share of a dead sender, whose α is 0, is not given to the others.

    Raises UsageError if the topology pins edges: their weights are given, so nothing can compete with them.
    """

    couples_edges = True
    bias = True

    def __init__(self, topology: Topology, channels: int, options: SignedOptions | None = None) -> None:
        super().__init__(topology, channels, options)
        if topology.pinned:
            raise UsageError(
                f"weighting='softmax' needs the in-edges of every node, and this topology pins those of node"
                f" {min(topology.pinned)}; use topology='complete' or 'residual', or another weighting"
            )
        self.reset_parameters()

    def predict(self, node: int, feature: Tensor) -> Tensor:
        return self.score(node, feature)

    def constant_alpha(self, node: int) -> Tensor | None:
        routers = self.routers
        if any(router.weight.any() for router in routers.values()):  # type: ignore[operator]
            return None
        return gather_biases(routers, self.topology, node, self.edge_weights)

    def value(self, node: int, alpha: Tensor) -> Tensor:
        return alpha.softmax(1) * alpha.shape[1]
