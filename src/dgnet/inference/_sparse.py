"""Inference that runs a block only on the samples for which it is alive (§3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dgnet.errors import UsageError, check_choice, check_range
from dgnet.graph import DynamicGraph, find_stages, remove, require_stages
from dgnet.graph._aggregate import aggregate_rows
from dgnet.graph._stage import DENSE, Executor, Predicted, stack_alive
from dgnet.graph._topology import Topology

MODES = ("dense", "sparse")


def set_mode(model: nn.Module, mode: str) -> nn.Module:
    """Run the dynamic stages of `model`, in place, in evaluation as `mode` says; returns the model.

    "dense": every node runs on every sample, and what is closed weighs 0. "sparse": a node runs on the samples for which it is
    alive, and not at all where there are none; the output is the same to rounding. In both modes connectivity can be recorded
    (`record.ran` says which nodes ran) and imposed. Training is always dense.

    A model without dynamic stages has the mode "dense" only. Raises UsageError for another.
    """
    check_choice("mode", mode, MODES)
    for stage in require_stages(model) if mode == "sparse" else find_stages(model):
        stage._executor = _SPARSE if mode == "sparse" else DENSE
    return model


def can_skip(model: nn.Module) -> bool:
    """Whether some block of `model` may be left out: there are gates on blocks, or edges that close.

    Raises UsageError for a model without dynamic stages.
    """
    return any(stage.node_gates is not None or stage.weighting.threshold is not None for stage in require_stages(model))


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


def find_threshold_offset(model: nn.Module) -> float:
    """The offset that `set_threshold_offset` or the model's options set; 0 where nothing can close."""
    deciders = [decider for stage in find_stages(model) for decider in (stage.weighting, stage.node_gates)]
    return next((float(decider.offset) for decider in deciders if hasattr(decider, "offset")), 0.0)  # type: ignore[union-attr, arg-type]


@dataclass
class _Sent:
    """What a node has computed: for all samples (`rows` None), or for some, (n,), in ascending order."""

    feature: Tensor | None  # None: for no sample
    rows: Tensor | None
    held: _Held


class _Held:
    """Where each sample lies in what the nodes of a stage have computed."""

    def __init__(self, topology: Topology, feature: Tensor) -> None:
        self.topology = topology
        # (B, N): a sample's row in the node's feature; any row where the node did not run.
        self.places = torch.arange(len(feature), device=feature.device)[:, None].repeat(1, topology.num_nodes)

    def put(self, node: int, feature: Tensor, rows: Tensor | None) -> _Sent:
        """Take in what a node has computed for the samples in `rows`, None for all."""
        if rows is not None:
            self.places[:, node].zero_().index_copy_(0, rows, torch.arange(len(rows), device=rows.device))
        return _Sent(feature, rows, self)

    def sum(self, node: int, senders: list[_Sent], weights: Tensor, is_open: Tensor | None, rows: Tensor | None) -> Tensor:
        """x̂_j for the samples in `rows`, (n,), None for all. `weights`, `is_open` (None: all open): (B, E)."""
        if rows is None and all(sender.rows is None and sender.feature is not None for sender in senders):
            return aggregate_rows([sender.feature for sender in senders if sender.feature is not None], weights, is_open)
        places = self.places[:, _span(self.topology.senders(node))]
        if rows is not None:
            weights, is_open, places = weights[rows], None if is_open is None else is_open[rows], places[rows]
        there = [edge for edge, sender in enumerate(senders) if sender.feature is not None]
        features = [sender.feature for sender in senders if sender.feature is not None]
        return aggregate_rows(
            features, weights[:, there], None if is_open is None else is_open[:, there], places[:, there].t().contiguous()
        )


class _PredictedRows(Predicted):
    """What nodes have predicted for the samples for which they ran; 0 for the others."""

    def __init__(self, topology: Topology, x: Tensor) -> None:
        self.topology = topology
        dtype = torch.promote_types(x.dtype, torch.float32)
        self.values = x.new_zeros(topology.num_nodes, len(x), topology.num_nodes, dtype=dtype)  # sender, sample, receiver

    def put(self, node: int, receivers: tuple[int, ...], values: Tensor, rows: Tensor | None = None) -> None:
        span = _span(receivers)
        samples = slice(None) if rows is None else rows if isinstance(span, slice) else rows[:, None]
        self.values[node][samples, span] = values.to(self.values.dtype)

    def row(self, node: int) -> Tensor:
        return self.values[_span(self.topology.senders(node)), :, node].t()


def _span(nodes: tuple[int, ...]) -> slice | list[int]:
    """An index of ascending nodes: a slice, which copies nothing, where they follow each other."""
    if nodes and nodes[-1] - nodes[0] == len(nodes) - 1:
        return slice(nodes[0], nodes[-1] + 1)
    return list(nodes)


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

    def collect(self, stage: DynamicGraph, x: Tensor) -> Predicted:
        return _PredictedRows(stage.topology, x)

    def send(self, stage: DynamicGraph, feature: Tensor) -> _Sent:
        return _Held(stage.topology, feature).put(0, feature, None)

    @torch.no_grad()
    def predict(self, stage: DynamicGraph, node: int, sent: _Sent, edges: Predicted, votes: Predicted) -> None:
        if sent.feature is not None:
            _note_rows(stage, sent.rows)
            stage._predict(node, sent.feature, edges, votes, sent.rows)

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
        held = senders[0].held
        if node == stage.topology.num_nodes - 1:
            _note_rows(stage, None)
            if all(sender.feature is None for sender in senders):  # the output node sums to 0
                return stage.transform(node, sum_nothing(stage, x))
            return stage.transform(node, held.sum(node, senders, weights, is_open, None))
        rows = None
        if is_alive is not None:
            rows = is_alive.nonzero().flatten()  # the host waits here: how many samples there are decides what is launched
            if len(rows) == 0:
                return _Sent(None, rows, held)
            if len(rows) == len(x):
                rows = None
        _note_rows(stage, rows)
        if node in stage.topology.entry:
            some = (weights, is_open) if rows is None else (weights[rows], None if is_open is None else is_open[rows])
            raw = aggregate_rows([x], *some, None if rows is None else rows[None])
            feature = stage.finish_entry(stage.nodes[node - 1](raw), lambda: held.sum(node, senders, weights, is_open, rows))
        else:
            feature = stage.transform(node, held.sum(node, senders, weights, is_open, rows))
        return held.put(node, feature, rows)


def sum_nothing(stage: DynamicGraph, x: Tensor) -> Tensor:
    """x̂ of the output node where it has no open in-edge for any sample: zeros, (B, C, H, W), for the raw stage input `x`."""
    _note_rows(stage, torch.empty(0, dtype=torch.long, device=x.device))
    # A run on no samples: what no node has computed has no size yet.
    entry = stage.topology.entry
    shape = stage.nodes[entry[0] - 1](x[:0]).shape if entry else stage.input(x[:0]).shape
    _note_rows(stage, None)
    return x.new_zeros(len(x), *shape[1:])


def _note_rows(stage: DynamicGraph, rows: Tensor | None) -> None:
    """What follows is computed on the samples in `rows`, (n,); None for all."""
    if stage.area is not None:
        stage.area.rows = rows


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
            return stage.compute(node, weights, opens, *sources).clone(memory_format=torch.channels_last)

        def skip(weights: Tensor, opens: Tensor, *sources: Tensor) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=weights.device).clone(memory_format=torch.channels_last)

        # Both branches write channels last, in which convolutions are fastest.
        return torch.cond(is_alive.any(), compute, skip, (weights, opens, *sources))


_SPARSE, _IN_GRAPH = SparseExecutor(), GraphExecutor()


def find_needed(stage: DynamicGraph, x: Tensor) -> Tensor | None:
    """For which samples each node has an open path to the output node, (B, N); None where that is not known beforehand."""
    gates_follow = stage.node_gates is not None or stage.weighting.reads_features
    if stage._imposed is None and gates_follow:
        return None
    topology = stage.topology
    opens: dict[int, Tensor] = {}
    alive: list[Tensor | None] = [None]
    for node in range(1, topology.num_nodes):
        _, weights, is_open = stage._weigh(node, x, Predicted(topology))
        _, is_open, is_alive = remove(weights, is_open, stack_alive([alive[i] for i in topology.senders(node)]))
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
