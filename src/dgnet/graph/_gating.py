"""How edges and blocks close: ψ and τ on edges (Eq. 5), gates on blocks, removal of nodes without an open in-edge (§3.3).

In a complete graph a block is dead only if all its in-edges are closed at once. With a decision for each edge this is rare. A
block gate closes all of them together.

Letters: B batch, N nodes of a stage, E in-edges of a node (out-edges in `NodeGates.predict`), C channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dgnet.errors import UsageError, check_choice, check_range
from dgnet.graph._context import ContextStack
from dgnet.graph._edge_weights import of_whole_edges
from dgnet.graph._pooling import pool_feature, without_autocast
from dgnet.graph._router import PooledLinear, RouterOptions
from dgnet.graph._topology import Topology
from dgnet.options import option


def psi(alpha: Tensor, tau: Tensor) -> Tensor:
    """ψ(α) = α · σ(α - τ), the weight of an edge in training (Eq. 5).

    `alpha`: (B, E); `tau`: τ of the receiving node, a scalar. Autograd computes the factors of Eqs. (8) to (10):
    ∂ψ/∂α = s + α·s·(1 - s) and ∂ψ/∂τ = -α·s·(1 - s), where s = σ(α - τ). (The paper's Eqs. (8) and (9) omit ∂ψ/∂α.)
    """
    return alpha * torch.sigmoid(alpha - tau)


def is_above_threshold(alpha: Tensor, tau: Tensor, offset: float) -> Tensor:
    """Whether an edge is open in evaluation: α ≥ τ + offset (Eq. 5, where the offset is 0)."""
    return alpha >= tau + offset


def stack_alive(senders: Sequence[Tensor | None]) -> Tensor | None:
    """Whether each sender of a node is alive, (B, E), from (B,) for each sender. None: alive for all samples."""
    given = [sender for sender in senders if sender is not None]
    if not given:
        return None
    ones = torch.ones_like(given[0])
    return torch.stack([ones if sender is None else sender for sender in senders], dim=1)


def close_edges(
    weights: Tensor, is_open: Tensor | None, sender_is_alive: Tensor | None, gate: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Close the in-edges of a node that are below the threshold, come from dead nodes, or lead to a closed gate (§3.3).

    `weights`: (B, E), or (B, E, g) for groups of channels. `is_open`: which edges are above the threshold, (B, E).
    `sender_is_alive`: (B, E). `gate`: whether the node's own gate is open, (B,). None: all of them are.
    Returns the weights, 0 where closed; which edges are open, (B, E); whether the node is alive, (B,). None: all.

    While gates train, `sender_is_alive` and `gate` are 0 or 1 as floats, with gradients. Then a weight is multiplied by
    `sender_is_alive`, and the in-edges of a closed gate stay open: the gate's gradient needs the block's feature.
    """
    if is_open is None and gate is None and sender_is_alive is None:
        return weights, None, None
    if sender_is_alive is None:
        sender_is_alive = weights.new_ones(weights.shape[:2], dtype=torch.bool if gate is None else gate.dtype)
    if sender_is_alive.is_floating_point():
        passes = sender_is_alive > 0.5
        is_alive = (passes if is_open is None else is_open & passes).any(1).to(sender_is_alive.dtype)
        weights = weights * of_whole_edges(sender_is_alive, weights).to(weights.dtype)
        weights = weights if is_open is None else torch.where(of_whole_edges(is_open, weights), weights, 0)
        return weights, is_open, is_alive if gate is None else is_alive * gate
    is_open = sender_is_alive if is_open is None else is_open & sender_is_alive
    is_open = is_open if gate is None else is_open & gate[:, None]
    return torch.where(of_whole_edges(is_open, weights), weights, 0), is_open, is_open.any(1)


def find_alive(topology: Topology, is_open: Tensor) -> Tensor:
    """For which samples each node is alive if only gates close blocks, (B, N). `is_open`: which gates are open, (B, blocks)."""
    alive = torch.ones(len(is_open), topology.num_nodes, dtype=torch.bool, device=is_open.device)
    for node in topology.blocks:
        alive[:, node] = is_open[:, node - 1] & alive[:, list(topology.senders(node))].any(1)
    return alive


def find_needed(topology: Topology, is_open: Mapping[int, Tensor]) -> Tensor | None:
    """For which samples each node has an open path to the output node, (B, N); None if no edge is closed.

    `is_open`: for each node whose in-edges are not all open, which of them are, (B, E).
    """
    if not is_open:
        return None
    batch, device = next((len(opened), opened.device) for opened in is_open.values())
    needed = torch.zeros(batch, topology.num_nodes, dtype=torch.bool, device=device)
    needed[:, topology.output] = True
    for node in range(topology.output, 0, -1):
        for edge, sender in enumerate(topology.senders(node)):
            needed[:, sender] |= needed[:, node] & is_open[node][:, edge] if node in is_open else needed[:, node]
    return needed


_GATED = {"node_gate": ("hard", "gumbel")}


@dataclass(frozen=True)
class GateOptions(RouterOptions):
    """Options of block gates."""

    node_gate: str = option(
        "none",
        "a gate on each block that closes all its in-edges at once; gumbel: with noise in training",
        ("none", "hard", "gumbel"),
    )
    node_gate_bias: float = option(
        2.0, "initial c: a gumbel gate is open with probability σ(2) = 0.88 in training, a hard one is open", used_by=_GATED
    )

    node_gate_std: float = option(0.01, "standard deviation of the initial weights of gates", used_by=_GATED)
    gate_reads: str = option(
        "senders",
        "what a gate reads: senders: the features of the block's senders; stage: that of the stage's input node, so that all"
        " gates of a stage are decided before its blocks run; network: that of the first stage's input node, so that all gates"
        " of the network are",
        ("senders", "stage", "network"),
        _GATED,
    )
    gate_policy: str = option(
        "linear",
        "what decides the gates of a whole network: linear: a linear layer on the pooled feature; convolutional: three small"
        " convolutions before it",
        ("linear", "convolutional"),
        {"gate_reads": ("network",)},
    )

    def check(self) -> None:
        """Raises UsageError for an invalid value."""
        check_range("node_gate_bias", self.node_gate_bias)
        check_range("node_gate_std", self.node_gate_std, 0)


_CUTS: ContextStack[None] = ContextStack("accept_cuts")


def accept_cuts() -> AbstractContextManager[None]:
    """Inside the `with` block: build gates on any topology, as older versions did: for the runs that they trained."""
    return _CUTS.hold(None)


class NodeGates(nn.Module):
    """One gate for each block: open if σ(z_j) ≥ ½, z_j = c_j + Σ_i v_ij · φ(x_i), over the block's senders i that are alive.

    With `gate_reads="stage"` the only i is the stage's input node, also for a block that it does not send to (for "network" see
    `NetworkGates`). v_ij: this module's own weights, applied to the pooled feature of sender i. In training a gate is 0 or 1
    too, and its gradient is that of σ(z) (straight-through). A "gumbel" gate adds logistic noise to z in training, so that a
    closed gate sometimes opens.

    Raises UsageError if all paths through the stage lead through one block: closing its gate would remove the image from the
    network, and a budget would count that as saved.
    """

    def __init__(self, topology: Topology, channels: int, options: GateOptions) -> None:
        super().__init__()
        check_choice("node_gate", options.node_gate, _GATED["node_gate"])
        cut = None if _CUTS.values() else topology.find_cut()
        if cut is not None:
            raise UsageError(
                f"node_gate={options.node_gate!r} is not possible here: every path through the stage leads through block {cut},"
                " so a closed gate would leave no feature; use a topology with a path around each block, such as complete or"
                " residual (a random one: another topology_seed), or leave out gates and --budget"
            )
        self.topology = topology
        self.form = options.node_gate
        self.reads = options.gate_reads
        self.start = (options.node_gate_bias, options.node_gate_std)
        senders = [] if options.gate_reads == "network" else [i for i in range(topology.output) if self.receivers(i)]
        self.columns = nn.ModuleDict(
            {str(i): PooledLinear(channels, len(self.receivers(i)), bias=False, norm=options.router_norm) for i in senders}
        )
        self.bias = nn.Parameter(torch.empty(topology.num_nodes))  # c, (N,) as τ; those of input and output node are unused
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset the parameters to their initial values."""
        bias, std = self.start
        nn.init.constant_(self.bias, bias)
        for column in self.columns.values():
            assert isinstance(column, PooledLinear)
            nn.init.normal_(column.weight, std=std)

    @property
    def serves_others(self) -> bool:
        """Whether other stages need what is predicted here, even if this one's weights are imposed."""
        return False

    @property
    def readers(self) -> list[nn.Linear]:
        """The linear layers that predict votes; with weights of 0 the gates do not depend on the image."""
        return [column for column in self.columns.values() if isinstance(column, nn.Linear)]

    @property
    def is_early(self) -> bool:
        """Whether all gates are decided before the blocks run."""
        return self.reads != "senders"

    def find_open_gates(self, votes: Tensor, offset: float) -> Tensor:
        """Which gates are open in evaluation, (B, blocks) bool on the CPU, if they are early: the CPU waits once for all.

        `votes`: of the stage's input node for all blocks, (B, blocks).
        """
        logits = votes + self.bias[1:-1].to(votes.dtype)
        return (logits >= least_logit(offset)).cpu()

    def senders(self, node: int) -> tuple[int, ...]:
        """The nodes whose features the gate of the block `node` reads, ascending."""
        return self.topology.senders(node) if self.reads == "senders" else (0,)

    def receivers(self, node: int) -> tuple[int, ...]:
        """The blocks whose gates read the feature of `node`, ascending."""
        if self.is_early:
            return tuple(self.topology.blocks) if node == 0 else ()
        return tuple(j for j in self.topology.receivers(node) if j != self.topology.output)

    def predict(self, node: int, feature: Tensor) -> Tensor:
        """v_ij · φ(x_i) for the blocks `receivers(node)`, (B, E), from the node's feature, (B, C, H, W)."""
        with without_autocast(feature):
            votes: Tensor = self.columns[str(node)](pool_feature(feature))
            return votes

    def decide(self, node: int, votes: Tensor, offset: float = 0.0) -> Tensor:
        """Whether the block runs, (B,): bool in evaluation, 0 or 1 with a gradient in training.

        `votes`: what the nodes `senders(node)` predicted, (B, E), 0 where they are dead. In evaluation a gate is open if its
        probability is at least ½ + `offset`.
        """
        logit = votes.sum(1) + self.bias[node].to(votes.dtype)
        if not self.training:
            return logit >= least_logit(offset)
        if self.form == "gumbel":
            uniform = torch.rand_like(logit).clamp(1e-6, 1 - 1e-6)
            logit = logit + uniform.log() - torch.log1p(-uniform)
        soft = logit.sigmoid()
        return (logit >= 0).to(soft.dtype) + (soft - soft.detach())


def least_logit(offset: float) -> float:
    """The lowest logit with which a gate is open in evaluation: that of probability ½ + offset; ±∞ outside (0, 1)."""
    probability = 0.5 + offset
    if 0 < probability < 1:
        return math.log(probability / (1 - probability))
    return math.copysign(math.inf, offset)
