"""The work of one forward pass on one image, place by place: before, in and between the nodes of dynamic stages.

torch's `FlopCounterMode` sees every operator that runs, whichever module or function calls it, and knows the operations of
convolutions and matrix products from their shapes. Hooks note which place of the network they belong to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import mha
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from dgnet.compat.torch import UNCOUNTED
from dgnet.errors import UsageError, reason
from dgnet.graph import DenseWalk, DynamicGraph, find_stages
from dgnet.models import copy_for_passes, find_channels, find_dtype


@dataclass
class Work:
    """What runs in one place of the network for one image."""

    convolutions: int = 0  # multiply-adds of convolutions of all kinds
    products: int = 0  # multiply-adds of all other matrix products: linear layers, attention
    activations: int = 0  # elements of the outputs of convolutions

    @property
    def multiply_adds(self) -> int:
        return self.convolutions + self.products


@dataclass
class StageWork:
    """The work of a stage whose nodes all run and whose edges are all open. The lists have one entry for each node."""

    graph: DynamicGraph  # on the device on which the work was counted
    nodes: list[Work]
    routers: list[Work]  # what the stage does with a node's feature: routers and gates
    edges: list[int]  # multiply-adds of each in-edge: the elements of its feature


@dataclass
class NetworkWork:
    """The work of a network."""

    fixed: Work  # outside dynamic stages
    stages: list[StageWork]

    @property
    def nodes(self) -> list[Work]:
        """The work outside routers, gates and aggregation."""
        return [self.fixed, *(work for stage in self.stages for work in stage.nodes)]


def measure_work(network: nn.Module, image_size: int | tuple[int, int]) -> NetworkWork:
    """Run a copy of `network` in evaluation mode on one image of `image_size` pixels (side, or height and width).

    It runs on the meta device, without computing. A network that reads values cannot run there and runs on the CPU, on zeros.

    Raises UsageError for a size that the network cannot take, and for quantised layers, which torch does not count.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1:
        raise UsageError(f"image size must be at least 1 pixel, got {height}×{width}")
    if any(type(module).__module__.startswith("torch.ao.nn.quantized") for module in network.modules()):
        raise UsageError(
            f"{type(network).__name__} has quantised layers, whose work is not counted; count it before quantisation"
        )
    shape = (1, find_channels(network), height, width)
    try:
        return _Meter(network, "meta").run(shape)
    except Exception as error:  # a layer may raise anything for a size that it cannot take
        failure = error
    if not any(tensor.is_meta for tensor in network.state_dict().values() if isinstance(tensor, Tensor)):
        try:
            return _Meter(network, "cpu").run(shape)
        except Exception as error:
            failure = error
    raise UsageError(f"{type(network).__name__} cannot take an image of {height}×{width}: {reason(failure)}") from failure


class _Meter:
    """Counts the work of one forward pass, and books it to the place where it runs."""

    def __init__(self, network: nn.Module, device: str) -> None:
        # Without gradients: the counter asks tensors that need one for its function, which they do not have here.
        self.network = copy_for_passes(network).to(device).eval().requires_grad_(False)
        self.device = device
        self.counter = FlopCounterMode(display=False, custom_mapping={**UNCOUNTED, _CONVOLUTION: self._convolution})
        self.outputs = 0  # elements of the outputs of convolutions so far
        self.booked = Work()  # the work of all places so far
        self.work = NetworkWork(Work(), [])
        self.places = [self.work.fixed]  # where the network is; a place inside another comes after it
        for graph in find_stages(self.network):
            self.work.stages.append(_watch(graph, self))

    def run(self, shape: Sequence[int]) -> NetworkWork:
        """`shape`: of a batch of one image."""
        images = torch.zeros(shape, device=self.device, dtype=find_dtype(self.network))
        is_fused = mha.get_fastpath_enabled()
        # On the CPU a transformer layer may run as one operator, which the counter does not know.
        mha.set_fastpath_enabled(False)
        try:
            with torch.no_grad(), self.counter:
                self.network(images)
                self.book()
        finally:
            mha.set_fastpath_enabled(is_fused)
        return self.work

    def book(self) -> None:
        """Book what has run since the last call to the place where the network is."""
        counts = self.counter.flop_counts["Global"]  # two for each multiply-add
        convolutions = counts.get(_CONVOLUTION, 0)
        total = Work(convolutions // 2, (sum(counts.values()) - convolutions) // 2, self.outputs)
        place = self.places[-1]
        place.convolutions += total.convolutions - self.booked.convolutions
        place.products += total.products - self.booked.products
        place.activations += total.activations - self.booked.activations
        self.booked = total

    def enter(self, place: Work) -> None:
        """From now on the network is in `place`."""
        self.book()
        self.places.append(place)

    def leave(self) -> None:
        """The network leaves the place that it entered last."""
        self.book()
        self.places.pop()

    def _convolution(
        self,
        images: Sequence[int],
        weight: Sequence[int],
        bias: Any,
        stride: Any,
        padding: Any,
        dilation: Any,
        transposed: bool,
        *rest: Any,
        out_shape: Sequence[int],
    ) -> int:
        self.outputs += prod(out_shape)
        return conv_flop_count(list(images), list(weight), list(out_shape), transposed)


def _watch(graph: DynamicGraph, meter: _Meter) -> StageWork:
    """Book what a node's module does to the node, and all else that runs in the stage to the router of the node before."""
    size = graph.topology.num_nodes
    stage = StageWork(graph, [Work() for _ in range(size)], [Work() for _ in range(size)], [0] * size)
    ran = -1  # the node that ran last
    calls: list[int | None] = []  # of nodes' modules that have not returned: the node
    graph.inference_walk = DenseWalk

    def enter_stage(*of_hook: Any) -> None:
        nonlocal ran
        ran = -1
        meter.enter(stage.routers[0])

    def leave_stage(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        meter.leave()
        feature, entry = output[0].numel(), inputs[0][0].numel()
        if graph.shortcut == "node" and graph.entry_shortcut:  # the shortcut of an entry node is weighted too
            entry += feature
        for node in range(1, size):
            stage.edges[node] += entry if node in graph.topology.entry else feature

    def enter_node(nodes: Sequence[int], *of_hook: Any) -> None:
        is_in_stage = any(meter.places[-1] is router for router in stage.routers)
        node = next((node for node in nodes if node > ran), None) if is_in_stage else None
        calls.append(node)
        if node is not None:
            meter.enter(stage.nodes[node])

    def leave_node(*of_hook: Any) -> None:
        nonlocal ran
        node = calls.pop()
        if node is not None:
            meter.leave()
            meter.places[-1] = stage.routers[node]
            ran = node

    graph.register_forward_pre_hook(enter_stage)
    graph.register_forward_hook(leave_stage)
    nodes_of: dict[nn.Module, list[int]] = {}  # several nodes may share a module, and the rest of the network may call it
    for node, module in enumerate([graph.input, *graph.nodes]):
        nodes_of.setdefault(module, []).append(node)
    for module, nodes in nodes_of.items():
        module.register_forward_pre_hook(partial(enter_node, nodes))
        module.register_forward_hook(leave_node)
    return stage


_CONVOLUTION = torch.ops.aten.convolution
