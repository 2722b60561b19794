"""Dense inference in less memory: half way through a stage, its features give way to partial sums.

In a complete graph each feature is read until the end of the stage, so a dense walk holds all N of them. After node t this
walk sums what each later node reads of them, and writes these partial sums over the features. From then on a node reads its
partial sum and the features computed since. With t ≈ N / 2 about half of the features are held, and half of the reads go.

Letters: B batch, N nodes of a stage, E in-edges of a node, F features that are summed, R later nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dgnet.compat.torch import has_forward_hooks
from dgnet.graph import (
    DenseWalk,
    FixedWeighting,
    LearnedWeighting,
    LinearWeighting,
    RoutedWeighting,
    SignedWeighting,
    StageNodes,
    Topology,
    close_edges,
    find_stages,
    partial_sums,
    stack_alive,
)

LEAST_BYTES = 16 * 2**20
"""Of the features that give way. Fewer save no memory that matters, and cost a call."""


@dataclass(frozen=True)
class Plan:
    """When the features of a stage give way to partial sums, and to which."""

    after: int  # the last node whose feature is summed
    features: tuple[int, ...]  # F nodes, those that later nodes still read
    receivers: tuple[int, ...]  # R nodes, those that read them


_WEIGHTINGS = (FixedWeighting, LearnedWeighting, RoutedWeighting, SignedWeighting, LinearWeighting)
"""Weightings that know the weight of an edge, and whether it is open, as soon as its sender has run."""


def use_partial_sums(network: nn.Module) -> bool:
    """Let the stages of `network` keep partial sums in dense evaluation, where that saves memory. In place.

    A stage with hooks keeps its features, as a hook may read them. Returns whether any stage keeps partial sums.
    """
    found = False
    for stage in find_stages(network):
        # Exact types: a class of the user's own may compare in-edges with each other.
        is_possible = type(stage.weighting) in _WEIGHTINGS and stage.weighting.edge_weights == 1
        plan = find_plan(stage.topology) if is_possible and not has_forward_hooks(stage) else None
        if plan is not None:
            stage.inference_walk = PartialSumWalk.along(plan)
            found = True
    return found


def find_plan(topology: Topology) -> Plan | None:
    """The plan with which the fewest features and partial sums are held at a time; None if no plan saves any."""
    output = topology.output
    last_read = [max(topology.receivers(node)) for node in range(output)]

    def features_held(node: int, since: int = -1) -> int:
        """Features after node `since` that lie in memory while `node` runs."""
        return sum(last_read[i] >= node for i in range(since + 1, node))

    best, fewest = None, max(features_held(node) for node in range(1, output + 1))
    for after in range(max(topology.entry, default=0), output - 1):
        summed = tuple(i for i in range(after + 1) if last_read[i] > after)
        receivers = tuple(j for j in range(after + 1, output + 1) if set(topology.senders(j)) & set(summed))
        if len(receivers) > len(summed):
            continue
        before = max(features_held(node) for node in range(1, after + 2))
        behind = max(sum(j >= node for j in receivers) + features_held(node, after) for node in range(after + 1, output + 1))
        if max(before, behind) < fewest:
            best, fewest = Plan(after, summed, receivers), max(before, behind)
    return best


class PartialSumWalk(DenseWalk):
    """A dense walk whose features give way to partial sums half way through the stage."""

    plan: Plan

    @classmethod
    def along(cls, plan: Plan) -> type[PartialSumWalk]:
        """The class of walks that follow `plan`."""
        return type(cls.__name__, (cls,), {"plan": plan})

    def __init__(self, stage: StageNodes, x: Tensor, gates: Tensor | None = None) -> None:
        super().__init__(stage, x, gates)
        self.sums: dict[int, Tensor] = {}  # receiver -> its partial sum

    def put(self, node: int, feature: Any) -> None:
        super().put(node, feature)
        if node == self.plan.after:
            features = [self.features[i] for i in self.plan.features]
            size = sum(feature.numel() * feature.element_size() for feature in features)
            if size >= LEAST_BYTES and len({feature.dtype for feature in features}) == 1:  # autocast may mix dtypes
                self.sum_features(features)

    def sum_features(self, features: list[Tensor]) -> None:
        """Replace the features by the partial sums of the later nodes."""
        if self.plan.features[0] == 0 and next(self.stage.input.parameters(), None) is None:
            features[0] = features[0].clone()  # it may be the raw stage input, which others may read later
        rows, opens = [], []
        for receiver in self.plan.receivers:
            senders = self.known_senders(receiver)
            _, weights, is_open = self.weigh(receiver, None)
            is_alive = stack_alive([self.alive[i] for i in senders])
            opened = None if is_open is None else is_open[:, : len(senders)]
            weights, opened, _ = close_edges(weights[:, : len(senders)], opened, is_alive)
            if opened is None:
                opened = torch.ones_like(weights, dtype=torch.bool)
            rows.append(_spread(weights, senders, self.plan.features))
            opens.append(_spread(opened, senders, self.plan.features))
        sums = partial_sums(features, torch.stack(rows, 1), torch.stack(opens, 1))
        self.sums = dict(zip(self.plan.receivers, sums, strict=True))
        self.features[: self.plan.after + 1] = [None] * (self.plan.after + 1)

    def known_senders(self, node: int) -> tuple[int, ...]:
        """The senders of `node` whose features are summed, ascending: its first in-edges."""
        return tuple(i for i in self.topology.senders(node) if i <= self.plan.after)

    def row(self, predictions: Any, node: int, senders: tuple[int, ...]) -> Tensor:
        like = next(column for (_, receiver), column in predictions.items() if receiver == node)
        # What is predicted later is 0 for now; the weights of these edges are not used yet.
        return torch.stack([predictions.get((i, node), torch.zeros_like(like)) for i in senders], dim=1)

    def run(self, node: int, weights: Tensor, is_open: Tensor | None, runs: Tensor | None) -> Any:
        if node in self.sums:
            number = len(self.known_senders(node))
            weights = torch.cat([torch.ones_like(weights[:, :1]), weights[:, number:]], 1)
            if is_open is not None:
                is_open = torch.cat([torch.ones_like(is_open[:, :1]), is_open[:, number:]], 1)
        return super().run(node, weights, is_open, runs)

    def sources(self, node: int) -> tuple[Any, ...]:
        if node not in self.sums:
            return super().sources(node)
        since = [i for i in self.topology.senders(node) if i > self.plan.after]
        return (self.sums.pop(node), *(self.features[i] for i in since))


def _spread(values: Tensor, senders: Sequence[int], nodes: Sequence[int]) -> Tensor:
    """Values of the edges from `senders`, (B, E), for all `nodes`, (B, F): 0 or False for those that are no senders."""
    column = dict(zip(senders, values.unbind(1), strict=True))
    empty = torch.zeros_like(values[:, 0])
    return torch.stack([column.get(node, empty) for node in nodes], 1)
