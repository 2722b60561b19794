"""Gates on nodes: whether a block runs for a sample, decided from what its senders saw.

In a complete graph a block is dead only where all its in-edges close at once, which routers on single edges rarely bring
about. A closed gate closes them together.

Letters: B batch, N nodes of a stage, E gated out-edges of a node, C channels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dgnet.errors import check_choice
from dgnet.graph._topology import Topology
from dgnet.graph._weighting import PooledLinear, global_average_pool

if TYPE_CHECKING:
    from dgnet.graph._pooling import ValidArea


class NodeGates(nn.Module):
    """One gate for each block: open where σ(c_j + Σ_i v_ij · φ(x_i)) ≥ ½, the sum over the node's senders that are alive.

    v_ij is a column more of the router of sender i. In training a gate is 0 or 1 too, and passes gradients straight through
    as σ(z / `temperature`) would. `form`: "hard", or "gumbel", which adds logistic noise to z in training: a closed gate is
    tried open now and then.

    `bias`: c_j at start; `std`: v at start; `offset`: in evaluation a gate is open from a probability of ½ + offset.
    """

    area: ValidArea | None = None
    """As that of `Weighting`."""

    def __init__(
        self,
        topology: Topology,
        channels: int,
        form: str = "gumbel",
        bias: float = 2.0,
        std: float = 0.01,
        temperature: float = 1.0,
        offset: float = 0.0,
    ) -> None:
        super().__init__()
        check_choice("node_gate", form, ("hard", "gumbel"))
        self.topology = topology
        self.form = form
        self.start = (bias, std)
        self.temperature = temperature
        self.offset = offset
        self.columns = nn.ModuleDict(
            {
                str(i): PooledLinear(channels, len(self.receivers(i)), bias=False)
                for i in range(topology.num_nodes - 1)
                if self.receivers(i)
            }
        )
        self.bias = nn.Parameter(torch.empty(topology.num_nodes))  # (N,), as τ: those of input and output node are idle
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Put the parameters back to their start."""
        bias, std = self.start
        nn.init.constant_(self.bias, bias)
        for column in self.columns.values():
            nn.init.normal_(column.weight, std=std)  # type: ignore[arg-type]

    def receivers(self, node: int) -> tuple[int, ...]:
        """The blocks among the nodes that `node` sends to, ascending."""
        return tuple(j for j in self.topology.receivers(node) if j != self.topology.num_nodes - 1)

    def predict(self, node: int, feature: Tensor) -> Tensor:
        """v_ij · φ(x_i) for the node's out-edges to blocks, (B, E), from its feature, (B, C, H, W)."""
        with torch.autocast("cpu" if feature.is_meta else feature.device.type, enabled=False):
            pooled = global_average_pool(feature) if self.area is None else self.area.pool(feature)
            votes: Tensor = self.columns[str(node)](pooled)
            return votes

    def decide(self, node: int, votes: Tensor) -> Tensor:
        """Whether the block runs, (B,): bool in evaluation, 0 or 1 with a gradient in training.

        `votes`: what its senders predicted, 0 where they are dead, (B, number of in-edges).
        """
        logit = votes.sum(1) + self.bias[node].to(votes.dtype)
        if not self.training:
            return logit >= self.least_logit
        if self.form == "gumbel":
            uniform = torch.rand_like(logit).clamp(1e-6, 1 - 1e-6)
            logit = logit + uniform.log() - torch.log1p(-uniform)
        soft = (logit / self.temperature).sigmoid()
        return (logit >= 0).to(soft.dtype) + (soft - soft.detach())

    @property
    def least_logit(self) -> float:
        """The logit from which a gate is open in evaluation."""
        share = 0.5 + self.offset
        return math.log(share / (1 - share)) if 0 < share < 1 else math.copysign(math.inf, self.offset)
