"""Parameters and multiply-adds of a network: in total (Table 1), for each node, and for each sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dgnet.errors import UsageError, reason
from dgnet.graph import DynamicGraph, Record, Topology, find_stages
from dgnet.models import find_channels


@dataclass(frozen=True)
class Cost:
    """The cost of one image with every edge open."""

    params: int  # all parameters, routers and thresholds included
    multiply_adds: int  # of convolutions outside routers: what Table 1 counts
    router_multiply_adds: int  # of the linear layers and convolutions of routers and block gates
    aggregation_multiply_adds: int  # one for each element of each edge's feature
    activations: int  # elements of the outputs of convolutions


@dataclass(frozen=True)
class StageCost:
    """Multiply-adds of one stage on one image. The lists have one entry for each of its N nodes."""

    topology: Topology
    nodes: list[int]  # of the convolutions, if the node runs; the input node's projection; 0 for the output node
    routers: list[int]  # of router and gate weights, if the sending node runs
    edges: list[int]  # of each open in-edge of the receiving node

    @property
    def dense(self) -> int:
        """With every node alive and every edge open."""
        senders = [len(self.topology.senders(node)) for node in range(self.topology.num_nodes)]
        return sum(self.nodes) + sum(self.routers) + sum(n * cost for n, cost in zip(senders, self.edges, strict=True))

    @property
    def least(self) -> int:
        """With every block dead: the input node, its router, and its edge to the output node if there is one."""
        last = self.topology.num_nodes - 1
        return self.nodes[0] + self.routers[0] + self.edges[last] * (0 in self.topology.senders(last))

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
    """The multiply-adds of a network on one image, stage by stage."""

    fixed: int  # convolutions outside dynamic stages
    stages: list[StageCost]

    @property
    def dense(self) -> int:
        """With every node alive and every edge open: convolutions, routers and aggregation."""
        return self.fixed + sum(stage.dense for stage in self.stages)

    @property
    def least(self) -> int:
        """With every block dead."""
        return self.fixed + sum(stage.least for stage in self.stages)

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

    Raises UsageError for a size that the model cannot take.
    """
    counts = _count(model, image_size)
    stages = counts.stages.values()
    return Cost(
        params=sum(parameter.numel() for parameter in model.parameters()),
        multiply_adds=counts.fixed + sum(sum(stage.nodes) for stage in stages),
        router_multiply_adds=sum(sum(stage.routers) for stage in stages),
        aggregation_multiply_adds=sum(stage.dense - sum(stage.nodes) - sum(stage.routers) for stage in stages),
        activations=counts.activations,
    )


def cost_model(model: nn.Module, image_size: int | tuple[int, int] = 224) -> CostModel:
    """Count the cost of each node of `model` on one image, on the meta device. Raises UsageError as `cost` does."""
    counts = _count(model, image_size)
    return CostModel(counts.fixed, list(counts.stages.values()))


@dataclass
class _Counts:
    fixed: int = 0
    activations: int = 0
    stages: dict[int, StageCost] = field(default_factory=dict)  # by the id of the stage


def _count(model: nn.Module, image_size: int | tuple[int, int]) -> _Counts:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1:
        raise UsageError(f"image size must be at least 1 pixel, got {height}×{width}")
    counted = deepcopy(model).to("meta").eval()
    counts = _Counts()
    nodes: dict[int, tuple[StageCost, int]] = {}  # id of a module inside a node -> its stage and node
    routing: set[int] = set()  # ids of modules of weightings and gates
    done: list[tuple[StageCost, int]] = []  # stages and nodes that ran; routers that run next belong to the last of them

    def count_routing(output: Tensor, inputs_each: int) -> None:
        stage, node = done[-1]
        stage.routers[node] += output[0].numel() * inputs_each

    def count_convolution(module: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        inputs_each = module.weight[0].numel()
        if id(module) in routing:
            count_routing(output, inputs_each)
            return
        counts.activations += output[0].numel()
        if id(module) in nodes:
            stage, node = nodes[id(module)]
            stage.nodes[node] += output[0].numel() * inputs_each
        else:
            counts.fixed += output[0].numel() * inputs_each

    def count_linear(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if id(module) in routing:
            count_routing(output, module.in_features)

    def count_edges(module: DynamicGraph, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        feature, entry = output[0].numel(), inputs[0][0].numel()
        if module.shortcut == "node" and module.entry_shortcut:  # the shortcut of an entry node is weighted too
            entry += feature
        for node in range(1, module.topology.num_nodes):
            counts.stages[id(module)].edges[node] = entry if node in module.topology.entry else feature

    def note_done(stage: StageCost, node: int, *of_hook: Any) -> None:
        done.append((stage, node))

    for graph in find_stages(counted):
        num_nodes = graph.topology.num_nodes
        stage = StageCost(graph.topology, [0] * num_nodes, [0] * num_nodes, [0] * num_nodes)
        counts.stages[id(graph)] = stage
        for node, block in enumerate([graph.input, *graph.nodes]):
            nodes |= {id(child): (stage, node) for child in block.modules()}
            block.register_forward_hook(partial(note_done, stage, node))
        for decider in filter(None, (graph.weighting, graph.node_gates)):
            routing |= {id(child) for child in decider.modules()}
    hooks: dict[type[nn.Module], Callable[..., Any]] = {
        nn.Conv2d: count_convolution,
        nn.Linear: count_linear,
        DynamicGraph: count_edges,
    }
    for module in counted.modules():
        for kind, hook in hooks.items():
            if isinstance(module, kind):
                module.register_forward_hook(hook)
    try:
        with torch.no_grad():
            counted(torch.empty(1, find_channels(model), height, width, device="meta"))
    except Exception as error:  # a layer may raise anything for a size that it cannot take
        raise UsageError(f"{type(model).__name__} cannot take an image of {height}×{width}: {reason(error)}") from error
    return counts
