"""Inference that runs a block only on the samples for which it is alive (§3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgnet.errors import UsageError, check_choice, check_range
from dgnet.graph import DynamicGraph, find_stages, remove
from dgnet.graph.aggregate import aggregate_rows
from dgnet.graph.stage import DENSE, Executor

MODES = ("dense", "sparse")

_TABLE_ELEMENTS = 32 * 1024
"""Elements of a sample's map up to which, on the CPU, one call that sums all samples pays for a copy of what it reads."""

_TABLE_BATCH = 4
"""Samples from which it does."""


def set_mode(model: nn.Module, mode: str) -> nn.Module:
    """Run the dynamic stages of `model`, in place, in evaluation as `mode` says; returns the model.

    "dense": every node runs on every sample, and what is closed weighs 0. "sparse": a node runs on the samples for which it is
    alive, and not at all where there are none; the output is the same to rounding. In both modes connectivity can be recorded
    (`record.ran` says which nodes ran) and imposed. Training is always dense.

    Raises UsageError for an unknown mode and for a model without dynamic stages.
    """
    check_choice("mode", mode, MODES)
    for stage in find_stages(model):
        stage._executor = _SPARSE if mode == "sparse" else DENSE
    return model


def can_skip(model: nn.Module) -> bool:
    """Whether some block of `model` may be left out: there are gates on blocks, or edges that close.

    Raises UsageError for a model without dynamic stages.
    """
    return any(stage.node_gates is not None or stage.weighting.threshold is not None for stage in find_stages(model))


def set_threshold_offset(model: nn.Module, offset: float) -> nn.Module:
    """Close edges under τ + `offset` and gates on blocks under ½ + `offset` in evaluation, in place; returns the model.

    Raises UsageError for a model in which nothing can close.
    """
    check_range("threshold offset", offset)
    if not can_skip(model):
        raise UsageError(f"{type(model).__name__} has no edge or block that can close: its weights do not follow the image")
    for stage in find_stages(model):
        for decider in (stage.weighting, stage.node_gates):
            if hasattr(decider, "offset"):
                decider.offset = offset  # type: ignore[union-attr]
    return model


@dataclass
class _Sent:
    """What a node has computed: for all samples (`rows` None), or for some, (n,), in ascending order."""

    feature: Tensor | None  # None: for no sample
    rows: Tensor | None = None
    places: Tensor | None = None  # (B,), where a sample lies in `feature`; 0 for those that are not there
    table: _Table | None = None  # holds `feature` too ...
    start: int = 0  # ... from this row on


class _Table:
    """What the nodes of a stage have computed, one below the other, so that one call sums all samples of a node.

    A row is a sample's map, flattened channels last: up to B · (N - 1) rows of C · H · W elements.
    """

    def __init__(self, stage: DynamicGraph, like: Tensor) -> None:
        self.content = like.new_empty(len(like) * (stage.topology.num_nodes - 1), like[0].numel())
        self.shape = like.shape[1:]
        self.filled = 0

    def put(self, sent: _Sent) -> _Sent:
        """Copy what a node has computed below the others."""
        if sent.feature is not None:
            sent.table, sent.start = self, self.filled
            self.filled += len(sent.feature)
            self.content[sent.start : self.filled] = sent.feature.permute(0, 2, 3, 1).flatten(1)
        return sent

    def sum(self, places: Tensor, weights: Tensor, is_open: Tensor | None) -> Tensor:
        """Σ_e weights_be · row places_be, (B, C, H, W), over the open edges; all (B, E), `is_open` None for all open."""
        if is_open is None:
            is_open = torch.ones_like(weights, dtype=torch.bool)
        counts = is_open.sum(1)
        starts = counts.cumsum(0) - counts  # where each sample's edges begin
        weights = weights[is_open].to(self.content.dtype)
        summed = F.embedding_bag(places[is_open], self.content, starts, mode="sum", per_sample_weights=weights)
        channels, height, width = self.shape
        return summed.view(-1, height, width, channels).permute(0, 3, 1, 2)


class SparseExecutor(Executor):
    """Each node on the samples for which it is alive.

    Where all weights are known beforehand (imposed, learned or fixed ones), nodes without an open path to the output node are
    left out too.
    """

    @property
    def in_graph(self) -> Executor:
        return _IN_GRAPH

    def find_needed(self, stage: DynamicGraph, x: Tensor) -> Tensor | None:
        return find_needed(stage, x)

    def send(self, stage: DynamicGraph, feature: Tensor) -> _Sent:
        sent = _Sent(feature)
        topology = stage.topology
        if not feature.is_cpu or feature.dtype != torch.float32 or len(feature) < _TABLE_BATCH:
            return sent
        if feature[0].numel() > _TABLE_ELEMENTS or all(node in topology.entry for node in topology.receivers(0)):
            return sent  # what nobody sums need not have the shape of the other nodes' features
        return _Table(stage, feature).put(sent)

    @torch.no_grad()
    def predict(
        self,
        stage: DynamicGraph,
        node: int,
        sent: _Sent,
        batch: int,
        edges: dict[tuple[int, int], Tensor],
        votes: dict[tuple[int, int], Tensor],
    ) -> None:
        if sent.feature is None:
            for known in (edges, votes):
                for column in list(known.values())[:1]:  # the input node's: it always runs
                    known |= {(node, receiver): torch.zeros_like(column) for receiver in stage.topology.receivers(node)}
            return
        own_edges: dict[tuple[int, int], Tensor] = {}
        own_votes: dict[tuple[int, int], Tensor] = {}
        stage._predict(node, sent.feature, own_edges, own_votes)
        for own, all_of_them in ((own_edges, edges), (own_votes, votes)):
            for edge, column in own.items():
                if sent.rows is not None:
                    column = column.new_zeros(batch).index_copy_(0, sent.rows, column)
                all_of_them[edge] = column

    @torch.no_grad()
    def run(
        self,
        stage: DynamicGraph,
        node: int,
        x: Tensor,
        senders: list[_Sent],
        weights: Tensor,
        is_open: Tensor | None,
        is_alive: Tensor | None,
    ) -> _Sent | Tensor:
        if node == stage.topology.num_nodes - 1:
            if all(sender.feature is None for sender in senders):  # the output node sums to 0
                entry = stage.topology.entry[0]
                shape = stage.nodes[entry - 1](x[:0]).shape  # a run on no samples: what no node has computed has no size yet
                return stage.transform(node, x.new_zeros(len(x), *shape[1:]))
            return stage.transform(node, gather(senders, weights, is_open, None))
        rows = None
        if is_alive is not None:
            rows = is_alive.nonzero().flatten()  # the host waits here: how many samples there are decides what is launched
            if len(rows) == 0:
                return _Sent(None, rows)
            if len(rows) == len(x):
                rows = None
        if node in stage.topology.entry:
            raw = gather([_Sent(x)], weights, is_open, rows)
            feature = stage.finish_entry(stage.nodes[node - 1](raw), lambda: gather(senders, weights, is_open, rows))
        else:
            feature = stage.transform(node, gather(senders, weights, is_open, rows))
        sent = _Sent(feature)
        if rows is not None:
            places = rows.new_zeros(len(x))
            places[rows] = torch.arange(len(rows), device=rows.device)
            sent = _Sent(feature, rows, places)
        table = next((sender.table for sender in senders if sender.table is not None), None)
        return sent if table is None else table.put(sent)


class GraphExecutor(Executor):
    """The sparse mode as one graph, which the host cannot look into.

    Exported, a node runs on the gathered samples for which it is alive, of which there may be none. Under `torch.compile` it is
    a branch, taken where it is alive for some sample: exact for one image, and for a batch what no image needs is left out.
    A feature holds all samples; what it holds where its node is dead nothing reads.
    """

    def find_needed(self, stage: DynamicGraph, x: Tensor) -> Tensor | None:
        return find_needed(stage, x)

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
        is_entry = node in stage.topology.entry
        if is_alive is None or node == stage.topology.num_nodes - 1:
            return super().run(stage, node, x, senders, weights, is_open, is_alive)
        sources = (x, *senders) if is_entry else tuple(senders)
        opens = torch.ones_like(weights, dtype=torch.bool) if is_open is None else is_open
        if torch.compiler.is_exporting():
            rows = is_alive.nonzero().squeeze(1)
            gathered = [source.index_select(0, rows) for source in sources]
            feature = stage.compute(node, weights[rows], opens[rows], *gathered)
            return feature.new_zeros(x.shape[0], *feature.shape[1:]).index_copy(0, rows, feature)
        # A node writes what its senders write; of an entry node a run on no samples tells, of which the graph keeps the shape.
        like = stage.nodes[node - 1](x[:0]) if is_entry else senders[0]
        shape, dtype = (x.shape[0], *like.shape[1:]), like.dtype

        def compute(weights: Tensor, opens: Tensor, *sources: Tensor) -> Tensor:
            return stage.compute(node, weights, opens, *sources).contiguous()

        def skip(weights: Tensor, opens: Tensor, *sources: Tensor) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=weights.device)

        return torch.cond(is_alive.any(), compute, skip, (weights, opens, *sources))


_SPARSE, _IN_GRAPH = SparseExecutor(), GraphExecutor()


def gather(senders: list[_Sent], weights: Tensor, is_open: Tensor | None, rows: Tensor | None) -> Tensor:
    """x̂_j for the samples in `rows`, (n,); None for all. `weights`, `is_open`: (B, E)."""
    there = [edge for edge, sender in enumerate(senders) if sender.feature is not None]
    if len(there) < len(senders):
        weights, is_open = weights[:, there], None if is_open is None else is_open[:, there]
        senders = [senders[edge] for edge in there]
    if rows is not None:
        weights, is_open = weights[rows], None if is_open is None else is_open[rows]
    features = [sender.feature for sender in senders if sender.feature is not None]
    table = senders[0].table
    if table is None and rows is None and all(sender.rows is None for sender in senders):
        return aggregate_rows(features, weights, is_open)
    own = torch.arange(len(weights), device=weights.device) if rows is None else rows
    places = [own if sender.places is None else sender.places[own] for sender in senders]
    if table is None:
        return aggregate_rows(features, weights, is_open, torch.stack(places))
    in_table = [sender.start + place for sender, place in zip(senders, places, strict=True)]
    return table.sum(torch.stack(in_table, dim=1), weights, is_open)


def find_needed(stage: DynamicGraph, x: Tensor) -> Tensor | None:
    """For which samples each node has an open path to the output node, (B, N); None where that is not known beforehand."""
    gates_follow = stage.node_gates is not None or stage.weighting.reads_features
    if stage._imposed is None and gates_follow:
        return None
    topology = stage.topology
    opens: dict[int, Tensor] = {}
    alive: list[Tensor | None] = [None]
    for node in range(1, topology.num_nodes):
        _, weights, is_open = stage._weigh(node, x, {})
        _, is_open, is_alive = remove(weights, is_open, [alive[i] for i in topology.senders(node)])
        alive.append(is_alive)
        if is_open is not None:
            opens[node] = is_open
    if not opens:
        return None  # nothing is closed
    needed = torch.zeros(x.shape[0], topology.num_nodes, dtype=torch.bool, device=x.device)
    needed[:, -1] = True
    for node in range(topology.num_nodes - 1, 0, -1):
        for edge, sender in enumerate(topology.senders(node)):
            needed[:, sender] |= needed[:, node] & opens[node][:, edge] if node in opens else needed[:, node]
    return needed
