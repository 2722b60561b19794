"""The weights of a stage's free edges: fixed, learned, or routed (§3.2, §3.3).

Letters: B batch, N nodes of a stage, E edges, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dgnet.errors import UsageError, check_choice, check_range
from dgnet.graph._edge_weights import count_edge_weights, mean_of_edge, of_whole_edges, split_edges
from dgnet.graph._gating import is_above_threshold, psi
from dgnet.graph._pooling import global_average_pool, pool_feature, without_autocast
from dgnet.graph._router import CLOSED_BIAS, Router, RouterOptions
from dgnet.graph._static import EdgeOrder, StaticOptions, find_start
from dgnet.graph._topology import TOPOLOGY_NAMES, Topology
from dgnet.options import option


class Weighting(nn.Module):
    """The weights of a stage's free edges. A subclass overrides `predict` or `shared_alpha`, and others if needed.

    α is predicted for each sample at the sending node (`predict`), or is the same for all samples (`shared_alpha`, with
    `reads_features = False`). `weigh` turns α into the weight that the sum uses. If there is a `threshold`, an edge is closed
    in evaluation if its α is below that of the receiving node (`find_open`).
    """

    reads_features = True
    """Whether α depends on the features. If False and nothing else reads node 0, no projection is built."""

    reads_offset = True
    """Whether `find_open` follows `offset`, if edges can close at all."""

    couples_edges = False
    """Whether the weight of an in-edge depends on α of the node's other in-edges. α of a dead sender is then 0 in `weigh`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for old, new in (("gate", "`weigh` and `find_open`"), ("share", "`shared_alpha`")):
            if old in vars(cls):
                raise UsageError(f"{cls.__name__} overrides `{old}` of version 0.1's weightings; override {new} instead")

    edge_weights = 1
    """k, the weights of each edge: those of groups of channels, of a node's two ways, or one. If k > 1, α and weights are
    (B, E, k)."""

    two_way = False
    """Whether a node's block and its shortcut read sums with weights of their own. The first half of k is the block's."""

    def __init__(self, topology: Topology, channels: int) -> None:
        super().__init__()
        self.topology = topology
        self.channels = channels

    @property
    def threshold(self) -> Tensor | None:
        """τ of each receiving node, (N,); None if the weighting closes no edges."""
        return None

    @property
    def can_close(self) -> bool:
        """Whether edges may close in evaluation: there is a threshold, or `find_open` is the weighting's own."""
        return self.threshold is not None or type(self).find_open is not Weighting.find_open

    def predict(self, node: int, feature: Tensor) -> Tensor:
        """α of the node's free out-edges, (B, E), in the order of `topology.free_receivers(node)`.

        (B, E, k) with several `edge_weights`. `feature`: the node's output, (B, C, H, W).
        """
        raise NotImplementedError

    def shared_alpha(self, node: int) -> Tensor:
        """α of the node's in-edges for all samples, (E,), in the order of `topology.senders(node)`.

        Used if `reads_features` is False.
        """
        raise NotImplementedError

    def constant_alpha(self, node: int) -> Tensor | None:
        """α of the node's in-edges, (E,), if it is the same for all features; None if it is not, or that is not known."""
        return None if self.reads_features else self.shared_alpha(node)

    def weigh(self, node: int, alpha: Tensor) -> Tensor:
        """The weights of the node's in-edges in the sum if they are open, (B, E), from their α, (B, E)."""
        return alpha

    def find_open(self, node: int, alpha: Tensor, offset: float) -> Tensor | None:
        """Which in-edges of the node are open, (B, E): in evaluation those with α ≥ τ + `offset` (Eq. 5); None: all."""
        threshold = None if self.training else self.threshold
        if threshold is None:
            return None
        return is_above_threshold(mean_of_edge(alpha), threshold[node].to(alpha.dtype), offset)

    def reset_parameters(self) -> None:
        """Reset the parameters to their initial values."""


class FixedWeighting(Weighting):
    """Every edge weighs 1."""

    reads_features = False

    def __init__(self, topology: Topology, channels: int) -> None:
        super().__init__(topology, channels)
        self.like: Tensor
        self.register_buffer("like", torch.empty(0), persistent=False)  # gives the weights' device and dtype

    def shared_alpha(self, node: int) -> Tensor:
        return self.like.new_ones(len(self.topology.senders(node)))


@dataclass(frozen=True)
class LearnedOptions(StaticOptions):
    """Options of `LearnedWeighting`."""

    learned_start: float = option(1.0, "initial α; a factor of `static_start`", used_by={"weighting": ("learned",)})
    learned_activation: str = option(
        "identity",
        "function that is applied to a learned α; RandWire uses a sigmoid",
        ("identity", "sigmoid"),
        {"weighting": ("learned",)},
    )
    keep_edges: int = option(
        0,
        "in-edges of a node that stay open: this many, those with the largest |α|; 0: all. In training the others weigh 0 and"
        " learn as if they were open (straight-through)",
        used_by={"weighting": ("learned",)},
    )

    def check(self) -> None:
        """Raises UsageError for an invalid value."""
        check_range("learned_start", self.learned_start)
        if type(self.keep_edges) is not int or self.keep_edges < 0:
            raise UsageError(f"keep_edges must be a whole number from 0 on, got {self.keep_edges!r}")
        if self.learned_start == 0 and self.learned_activation == "identity":
            raise UsageError(
                "learned_start must not be 0: edges that weigh 0 count as closed, and nothing would reach the output"
            )
        if self.learned_activation == "sigmoid" and not (isinstance(self.static_start, str) and self.static_start == "ones"):
            raise UsageError("static_start has no effect with learned_activation='sigmoid': weights are positive; leave it out")


class LearnedWeighting(Weighting):
    """One learned weight for each edge, the same for all samples: α of Table 6."""

    reads_features = False
    reads_offset = False  # `keep_edges` counts edges

    def __init__(self, topology: Topology, channels: int, options: LearnedOptions | None = None, stage: int = 1) -> None:
        super().__init__(topology, channels)
        self.options = options or LearnedOptions()
        self.edge_weights, self.two_way = count_edge_weights(self.options, channels), self.options.two_way
        self.order = EdgeOrder(topology, self.edge_weights)
        self.start = find_start(topology, self.options, stage)
        self.alpha = nn.Parameter(torch.empty(self.order.shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.order.fill(self.alpha, self.start, self.options.learned_start)

    @property
    def can_close(self) -> bool:
        return self.options.keep_edges > 0

    def shared_alpha(self, node: int) -> Tensor:
        alpha = self.order.row(self.alpha, node)
        return alpha.sigmoid() if self.options.learned_activation == "sigmoid" else alpha

    def weigh(self, node: int, alpha: Tensor) -> Tensor:
        kept = self._find_kept(alpha) if self.training else None  # in evaluation `find_open` closes the others
        if kept is None:
            return alpha
        kept = of_whole_edges(kept, alpha).to(alpha.dtype)
        return alpha * kept + (alpha - alpha.detach()) * (1 - kept)

    def find_open(self, node: int, alpha: Tensor, offset: float) -> Tensor | None:
        return None if self.training else self._find_kept(alpha)

    def _find_kept(self, alpha: Tensor) -> Tensor | None:
        """Which in-edges of a node are among the heaviest, (B, E), from their α; None: all of them."""
        number = self.options.keep_edges
        if not 0 < number < alpha.shape[1]:
            return None
        heaviest = mean_of_edge(alpha).detach().abs().topk(number, dim=1).indices
        return torch.zeros(alpha.shape[:2], dtype=torch.bool, device=alpha.device).scatter(1, heaviest, True)


_ROUTED = {"weighting": ("routed",)}
_GATED = {"weighting": ("routed", "signed")}
_PREDICTED = {"weighting": ("routed", "signed", "linear", "softmax")}


def predict_edges(
    routers: nn.ModuleDict, node: int, feature: Tensor, pool: Callable[[Tensor], Tensor], edge_weights: int
) -> Tensor:
    """What the router of `node` says of its free out-edges, (B, E) or (B, E, k), from its feature, (B, C, H, W)."""
    if str(node) not in routers:  # every out-edge is pinned
        return feature.new_ones(feature.shape[0], 0)
    # Float32 under autocast too: rounding α near τ could open or close the edge.
    with without_autocast(feature):
        return split_edges(routers[str(node)](pool_feature(feature, pool)), edge_weights)


def gather_biases(routers: Any, topology: Topology, node: int, edge_weights: int) -> Tensor:
    """b of the node's in-edges, (E,) or (E, k), in the order of `topology.senders(node)`; each is in its sender's router."""
    rows = []
    for sender in topology.senders(node):
        biases = split_edges(routers[str(sender)].bias[None], edge_weights)[0]
        rows.append(biases[topology.free_receivers(sender).index(node)])
    return torch.stack(rows)


@dataclass(frozen=True)
class RoutedOptions(RouterOptions):
    """Options of `RoutedWeighting`. The defaults are DG-Net's."""

    router: Callable[[int, int], nn.Module] | None = option(
        None, "a router of your own: (channels, num_edges) -> module, (B, C) -> α (B, E); None: `Router`", used_by=_ROUTED
    )
    router_bias: float = option(3.0, "initial b: with +3 every edge starts open (§6.4, Fig. 4)", used_by=_ROUTED)
    router_std: float = option(0.01, "standard deviation of the initial W", used_by=_ROUTED)
    router_start: str = option(
        "complete", "topology whose edges start open; the other edges of the complete graph start closed", used_by=_ROUTED
    )
    router_pool: Callable[[Tensor], Tensor] | None = option(
        None, "φ, (B, C, H, W) -> (B, C); None: global average pooling", used_by=_PREDICTED
    )
    gate: str = option("psi", "weight in training: psi = α·σ(α - τ), or alpha", ("psi", "alpha"), _GATED)
    threshold: float = option(0.0, "initial τ", used_by=_PREDICTED)
    learn_threshold: bool = option(True, "whether τ is learned", used_by=_PREDICTED)
    unit_start: bool = option(
        False, "scale weights so that an edge that starts open weighs 1, and one that `router_start` closes 0", used_by=_ROUTED
    )
    inference_weight: str = option(
        "gated", "weight of an open edge in evaluation: as in training, or its raw α (Eq. 5)", ("gated", "raw"), _ROUTED
    )

    def check(self) -> None:
        """Raises UsageError for an invalid value."""
        for name in ("router", "router_pool"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise UsageError(f"{name} must be a class or callable, got {getattr(self, name)!r}; see docs/extending.md")
        check_choice("router_start", self.router_start, TOPOLOGY_NAMES)
        check_range("router_bias", self.router_bias)
        check_range("router_std", self.router_std, 0)
        check_range("threshold", self.threshold)
        for name in ("learn_threshold", "unit_start"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name in ("unit_start", "router_norm", "weight_groups", "two_way"):
            if self.router is not None and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise UsageError(f"{name}={getattr(self, name)!r} has no effect with a router of your own; leave it out")
        if self.unit_start and self.inference_weight == "raw":
            raise UsageError("unit_start divides the gated weight; use inference_weight='gated'")
        if self.unit_start and self.start_weight(self.router_bias) < 1e-6:
            raise UsageError(f"unit_start needs edges that start open, and with router_bias={self.router_bias} they do not")

    @property
    def closed_bias(self) -> float:
        """Initial b of an edge that starts closed.

        With `unit_start` it is the opposite of `router_bias`: such an edge weighs 0 whatever its α, and must be able to learn.
        """
        return -abs(self.router_bias) if self.unit_start else CLOSED_BIAS

    def start_weight(self, bias: float, dtype: torch.dtype = torch.float32) -> float:
        """The weight, before any scaling, of an edge whose b starts at `bias`, if the router's initial W is 0.

        It is computed with the operations of a forward pass in `dtype`, so that scaled weights start at exactly 1 or 0.
        """
        start = torch.tensor([bias, self.threshold], device="cpu").to(dtype)  # parameters are initialised in float32
        alpha, tau = start[0].sigmoid(), start[1]
        return float(alpha if self.gate == "alpha" else psi(alpha, tau))

    def start_weights(self, dtype: torch.dtype) -> tuple[float, float]:
        """ψ(α₀) of an edge that starts open, and ψ(α₁)/ψ(α₀) with α₁ of one that starts closed; (1, 0) without `unit_start`."""
        if not self.unit_start:
            return 1.0, 0.0
        weights = [self.start_weight(bias, dtype) for bias in (self.router_bias, self.closed_bias)]
        opened, closed = torch.tensor(weights, dtype=dtype, device="cpu")
        return float(opened), float(closed / opened)


class RoutedWeighting(Weighting):
    """α predicted for every sample by a router on the sending node (Eq. 4), closed by τ of the receiving node (Eq. 5).

    In training an edge weighs ψ(α); in evaluation an edge with α < τ is closed. With `gate="alpha"` τ has no gradient and keeps
    its initial value. A router receives pooled features in float32, under autocast too, and returns α in [0, 1].

    `start`: the edges whose b starts at `router_bias`; b of the others starts at `closed_bias`. None: all edges. Only `Router`
    uses it.

    With `unit_start` the weight is ψ(α)/ψ(α₀) of an edge that starts open, and (ψ(α) - ψ(α₁))/ψ(α₀) of one that starts closed;
    α₀ and α₁ are their α at the start, if W is 0.
    """

    def __init__(
        self, topology: Topology, channels: int, options: RoutedOptions | None = None, start: Topology | None = None
    ) -> None:
        super().__init__(topology, channels)
        self.options = options or RoutedOptions()
        self.edge_weights, self.two_way = count_edge_weights(self.options, channels), self.options.two_way
        self.pool = self.options.router_pool or global_average_pool
        self.start_weights = {dtype: self.options.start_weights(dtype) for dtype in (torch.float32, torch.float64)}
        closed = topology.mask & ~(start or topology).mask
        self.closed: Tensor | None  # which edges start at 0, (N, N); None if no edge does
        self.register_buffer("closed", closed if self.options.unit_start and closed.any() else None, persistent=False)
        self.routers = nn.ModuleDict()
        for node in range(topology.output):
            receivers = topology.free_receivers(node)
            if receivers:
                opening = (start or topology).receivers(node)
                open_bias, closed_bias = self.options.router_bias, self.options.closed_bias
                biases = [
                    open_bias if receiver in opening else closed_bias
                    for receiver in receivers
                    for _ in range(self.edge_weights)
                ]
                self.routers[str(node)] = (
                    Router(channels, len(biases), biases, self.options.router_std, self.options.router_norm)
                    if self.options.router is None
                    else self.options.router(channels, len(receivers))
                )
        # (N,): tau[j] belongs to row j of an adjacency; tau[0] is unused.
        is_learned = self.options.learn_threshold and self.options.gate == "psi"
        self.tau = nn.Parameter(torch.full((topology.num_nodes,), float(self.options.threshold)), requires_grad=is_learned)

    @property
    def threshold(self) -> Tensor:
        return self.tau

    def reset_parameters(self) -> None:
        nn.init.constant_(self.tau, self.options.threshold)
        for router in self.routers.values():  # a user's own router may have no such method
            reset = getattr(router, "reset_parameters", None)
            if callable(reset):
                reset()

    def predict(self, node: int, feature: Tensor) -> Tensor:
        return predict_edges(self.routers, node, feature, self.pool, self.edge_weights)

    def constant_alpha(self, node: int) -> Tensor | None:
        routers: Any = self.routers  # a user's own router is not known
        if any(not isinstance(router, Router) or router.weight.any() for router in routers.values()):
            return None
        return gather_biases(self.routers, self.topology, node, self.edge_weights).sigmoid()

    def weigh(self, node: int, alpha: Tensor) -> Tensor:
        is_raw = not self.training and self.options.inference_weight == "raw"
        is_alpha = is_raw or self.options.gate == "alpha"
        weight = alpha if is_alpha else psi(alpha, self.tau[node].to(alpha.dtype))
        if not self.options.unit_start:
            return weight
        opened, shift = self.start_weights[weight.dtype]
        weight = weight / opened
        if self.closed is None:
            return weight
        closed = self.closed[node, list(self.topology.senders(node))].to(weight)
        return weight - (closed if weight.ndim == 2 else closed[:, None]) * shift
