"""A stage as a graph: aggregate, transform, predict, distribute, node by node (§3.3, Fig. 1).

Letters: B batch, N nodes, E in-edges of a node, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from dgnet.errors import UsageError, check_choice
from dgnet.graph._aggregate import aggregate
from dgnet.graph._gating import NodeGates
from dgnet.graph._topology import Topology
from dgnet.graph._weighting import Weighting

if TYPE_CHECKING:
    from dgnet.graph._pooling import ValidArea
    from dgnet.graph._record import Observer


class DynamicGraph(nn.Module):
    """One stage: nodes that sum their in-edges and transform the sum, x_j = f_j(Σ α_ij x_i) (Eq. 3).

    `input`: raw stage input -> x_0 (a projection, or the identity). `nodes`: f_1 … f_{N-2}, without shortcut and without
    what follows the static block's addition; that is `activation`. With `shortcut="edge"` the activation follows each
    aggregation (not an entry node's) and the residual shortcut is an edge. With `shortcut="node"` it follows an addition
    inside the node, x_j = activation(f_j(x̂_j) + x̂_j), and nothing follows the aggregation; an entry node adds x_0,
    weighted by its in-edge, where `entry_shortcut` says that its static block has a shortcut.

    `router_reads`: whether routers see x_j ("feature") or activation(x_j) ("activation").

    A node may compute f_j(scale · x) from x and scale, (B,), more cheaply than from their product: with an attribute
    `takes_scale` that is true it is called as `node(x, scale=scale)` where it is an entry node, in training.

    `node_gates`: gates that close all in-edges of a block at once; None for none. In training a gated block computes for all
    samples, on what its in-edges bring, and its out-edges pass on those for which it is open.

    **Removal** (§3.3): a node without an open in-edge for a sample is *dead* for it: its out-edges are closed, with α = 0,
    and nothing reads what it computes. Input and output node always run; an output node without an open in-edge sums to 0.

    Maps (B, C_in, H_in, W_in) to (B, C, H, W).
    """

    def __init__(
        self,
        topology: Topology,
        weighting: Weighting,
        input: nn.Module,
        nodes: Sequence[nn.Module],
        activation: nn.Module,
        shortcut: str = "edge",
        entry_shortcut: bool = True,
        router_reads: str = "feature",
        node_gates: NodeGates | None = None,
    ) -> None:
        super().__init__()
        check_choice("shortcut", shortcut, ("edge", "node"))
        check_choice("router_reads", router_reads, ("feature", "activation"))
        if len(nodes) != topology.num_nodes - 2:
            raise UsageError(f"a topology of {topology.num_nodes} nodes has {topology.num_nodes - 2} blocks, got {len(nodes)}")
        self.topology = topology
        self.mask: Tensor
        # In the state dict, so that weights of one random graph are not loaded into another.
        self.register_buffer("mask", topology.mask.clone())
        self.shortcut = shortcut
        self.entry_shortcut = entry_shortcut
        self.router_reads = router_reads
        self.grad_checkpointing = False
        self.input = input
        self.nodes = nn.ModuleList(nodes)
        self.activation = activation
        self.weighting = weighting
        self.node_gates = node_gates
        # Set for the length of a `with` block by record.py; never buffers, they depend on the batch.
        self._records: list[Observer] = []
        self._imposed: Tensor | None = None
        # Computes the nodes in evaluation; see dgnet.inference.
        self._executor = DENSE

    @property
    def area(self) -> ValidArea | None:
        """Where the images of a padded batch lie; set for the length of a forward."""
        return self.weighting.area

    @area.setter
    def area(self, area: ValidArea | None) -> None:
        self.weighting.area = area
        if self.node_gates is not None:
            self.node_gates.area = area

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        mask = self.topology.mask  # the buffer may lie on the meta device
        stored = state_dict.setdefault(f"{prefix}mask", mask)  # weights of a static network bring none
        if stored.shape != mask.shape or not torch.equal(stored.cpu(), mask):
            error_messages = args[-1]
            error_messages.append(
                f"{prefix.removesuffix('.')} has other edges than this model's; build the model with the same topology and seed"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        executor = DENSE if self.training or x.is_meta else self._executor  # on the meta device no node is known to be dead
        if torch.compiler.is_compiling():
            executor = executor.in_graph
        return executor.forward(self, x)

    def compute_nodes(self, executor: Executor, x: Tensor) -> Tensor:
        """The stage's output, (B, C, H, W), from its raw input, node by node as `executor` says."""
        topology = self.topology
        sent = [executor.send(self, self.input(x))]  # what each node has distributed
        alive: list[Tensor | None] = [None]  # (B,) a node, bool, or 0 and 1 where gates train; None: alive for every sample
        ran: list[Tensor | None] = [None]  # as `alive`
        edges = executor.collect(self, x)  # α
        votes = executor.collect(self, x)  # what nodes say of the gates of others
        alpha_rows: list[Tensor] = []
        weight_rows: list[Tensor] = []
        needed = executor.find_needed(self, x)
        for node in range(1, topology.num_nodes):
            executor.predict(self, node - 1, sent[-1], edges, votes)
            alpha, weights, is_open = self._weigh(node, x, edges)
            senders = topology.senders(node)
            sender_is_alive = [alive[i] for i in senders]
            gate = self._decide(node, votes, sender_is_alive)
            passed = stack_alive(sender_is_alive)
            weights, is_open, is_alive = remove(weights, is_open, passed, gate)
            if self._records:
                alpha_rows.append(remove(alpha, None, passed)[0])
                weight_rows.append(weights)
            alive.append(is_alive)
            if needed is not None:
                is_alive = needed[:, node] if is_alive is None else is_alive & needed[:, node]
            ran.append(is_alive)
            sent.append(executor.run(self, node, x, [sent[i] for i in senders], weights, is_open, is_alive))
        for record in self._records:
            record.append(self, alpha_rows, weight_rows, ran[:-1])
        return sent[-1]

    def _predict(self, node: int, feature: Tensor, edges: Predicted, votes: Predicted, rows: Tensor | None = None) -> None:
        """Put what follows from the node's feature into `edges` (α of its free out-edges) and `votes`.

        `rows`: the samples that `feature` holds, (n,); None for all.
        """
        gates = self.node_gates
        is_heard = gates is not None and bool(gates.receivers(node))
        if self._imposed is not None or not (self.weighting.reads_features or is_heard):
            return
        if self.router_reads == "activation":
            feature = self.activation(feature.clone())  # a clone: timm's activations work in place
        if self.weighting.reads_features:
            edges.put(node, self.topology.free_receivers(node), self.weighting.predict(node, feature), rows)
        if gates is not None and is_heard:
            votes.put(node, gates.receivers(node), gates.predict(node, feature), rows)

    def _decide(self, node: int, votes: Predicted, sender_is_alive: list[Tensor | None]) -> Tensor | None:
        """Whether the gate of a block is open, (B,); None where it has none."""
        if self.node_gates is None or self._imposed is not None or node == self.topology.num_nodes - 1:
            return None
        return self.node_gates.decide(node, remove(votes.row(node), None, stack_alive(sender_is_alive))[0])

    def _weigh(self, node: int, x: Tensor, edges: Predicted) -> tuple[Tensor, Tensor, Tensor | None]:
        """α, weights and openness (None: all open) of the node's in-edges, each (B, E)."""
        senders = self.topology.senders(node)
        imposed = self.find_imposed(x)
        if imposed is not None:
            weights = imposed[:, node, list(senders)].to(x.device).expand(x.shape[0], -1)
            return weights, weights, weights != 0
        if node in self.topology.pinned:
            weights = x.new_full((x.shape[0], len(senders)), self.topology.pinned[node])
            return weights, weights, None
        # A share is not gathered from the senders: the compiler would index into the row for every element of the sum.
        is_read = self.weighting.reads_features
        alpha = edges.row(node) if is_read else self.weighting.share(node).expand(x.shape[0], -1)
        weights, is_open = self.weighting.gate(node, alpha)
        return alpha, weights, is_open

    def find_imposed(self, x: Tensor) -> Tensor | None:
        """Weights imposed on the edges in place of the stage's own, (1 or B, N, N).

        Raises UsageError where they are for another number of samples than `x` holds.
        """
        if self._imposed is not None and len(self._imposed) not in (1, x.shape[0]):
            raise UsageError(f"the imposed adjacency has {len(self._imposed)} samples, the batch {x.shape[0]}")
        return self._imposed

    def compute(self, node: int, weights: Tensor, is_open: Tensor | None, *sources: Tensor) -> Tensor:
        """Aggregate and transform: x_j, or the stage's output for the output node.

        `sources`: the features of the in-edges; for an entry node the raw stage input and x_0.
        """
        if node in self.topology.entry:
            return self._compute_entry(node, weights, is_open, *sources)
        return self.transform(node, aggregate(sources, weights, is_open))

    def transform(self, node: int, x: Tensor, is_activated: bool = False) -> Tensor:
        """x_j from x̂_j, (B, C, H, W), for a node that is no entry node; the stage's output for the output node.

        `is_activated`: the activation that follows the aggregation was applied to `x`.
        """
        is_output = node == self.topology.num_nodes - 1
        if self.shortcut == "edge" and not is_activated:
            x = self.activation(x)
        if is_output:
            return x
        y = self.nodes[node - 1](x)
        return y if self.shortcut == "edge" else self.activation(y + x)

    def _compute_entry(self, node: int, weights: Tensor, is_open: Tensor | None, raw: Tensor, projected: Tensor) -> Tensor:
        """x_j of an entry node, f_j(α · stage input)."""
        transform = self.nodes[node - 1]
        if self.training and getattr(transform, "takes_scale", False):
            y: Tensor = transform(raw, scale=weights[:, 0])
        else:
            y = transform(aggregate([raw], weights, is_open))
        return self.finish_entry(y, lambda: aggregate([projected], weights, is_open))

    def finish_entry(self, y: Tensor, shortcut: Callable[[], Tensor]) -> Tensor:
        """x_j of an entry node from f_j(x̂_j) and, where the block adds one, its weighted shortcut."""
        if self.shortcut == "edge":
            return y
        return self.activation(y + shortcut() if self.entry_shortcut else y)


class Predicted:
    """What nodes have predicted for their out-edges."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.columns: dict[tuple[int, int], Tensor] = {}

    def put(self, node: int, receivers: tuple[int, ...], values: Tensor, rows: Tensor | None = None) -> None:
        """`values`: (n, E), for the edges from `node` to `receivers`; of the samples `rows`, (n,), None for all."""
        for receiver, column in zip(receivers, values.unbind(1), strict=True):
            self.columns[node, receiver] = column

    def row(self, node: int) -> Tensor:
        """What was predicted for the in-edges of `node`, (B, E)."""
        return torch.stack([self.columns[i, node] for i in self.topology.senders(node)], dim=1)


class Executor:
    """How a stage computes its nodes: this one, every node on every sample. Others are in `dgnet.inference`."""

    @property
    def in_graph(self) -> Executor:
        """The form for a compiled or exported graph, where the host cannot look at values."""
        return self

    def forward(self, stage: DynamicGraph, x: Tensor) -> Tensor:
        """The stage's output, (B, C, H, W), from its raw input."""
        return stage.compute_nodes(self, x)

    def find_needed(self, stage: DynamicGraph, x: Tensor) -> Tensor | None:
        """For which samples each node matters to the output, (B, N); None where all do, or that is not known beforehand."""
        return None

    def collect(self, stage: DynamicGraph, x: Tensor) -> Predicted:
        """Where what nodes predict is put, for the raw stage input `x`."""
        return Predicted(stage.topology)

    def send(self, stage: DynamicGraph, feature: Tensor) -> Any:
        """What the input node distributes."""
        return feature

    def predict(self, stage: DynamicGraph, node: int, sent: Any, edges: Predicted, votes: Predicted) -> None:
        """Put what a node predicts from what it distributes into `edges` and `votes`."""
        stage._predict(node, sent, edges, votes)

    def run(
        self,
        stage: DynamicGraph,
        node: int,
        x: Tensor,
        senders: list[Any],
        weights: Tensor,
        is_open: Tensor | None,
        is_alive: Tensor | None,
    ) -> Any:
        """What a node distributes; the stage's output, (B, C, H, W), for the output node.

        `x`: raw stage input; `senders`: what the nodes of the in-edges distribute; `weights`, `is_open`: (B, E), the latter
        None for all open; `is_alive`: (B,), None for all.
        """
        sources = (x, *senders) if node in stage.topology.entry else tuple(senders)
        if stage.grad_checkpointing and stage.training and torch.is_grad_enabled():
            options: dict[str, Any] = {"use_reentrant": False}
            if not torch.compiler.is_compiling():  # there no such contexts are allowed
                options["context_fn"] = lambda: (nullcontext(), KeepStatistics(stage.nodes[node - 1 : node]))
            feature: Tensor = checkpoint(stage.compute, node, weights, is_open, *sources, **options)
            return feature
        return stage.compute(node, weights, is_open, *sources)


class KeepStatistics:
    """Inside the `with` block batch normalisations in `module` do not count the batch that passes: it passed before.

    It is entered once for each backward pass.
    """

    def __init__(self, module: nn.Module) -> None:
        self.norms = [child for child in module.modules() if isinstance(child, _BatchNorm)]
        self.before: list[tuple[float | None, Tensor | None]] = []

    def __enter__(self) -> None:
        self.before = [
            (norm.momentum, None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone())
            for norm in self.norms
        ]
        for norm in self.norms:
            norm.momentum = 0.0

    def __exit__(self, *error: object) -> None:
        for norm, (momentum, count) in zip(self.norms, self.before, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None and count is not None:
                norm.num_batches_tracked.copy_(count)


DENSE = Executor()


def stack_alive(senders: Sequence[Tensor | None]) -> Tensor | None:
    """Whether the senders of a node are alive, (B, E), from a (B,) for each, None for alive; None where all are."""
    given = [sender for sender in senders if sender is not None]
    if not given:
        return None
    ones = torch.ones_like(given[0])
    return torch.stack([ones if sender is None else sender for sender in senders], dim=1)


def remove(
    weights: Tensor, is_open: Tensor | None, passed: Tensor | None, gate: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Close what is not open, what leaves a dead node, and what enters a node whose gate is closed.

    `weights`, `is_open`: (B, E), None for all open; `passed`: whether the sending nodes are alive, (B, E), None for all;
    `gate`: whether the node's own gate is open, (B,), None for open.
    Returns the weights, 0 where closed; which edges are open, (B, E); whether the node is alive, (B,).

    Where gates train, `passed` and `gate` are 0 or 1 and pass gradients on: a closed edge's weight too is their product, and
    the in-edges of a closed gate stay, for a block to say what it would have brought.
    """
    if is_open is None and gate is None and passed is None:
        return weights, None, None
    if passed is None:
        passed = torch.ones_like(weights, dtype=torch.bool if gate is None else gate.dtype)
    if passed.is_floating_point():
        is_alive = (passed > 0.5 if is_open is None else is_open & (passed > 0.5)).any(1).to(passed.dtype)
        weights = weights * passed.to(weights.dtype)
        weights = weights if is_open is None else torch.where(is_open, weights, 0)
        return weights, is_open, is_alive if gate is None else is_alive * gate
    is_open = passed if is_open is None else is_open & passed
    is_open = is_open if gate is None else is_open & gate[:, None]
    return torch.where(is_open, weights, 0), is_open, is_open.any(1)
