"""The dense walk of inference, which holds few features: half way through a stage they are folded into partial sums.

A feature is needed until the last node that reads it, which in a complete graph is the output node: to hold all features of a
stage takes as many maps as it has nodes. From the middle on it takes fewer maps to hold Σ_i α_ij x_i over the features so far,
one for each node that is still to come.

Letters: B batch, N nodes of a stage, E in-edges of a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dgnet.graph._edge_weights import split_ways
from dgnet.graph._gating import close_edges, stack_alive
from dgnet.graph._nodes import StageNodes
from dgnet.graph._walk import DenseWalk


class FoldingWalk(DenseWalk):
    """A dense walk that drops features as soon as it can. Its twin is `DenseWalk`, which computes the same.

    It folds if no gradients are asked for, and if the weights of a node's in-edges do not depend on each other. Partial sums
    are in float32. So features in half precision are folded only by the compiler, which sums both kinds of numbers in one pass.
    """

    def __init__(self, stage: StageNodes, x: Tensor) -> None:
        super().__init__(stage, x)
        nodes = self.topology.num_nodes
        can_fold = not (torch.is_grad_enabled() or torch.compiler.is_exporting() or stage.weighting.couples_edges)
        # The node before which features are folded.
        self.middle = (nodes + 1) // 2 if can_fold else nodes
        self.dtype = torch.float32  # of features
        # Of a later node: its sums over the folded features, one, or one for each way.
        self.partial: dict[int, list[Tensor]] = {}

    def put(self, node: int, feature: Any) -> None:
        super().put(node, feature)
        self.dtype = feature.dtype
        nodes = self.topology.num_nodes
        if node == 0 and self.middle < nodes and self.dtype.itemsize < 4:
            self.middle = (2 * nodes + 2) // 3 if torch.compiler.is_compiling() else nodes  # a sum is as large as two features

    def compute(self, node: int) -> Any:
        if node == self.middle:
            self._fold()
        feature = super().compute(node)
        self._drop(node + 1)
        return feature

    def _drop(self, node: int) -> None:
        """Drop the features that no node from `node` on reads."""
        if torch.is_grad_enabled():
            return
        for sender in range(min(node, len(self.features))):
            readers = self.topology.receivers(sender)
            if all(reader < node or (reader in self.partial and sender < self.middle) for reader in readers):
                self.features[sender] = None

    def _fold(self) -> None:
        """Replace the features so far by partial sums, if these are fewer."""
        topology = self.topology
        later = [node for node in range(self.middle, topology.num_nodes) if node not in topology.entry]
        edges = {node: [e for e, i in enumerate(topology.senders(node)) if i < self.middle] for node in later}
        kept = {i for node in topology.entry if node >= self.middle for i in topology.senders(node)}
        freed = [i for i, feature in enumerate(self.features) if feature is not None and i not in kept]
        later = [node for node in later if edges[node]]
        if len(later) * max(4 // self.dtype.itemsize, 1) > len(freed):
            self.middle = topology.num_nodes
            return
        for node in later:
            self.partial[node] = self._sum_so_far(node, edges[node])
        self._drop(self.middle)

    def _sum_so_far(self, node: int, edges: Sequence[int]) -> list[Tensor]:
        """The sums of a node over its in-edges `edges`, whose senders have run; the gate of the node is not known yet."""
        senders = self.topology.senders(node)
        sender_is_alive = stack_alive([self.alive[i] if i < self.middle else None for i in senders])
        _, weights, is_open = self.weigh(node, sender_is_alive)
        weights, is_open, _ = close_edges(weights, is_open, sender_is_alive)
        opened = None if is_open is None else is_open[:, edges]
        first, *rest = (self.features[senders[edge]] for edge in edges)
        features = [first.to(torch.promote_types(self.dtype, torch.float32)), *rest]  # a sum is of its first term's dtype
        own, passed = split_ways(weights, self.stage.weighting.two_way)
        return [self.stage.sum(features, way[:, edges], opened) for way in ((own,) if own is passed else (own, passed))]

    def run(self, node: int, weights: Tensor, is_open: Tensor | None, runs: Tensor | None) -> Any:
        if node not in self.partial:
            return super().run(node, weights, is_open, runs)
        senders = self.topology.senders(node)
        recent = [edge for edge, sender in enumerate(senders) if sender >= self.middle]
        features = [self.features[senders[edge]] for edge in recent]
        # The partial sum is one more sender. It counts unless the node is dead: its gate may be closed.
        counts = weights.new_ones(len(weights), dtype=torch.bool) if runs is None else runs
        opened = None
        if runs is not None or is_open is not None:
            whole = weights.new_ones(weights.shape[:2], dtype=torch.bool) if is_open is None else is_open
            opened = torch.cat([counts[:, None], whole[:, recent]], dim=1)
        ways = split_ways(weights, self.stage.weighting.two_way)
        sums = []
        for way, partial in zip(ways, self.partial.pop(node), strict=False):
            lead = counts.to(way.dtype).reshape(-1, 1, *[1] * (way.ndim - 2)).expand(-1, 1, *way.shape[2:])
            summed = self.stage.sum([partial, *features], torch.cat([lead, way[:, recent]], dim=1), opened)
            sums.append(summed.to(self.dtype))
        if node == self.topology.output:
            return self.stage.transform(node, sums[-1], further=self.further)
        return self.stage.transform(node, sums[0], further=self.further, passed=sums[-1])

    def row(self, predictions: Any, node: int, senders: tuple[int, ...]) -> Tensor:
        # Of senders that have not run yet: any value.
        known = next(predictions[i, node] for i in senders if (i, node) in predictions)
        empty = torch.zeros_like(known)
        return torch.stack([predictions.get((i, node), empty) for i in senders], dim=1)
