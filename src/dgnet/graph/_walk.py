"""The state of one forward pass through a stage, and the dense walk: every node on every sample.

Letters: B batch, N nodes of a stage, E in-edges of a node, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dgnet.errors import UsageError
from dgnet.graph._gating import close_edges, find_needed, stack_alive
from dgnet.graph._layout import to_map
from dgnet.graph._nodes import NOTHING, StageNodes
from dgnet.graph._pooling import current_area, use_area
from dgnet.graph._recompute import compute_checkpointed
from dgnet.graph._sharing import Sharing
from dgnet.graph._wiring import Wiring, imposed_on, observers_of


class Walk:
    """One forward pass through a stage, node by node. It holds all state of the pass, so that a stage can run in many threads.

    `x`: the raw stage input, (B, C_in, H_in, W_in). The stage calls `put` with the input node's feature, then `compute` and
    `put` for each node of `blocks`, then `finish`. `further`: what the blocks are called with besides their feature. `gates`:
    which blocks run, (B, N - 2), 0 or 1, for a stage that `takes_gates`; imposed weights replace them.

    Raises UsageError if the imposed matrix is for another number of samples than `x` has, and for gates that do not fit.
    """

    further = NOTHING

    def __init__(self, stage: StageNodes, x: Tensor, gates: Tensor | None = None) -> None:
        self.stage, self.topology, self.x, self.gates = stage, stage.topology, x, gates
        self.observers = observers_of(stage)
        self.imposed = imposed_on(stage)  # weights instead of the stage's own, (1 or B, N, N)
        if self.imposed is not None and len(self.imposed) not in (1, x.shape[0]):
            raise UsageError(f"the imposed adjacency has {len(self.imposed)} samples, the batch {x.shape[0]}")
        if (gates is not None) != stage.takes_gates and self.imposed is None:
            raise UsageError(
                "this stage is given its gates: call stage(x, gates)" if gates is None else "this stage takes no gates"
            )
        if gates is not None and (gates.shape[0] != x.shape[0] or gates.shape[1:] != (len(self.topology.blocks),)):
            raise UsageError(f"gates are (B, {len(self.topology.blocks)}), one for each block, got {tuple(gates.shape)}")

    @classmethod
    def in_graph(cls) -> type[Walk]:
        """The class of walks to use in a compiled or exported graph, where Python cannot read values."""
        return cls

    @property
    def blocks(self) -> Sequence[int]:
        """The nodes to `compute`, in order."""
        return self.topology.blocks

    def put(self, node: int, feature: Any) -> None:
        """Distribute the feature that a node has computed, and predict the weights of its out-edges from it (Eq. 4)."""
        raise NotImplementedError

    def compute(self, node: int) -> Any:
        """The feature of a node: close in-edges (Eq. 5), aggregate over the open ones, and transform the sum (Eq. 3)."""
        raise NotImplementedError

    def finish(self) -> Tensor:
        """Compute the output node, report to the observers, and return the stage's output, (B, C, H, W)."""
        raise NotImplementedError

    def report(self, wiring: Wiring) -> None:
        """Report to the observers how this pass wired the stage."""
        for index, observer in self.observers:
            observer.observe(index, wiring)


@dataclass(frozen=True)
class Needs:
    """What a forward pass must predict. `alpha`: whether routers run; `gates`: whether block gates decide.

    With imposed weights neither is needed.
    """

    alpha: bool
    gates: bool

    @classmethod
    def of(cls, stage: StageNodes, imposed: Tensor | None) -> Needs:
        """What a pass through `stage` must predict; `imposed`: the weights imposed on it, or None."""
        is_free = imposed is None
        return cls(alpha=is_free and stage.weighting.reads_features, gates=is_free and stage.has_gates)

    @property
    def are_weights_known(self) -> bool:
        """Whether all weights are known before the pass. Then nodes without an open path to the output node can be skipped."""
        return not (self.alpha or self.gates)


class DenseWalk(Walk):
    """Every node runs on every sample; a closed edge weighs 0.

    **Removal** (§3.3): a node without an open in-edge for a sample is *dead* for it. Its out-edges are closed, with α = 0, and
    nothing reads its feature. Input and output node always run; the sum of an output node without an open in-edge is 0.

    While gates train, a gated block runs on all samples. Its out-edges are closed for the samples for which its gate is closed.
    """

    skips_nodes = False
    """Whether a node is skipped for samples that do not need it."""

    def __init__(self, stage: StageNodes, x: Tensor, gates: Tensor | None = None) -> None:
        super().__init__(stage, x, gates)
        self.area = current_area()
        self.needs = Needs.of(stage, self.imposed)
        self.features: list[Any] = []  # x_i of each node
        self.sharing = Sharing()
        self.alive: list[Tensor | None] = [None]  # of each node, (B,): bool, or 0 and 1 while gates train; None: all samples
        self.ran: list[Tensor | None] = [None]  # as `alive`
        self.alpha = self.new_predictions(stage.weighting.edge_weights)  # α of each edge
        self.votes = self.new_predictions()  # of each edge, what the sender adds to the logit of the receiver's gate
        self.alpha_rows: list[Tensor] = []
        self.weight_rows: list[Tensor] = []
        self.needed = self.find_needed() if self.skips_nodes and self.needs.are_weights_known else None

    def put(self, node: int, feature: Any) -> None:
        self.features.append(feature)
        if feature is not None:
            self.predict(node, feature)

    def compute(self, node: int) -> Any:
        sender_is_alive = stack_alive([self.alive[i] for i in self.topology.senders(node)])
        alpha, weights, is_open = self.weigh(node, sender_is_alive)
        weights, is_open, is_alive = close_edges(weights, is_open, sender_is_alive, self.decide(node))
        if self.observers:
            self.alpha_rows.append(close_edges(alpha, None, sender_is_alive)[0])
            self.weight_rows.append(weights)
        self.alive.append(is_alive)
        runs = is_alive
        if self.needed is not None:
            runs = self.needed[:, node] if is_alive is None else is_alive & self.needed[:, node]
        self.ran.append(runs)
        return self.run(node, weights, is_open, runs)

    def finish(self) -> Tensor:
        output: Tensor = self.compute(self.topology.output)
        if self.observers:
            self.report(Wiring(self.topology, self.alpha_rows, self.weight_rows, self.ran[:-1]))
        return output

    def predict(self, node: int, feature: Tensor) -> None:
        """Store what a node predicts for its out-edges from its feature: α (Eq. 4), and its votes for block gates."""
        stage, gates = self.stage, self.stage.node_gates
        gated = gates.receivers(node) if gates is not None and (self.needs.gates or gates.serves_others) else ()
        if not (self.needs.alpha or gated):
            return
        if stage.router_reads == "activation":
            feature = stage.activation(feature.clone())  # a clone: timm's activations work in place
        feature = to_map(feature, stage.layout)
        # Tokens are in no area of the image. (Compiled code cannot set an area: where there is none, nothing is set.)
        with use_area(None) if stage.layout == "NLC" and self.area is not None else nullcontext():
            if self.needs.alpha:
                self.keep(self.alpha, node, self.topology.free_receivers(node), stage.weighting.predict(node, feature))
            if gates is not None and gated:
                self.keep(self.votes, node, gated, gates.predict(node, feature))

    def weigh(self, node: int, sender_is_alive: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """α, weights and openness (None: all open) of the node's in-edges, each (B, E), as if all senders were alive.

        `sender_is_alive`, (B, E), matters only for a weighting whose edges depend on each other: α of a dead sender is 0.
        """
        batch, senders, weighting = self.x.shape[0], self.topology.senders(node), self.stage.weighting
        if self.imposed is not None:
            weights = self.imposed[:, node, list(senders)].to(self.x.device)
            weights = weights.expand(batch, *weights.shape[1:])
            return weights, weights, weights != 0 if weights.ndim == 2 else (weights != 0).any(2)
        if node in self.topology.pinned:
            dtype = torch.promote_types(self.x.dtype, torch.float32)  # as of other weights
            weights = self.x.new_full((batch, len(senders)), self.topology.pinned[node], dtype=dtype)
            return weights, weights, None
        # Shared α is not collected edge by edge: the compiler would index into the row for every element of the sum.
        alpha = self.row(self.alpha, node, senders) if self.needs.alpha else self.share(weighting.shared_alpha(node))
        if weighting.couples_edges:
            alpha = close_edges(alpha, None, sender_is_alive)[0]
        return alpha, weighting.weigh(node, alpha), weighting.find_open(node, alpha, self.stage.threshold_offset)

    def share(self, alpha: Tensor) -> Tensor:
        """α that is the same for all samples, (E,) or (E, k), with B first."""
        return alpha.expand(self.x.shape[0], *alpha.shape)

    def decide(self, node: int) -> Tensor | None:
        """Whether the gate of a block is open, (B,); None if it has none."""
        if not self.needs.gates or node == self.topology.output:
            return None
        if self.gates is not None:
            gate = self.gates[:, node - 1]
            return gate.to(torch.promote_types(self.x.dtype, torch.float32)) if self.stage.training else gate > 0.5
        gates = self.stage.node_gates
        assert gates is not None
        senders = gates.senders(node)
        votes = close_edges(self.row(self.votes, node, senders), None, stack_alive([self.alive[i] for i in senders]))[0]
        return gates.decide(node, votes, self.stage.threshold_offset)

    def find_needed(self) -> Tensor | None:
        """For which samples each node has an open path to the output node, (B, N), from known weights; None for all."""
        opened: dict[int, Tensor] = {}
        alive: list[Tensor | None] = [None]
        for node in range(1, self.topology.num_nodes):
            sender_is_alive = stack_alive([alive[i] for i in self.topology.senders(node)])
            _, weights, is_open = self.weigh(node, sender_is_alive)
            _, is_open, is_alive = close_edges(weights, is_open, sender_is_alive)
            alive.append(is_alive)
            if is_open is not None:
                opened[node] = is_open
        return find_needed(self.topology, opened)

    def run(self, node: int, weights: Tensor, is_open: Tensor | None, runs: Tensor | None) -> Any:
        """The feature that a node distributes; for the output node the stage's output, (B, C, H, W).

        `weights`, `is_open` (None: all open): (B, E); `runs`: for which samples it must run, (B,), None: all.
        """
        sources = self.sources(node)
        if self.stage.grad_checkpointing and self.stage.training and torch.is_grad_enabled():
            return compute_checkpointed(self.stage, node, weights, is_open, *sources, further=self.further)
        return self.stage.compute(node, weights, is_open, *sources, further=self.further, sharing=self.sharing)

    def sources(self, node: int) -> tuple[Any, ...]:
        """What a node reads: the features of its senders; for an entry node, the raw stage input before them."""
        senders = tuple(self.features[i] for i in self.topology.senders(node))
        return (self.x, *senders) if node in self.topology.entry else senders

    # How predictions are stored. A walk whose nodes run on some of the samples stores them in another form.

    def new_predictions(self, numbers: int = 1) -> Any:
        """Storage for some `numbers` for each sample and edge."""
        return {}

    def keep(self, predictions: Any, node: int, receivers: tuple[int, ...], values: Tensor) -> None:
        """Store `values`, (B, E) or (B, E, k), which were predicted at `node` for `receivers`."""
        for receiver, column in zip(receivers, values.unbind(1), strict=True):
            predictions[node, receiver] = column

    def row(self, predictions: Any, node: int, senders: tuple[int, ...]) -> Tensor:
        """What `senders` predicted for `node`, (B, E) or (B, E, k)."""
        return torch.stack([predictions[i, node] for i in senders], dim=1)
