"""What the free edges of a stage weigh: fixed, learned, or routed (§3.2, §3.3).

Letters: B batch, N nodes of a stage, E edges, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgnet.errors import check_choice
from dgnet.graph._topology import Topology

if TYPE_CHECKING:
    from dgnet.graph._pooling import ValidArea


class Weighting(nn.Module):
    """The weights of a stage's free edges. A new one overrides `predict` or `share`, and `gate` if it gates.

    α is set for each sample at the sending node (`predict`), or is the same for all samples (`share`, with `reads_features`
    False). It becomes the weight that is aggregated at the receiving node (`gate`).
    """

    reads_features = True
    """Whether α follows the features; if not, a stage whose input node nobody else reads does without one."""

    area: ValidArea | None = None
    """Where the images of a padded batch lie, set for the length of a forward: features are read there only."""

    def __init__(self, topology: Topology, channels: int) -> None:
        super().__init__()
        self.topology = topology
        self.channels = channels

    @property
    def threshold(self) -> Tensor | None:
        """τ of each receiving node, (N,); None for a weighting that closes nothing."""
        return None

    def predict(self, node: int, feature: Tensor) -> Tensor:
        """α of the node's free out-edges, (B, E), in the order of `topology.free_receivers(node)`.

        `feature`: the node's output, (B, C, H, W).
        """
        raise NotImplementedError

    def share(self, node: int) -> Tensor:
        """α of the node's in-edges where features are not read, (E,), in the order of `topology.senders(node)`."""
        raise NotImplementedError

    def gate(self, node: int, alpha: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weights of the node's in-edges as aggregated, and which are open; both (B, E), as is `alpha`.

        None in place of the second means that all are open.
        """
        return alpha, None

    def reset_parameters(self) -> None:
        """Put the parameters back to their start."""


class FixedWeighting(Weighting):
    """Every edge weighs 1."""

    reads_features = False

    def __init__(self, topology: Topology, channels: int) -> None:
        super().__init__(topology, channels)
        self.one: Tensor
        self.register_buffer("one", torch.ones(1), persistent=False)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        super()._apply(*args, **kwargs)
        self.one.fill_(1)  # from the meta device it comes without a value, and no state dict brings one
        return self

    def share(self, node: int) -> Tensor:
        return self.one.expand(len(self.topology.senders(node)))


class LearnedWeighting(Weighting):
    """One learned weight an edge, the same for all samples: α of Table 6.

    `start`: the parameter's first value; `activation`: "identity" or "sigmoid" (as RandWire has it).
    """

    reads_features = False

    def __init__(self, topology: Topology, channels: int, start: float = 1.0, activation: str = "identity") -> None:
        super().__init__(topology, channels)
        check_choice("learned_activation", activation, ("identity", "sigmoid"))
        self.start = start
        self.activation = activation
        # Ordered by receiving node, so that a node's in-edges are one slice.
        degrees = [0 if j in topology.pinned else len(topology.senders(j)) for j in range(topology.num_nodes)]
        self.offsets = [sum(degrees[:j]) for j in range(topology.num_nodes + 1)]
        self.alpha = nn.Parameter(torch.empty(sum(degrees)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.alpha, self.start)

    def share(self, node: int) -> Tensor:
        alpha = self.alpha[self.offsets[node] : self.offsets[node + 1]]
        return alpha.sigmoid() if self.activation == "sigmoid" else alpha


def global_average_pool(feature: Tensor) -> Tensor:
    """φ of Eq. (4): (B, C, H, W) -> (B, C), at least in float32."""
    # Not `mean`: its backward writes a map in another memory format than the feature's; that of `sum` is a view.
    height, width = feature.shape[2:]
    return feature.sum((2, 3), dtype=torch.promote_types(feature.dtype, torch.float32)) / (height * width)


class PooledLinear(nn.Linear):
    """A linear layer of pooled features in their precision, (B, C) -> (B, E).

    The parameters of a model cast to half precision are lifted: what is compared with a hard threshold must not be rounded.
    """

    def forward(self, pooled: Tensor) -> Tensor:
        weight = self.weight.to(pooled.dtype)
        bias = None if self.bias is None else self.bias.to(pooled.dtype)
        if not torch.compiler.is_compiling() or self.training:
            return F.linear(pooled, weight, bias)
        # A sum of products goes into one kernel with pooling and gate: a few edges are not worth a call of their own.
        summed = (pooled[:, None] * weight).sum(2)
        return summed if bias is None else summed + bias


class Router(PooledLinear):
    """α = σ(Wᵀφ + b), one row of W for each out-edge (Eq. 4): (B, C) -> (B, E).

    W starts at N(0, `std`); b at `bias`, one for all edges or one for each: +3 lets an edge start open, σ(3) = 0.953 (§6.4).
    """

    def __init__(self, channels: int, num_edges: int, bias: float | Sequence[float] = 3.0, std: float = 0.01) -> None:
        self.start = (bias, std)
        super().__init__(channels, num_edges)

    def reset_parameters(self) -> None:
        bias, std = self.start
        nn.init.normal_(self.weight, std=std)
        with torch.no_grad():
            self.bias.copy_(torch.tensor(bias))

    def forward(self, pooled: Tensor) -> Tensor:
        return super().forward(pooled).sigmoid()


CLOSED_BIAS = -8.0
"""b of an edge that starts closed: α = 0.0003, of which thirty together weigh next to nothing, and optimisers still move it."""


class RoutedWeighting(Weighting):
    """α predicted for every sample by a router on the sending node, gated by τ of the receiving node (§3.3).

    In training an edge weighs ψ(α) = α·σ(α - τ); in evaluation an edge with α < τ is closed (Eq. 5).

    `router`: class or callable (channels, num_edges) -> module mapping (B, C) pooled features, float32 even under
        autocast, to α, (B, E), in [0, 1]. None: `Router` with `bias` and `std`.
    `start`: the edges that begin at `bias`, the others at `CLOSED_BIAS`; None for all. For `Router` only.
    `pool`: what the routers see of a feature, (B, C, H, W) -> (B, C).
    `gate`: "psi", or "alpha" for the plain α; the latter gives τ no gradient, so τ stays at its start.
    `threshold`, `learn_threshold`: where τ starts, and whether it moves.
    `inference_weight`: what an open edge weighs in evaluation: "gated" as in training, or "raw" α as in Eq. (5).
    `offset`: in evaluation an edge closes under τ + offset; its weight's τ stays.
    """

    def __init__(
        self,
        topology: Topology,
        channels: int,
        router: Callable[[int, int], nn.Module] | None = None,
        bias: float = 3.0,
        std: float = 0.01,
        pool: Callable[[Tensor], Tensor] = global_average_pool,
        gate: str = "psi",
        threshold: float = 0.0,
        learn_threshold: bool = True,
        inference_weight: str = "gated",
        offset: float = 0.0,
        start: Topology | None = None,
    ) -> None:
        super().__init__(topology, channels)
        check_choice("gate", gate, ("psi", "alpha"))
        check_choice("inference_weight", inference_weight, ("gated", "raw"))
        self.pool = pool
        self.gate_form = gate
        self.inference_weight = inference_weight
        self.threshold_start = threshold
        self.offset = offset
        self.routers = nn.ModuleDict()
        for node in range(topology.num_nodes - 1):
            receivers = topology.free_receivers(node)
            if not receivers:
                continue
            opening = (start or topology).receivers(node)
            biases = [bias if receiver in opening else CLOSED_BIAS for receiver in receivers]
            num_edges = len(receivers)
            built = Router(channels, num_edges, biases, std) if router is None else router(channels, num_edges)
            self.routers[str(node)] = built
        # (N,), so that row j of an adjacency and tau[j] belong together; tau[0] has no edge to gate.
        self.tau = nn.Parameter(torch.empty(topology.num_nodes), requires_grad=learn_threshold and gate == "psi")
        nn.init.constant_(self.tau, threshold)

    @property
    def threshold(self) -> Tensor:
        return self.tau

    def reset_parameters(self) -> None:
        nn.init.constant_(self.tau, self.threshold_start)
        for router in self.routers.values():  # a router of the user's own may start its layers as it likes
            reset = getattr(router, "reset_parameters", None)
            if callable(reset):
                reset()

    def predict(self, node: int, feature: Tensor) -> Tensor:
        if str(node) not in self.routers:  # every out-edge is pinned
            return feature.new_ones(feature.shape[0], 0)
        # Float32 under autocast too: a rounding of α at a hard threshold flips an edge. (The meta device has no autocast.)
        with torch.autocast("cpu" if feature.is_meta else feature.device.type, enabled=False):
            pooled = self.pool(feature) if self.area is None else self.area.pool(feature, self.pool)
            return self.routers[str(node)](pooled)

    def gate(self, node: int, alpha: Tensor) -> tuple[Tensor, Tensor | None]:
        tau = self.tau[node].to(alpha.dtype)
        gated = alpha * torch.sigmoid(alpha - tau) if self.gate_form == "psi" else alpha
        if self.training:
            return gated, None
        return gated if self.inference_weight == "gated" else alpha, alpha >= tau + self.offset
