"""Parameters and multiply-adds of a network: in total (Table 1), for each node, and for each sample."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dgnet._work import StageWork, measure_work
from dgnet.graph import DynamicGraph, Record, Topology


@dataclass(frozen=True)
class Cost:
    """The cost of one image with every edge open."""

    params: int  # all parameters, routers and thresholds included
    multiply_adds: int  # of convolutions outside routers: what Table 1 counts
    linear_multiply_adds: int  # of linear layers, attention and other matrix products outside routers
    router_multiply_adds: int  # of the linear layers and convolutions of routers and block gates
    aggregation_multiply_adds: int  # one for each element of each edge's feature
    activations: int  # elements of the outputs of convolutions outside routers


@dataclass(frozen=True)
class StageCost:
    """Multiply-adds of one stage on one image. The lists have one entry for each of its N nodes."""

    topology: Topology
    nodes: list[int]  # of the node's own module, if it runs; the input node's projection; 0 for the output node
    routers: list[int]  # of router and gate weights, if the sending node runs
    edges: list[int]  # of each open in-edge of the receiving node
    always: tuple[int, ...]  # nodes that run for every image, whatever routers and gates decide

    @property
    def dense(self) -> int:
        """With every node alive and every edge open."""
        return self._with(range(self.topology.num_nodes))

    @property
    def least(self) -> int:
        """With every block dead that can be: what always runs, and the cheapest path from the input node to the output node.

        If input and output node have an edge, that is the path. All edges between these nodes are open.
        """
        always, topology = self.always, self.topology
        cheapest: list[tuple[int, tuple[int, ...]]] = [(0, (0,))]  # to each node: what it costs besides, and the path
        for node in range(1, topology.num_nodes):
            own = 0
            if node not in always:  # the node, and its edges from and to the nodes that always run
                own = self.nodes[node] + self.routers[node]
                own += self.edges[node] * sum(sender in always for sender in topology.senders(node))
                own += sum(self.edges[receiver] for receiver in topology.receivers(node) if receiver in always)
            before, path = min(
                (cheapest[sender][0] + self.edges[node] * (sender not in always and node not in always), cheapest[sender][1])
                for sender in topology.senders(node)
            )
            cheapest.append((before + own, (*path, node)))
        return self._with({*always, *cheapest[-1][1]})

    def _with(self, alive: Collection[int]) -> int:
        """With these nodes alive, and every edge between them open."""
        ran = torch.zeros(1, self.topology.num_nodes, dtype=torch.float64, device="cpu")
        ran[:, list(alive)] = 1
        return int(self.executed(ran))

    def executed(self, ran: Tensor, is_open: Tensor | None = None) -> Tensor:
        """Multiply-adds for each sample, (B,). `ran`: which nodes ran, (B, N), 0 or 1; `is_open`: which edges, (B, N, N).

        Without `is_open`, an edge is open if both its nodes ran. Differentiable in `ran`.
        """
        ran = ran if ran.is_floating_point() else ran.double()
        nodes, routers, edges = (ran.new_tensor(costs) for costs in (self.nodes, self.routers, self.edges))
        mask = self.topology.mask.to(ran.device, ran.dtype)
        open_edges = ran @ mask.T if is_open is None else is_open.to(ran.dtype).sum(2)  # (B, N): open in-edges of each node
        return (ran * (nodes + routers + edges * open_edges)).sum(1)


@dataclass(frozen=True)
class CostModel:
    """The multiply-adds of a network on one image, stage by stage: convolutions, matrix products, routers and aggregation."""

    fixed: int  # outside dynamic stages: stem, transitions and head
    stages: list[StageCost]

    @property
    def dense(self) -> int:
        """With every node alive and every edge open."""
        return self.fixed + sum(stage.dense for stage in self.stages)

    @property
    def least(self) -> int:
        """With every block dead that can be; see `StageCost.least`."""
        return self.fixed + sum(stage.least for stage in self.stages)

    @property
    def skippable(self) -> float:
        """The share of the dense cost that need not run, 0 to 1; 0 if no block can be dead."""
        return 1 - self.least / self.dense if self.dense else 0.0

    def executed(self, ran: Sequence[Tensor], is_open: Sequence[Tensor] | None = None) -> Tensor:
        """Multiply-adds for each sample, (B,), from one tensor for each stage; see `StageCost.executed`."""
        opens = [None] * len(self.stages) if is_open is None else is_open
        costs = [stage.executed(r, o) for stage, r, o in zip(self.stages, ran, opens, strict=True)]
        return torch.stack(costs).sum(0) + self.fixed

    def executed_in(self, record: Record) -> Tensor:
        """Multiply-adds that each image of a recorded forward pass executed, (B,), float64, on the CPU."""
        return self.executed(record.ran, [matrix != 0 for matrix in record.adjacency]).cpu().double()


def cost(model: nn.Module, image_size: int | tuple[int, int] = 224) -> Cost:
    """Count the cost of `model` on one image of `image_size` pixels (side, or height and width), on the meta device.

    A network that reads values cannot run there and runs on the CPU. Raises UsageError for a size that the model cannot take.
    """
    work = measure_work(model, image_size)
    return Cost(
        params=sum(parameter.numel() for parameter in model.parameters()),
        multiply_adds=sum(place.convolutions for place in work.nodes),
        linear_multiply_adds=sum(place.products for place in work.nodes),
        router_multiply_adds=sum(router.multiply_adds for stage in work.stages for router in stage.routers),
        aggregation_multiply_adds=sum(
            len(stage.graph.topology.senders(node)) * edge for stage in work.stages for node, edge in enumerate(stage.edges)
        ),
        activations=sum(place.activations for place in work.nodes),
    )


def cost_model(model: nn.Module, image_size: int | tuple[int, int] = 224) -> CostModel:
    """Count the cost of each node of `model` on one image, as `cost` does."""
    work = measure_work(model, image_size)
    return CostModel(work.fixed.multiply_adds, [_stage_cost(stage) for stage in work.stages])


def _stage_cost(stage: StageWork) -> StageCost:
    return StageCost(
        stage.graph.topology,
        [node.multiply_adds for node in stage.nodes],
        [router.multiply_adds for router in stage.routers],
        stage.edges,
        _always_alive(stage.graph),
    )


def _always_alive(graph: DynamicGraph) -> tuple[int, ...]:
    """Input and output node, and the blocks that neither a gate of their own nor the thresholds of their in-edges can close."""
    topology, alive = graph.topology, {0, graph.topology.output}
    for node in topology.blocks:
        can_close = graph.has_gates or (graph.weighting.can_close and node not in topology.pinned)
        if not can_close and alive.intersection(topology.senders(node)):
            alive.add(node)
    return tuple(sorted(alive))
