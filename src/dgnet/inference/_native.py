"""The sparse mode on the CPU with a compiled extension, `native.cpp`: its walk, and which stages it supports."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dgnet.compat.torch import has_forward_hooks
from dgnet.errors import UsageError, check_choice
from dgnet.graph import (
    FixedWeighting,
    LearnedWeighting,
    LinearWeighting,
    NetworkGates,
    NodeGates,
    PooledLinear,
    RoutedWeighting,
    Router,
    SignedWeighting,
    SoftmaxWeighting,
    StageNodes,
    Walk,
    Weighting,
    Wiring,
    current_area,
    find_alive,
    find_stages,
    from_map,
    global_average_pool,
    least_logit,
    require_stages,
    to_map,
)
from dgnet.inference._build import load_native
from dgnet.inference._lower import find_operations, lower, write_program
from dgnet.inference._sparse import SparseWalk, refuse_gradients, set_mode
from dgnet.models import ConvertedStage

EXECUTORS = ("recommended", "plain", "native")


def set_sparse(network: nn.Module, executor: str = "recommended") -> nn.Module:
    """Set `network` to the sparse mode, in place, and choose its executor; returns the network.

    "plain": plain PyTorch, on any device. "native": the compiled extension, on a CPU only; see `use_native`. "recommended": the
    faster one on the network's device, native on a CPU and plain elsewhere. If the extension cannot be built, a line on stderr
    gives the reason, and the plain one is used.

    Raises UsageError for an unknown executor, for a network without dynamic stages, and if "native" is not possible.
    """
    check_choice("--executor", executor, EXECUTORS)
    require_stages(network)
    device = next(network.parameters()).device
    if executor == "native" and device.type != "cpu":
        raise UsageError("--executor native runs on a CPU only; use recommended or plain on other devices")
    if executor == "recommended":
        found = find_executor(device)
        executor = found.name
        if executor == "plain" and device.type == "cpu":
            _warn_once(f"{found.reason}; the sparse mode runs in plain PyTorch, which is slower")
    return use_native(network) if executor == "native" else set_mode(network, "sparse")


@dataclass(frozen=True)
class Executor:
    """What runs the sparse mode: "native" or "plain", and why."""

    name: str
    reason: str


def find_executor(device: str | torch.device) -> Executor:
    """The recommended executor on a device. Builds the extension if the device can use it."""
    if torch.device(device).type != "cpu":
        return Executor("plain", "the compiled extension runs on a CPU only")
    try:
        return Executor("native", str(load_native()))
    except UsageError as error:
        return Executor("plain", str(error))


@cache
def _warn_once(line: str) -> None:
    print(line, file=sys.stderr)


def use_native(network: nn.Module) -> nn.Module:
    """Set `network` to the sparse mode, in place, with the compiled extension for the stages that it supports.

    It supports all weightings of dgnet (`Router`, average pooling), with or without block gates, in float32. A stage runs in
    plain PyTorch if it has several weights for each edge, `keep_edges`, a weighting, router or pool of the user's own, hooks on
    these, or routers that read activations. So does a pass with a padded batch, autocast or another precision. A stage is one
    call if its blocks can be lowered (`dgnet.inference._lower`).

    Weights are copied, hooks and modes of single modules are looked up, now: call it again after changing one of them.

    Raises UsageError if the extension cannot be built.
    """
    load_native()
    set_mode(network, "sparse")
    for stage in find_stages(network):
        if _supports(stage):
            stage.inference_walk = NativePlan(stage)
    return network


def lower_static_blocks(network: nn.Module) -> nn.Module:
    """If the extension runs stages of `network`, let it run the static blocks too that can be lowered; returns the network.

    Their modules' `forward` is replaced, with copies of their weights: only for a network that nobody else uses.
    """
    if any(isinstance(stage.inference_walk, NativePlan) for stage in find_stages(network)):
        _lower_children(network)
    return network


def _lower_children(module: nn.Module) -> None:
    """Lower the largest parts of `module` that can be."""
    for child in module.children():
        if isinstance(child, StageNodes):
            continue
        operations = None if find_stages(child) else find_operations(child)
        if operations is None:
            _lower_children(child)
        elif operations:
            child.forward = NativeForward(child, write_program(operations))


class NativeForward:
    """The forward pass of a lowered module; in plain PyTorch where the extension does not support the input.

    It was lowered for a call with one argument.
    """

    def __init__(self, module: nn.Module, program: Any) -> None:
        self.plain, self.program = module.forward, program

    def __call__(self, x: Tensor, *more: Any, **named: Any) -> Any:
        is_plain = torch.is_grad_enabled() or bool(more or named) or not isinstance(x, Tensor)
        if is_plain or not _is_supported(x) or x.ndim != 4 or len(x) == 0:
            return self.plain(x, *more, **named)
        output = self.program.run(x)
        return output


def _is_supported(x: Tensor) -> bool:
    """Whether the extension can compute with `x`. A padded batch needs masks, which only plain PyTorch knows."""
    is_float = x.is_cpu and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return is_float and current_area() is None


class NativeWalk(Walk):
    """A sparse walk in which the compiled extension decides and sums; its twin is `SparseWalk`.

    If all blocks of the stage are plain, the extension runs the blocks too, in one call.
    """

    def __init__(self, plan: NativePlan, stage: StageNodes, x: Tensor, gates: Tensor | None = None) -> None:
        super().__init__(stage, x, gates)
        if gates is not None and self.imposed is None:
            self.imposed = gate_weights(stage, gates)
        else:
            self.gates = None  # imposed weights count instead
        self.runs_blocks = plan.runs_blocks
        self.applies_relu = stage.shortcut == "edge" and type(stage.activation) is nn.ReLU
        offset = stage.threshold_offset
        # The extension sees every feature as (B, C, H, W).
        self.native = torch.classes.dgnet.Walk(
            plan.constants, to_map(x, stage.layout), self.imposed, offset, least_logit(offset)
        )
        self.summed: Tensor | None = None  # x̂ of the output node
        self.without_gradients = torch.no_grad() if torch.is_grad_enabled() else nullcontext()

    @property
    def blocks(self) -> Sequence[int]:
        return () if self.runs_blocks else self.topology.blocks

    def put(self, node: int, feature: Tensor | None) -> None:
        with self.without_gradients:
            if feature is None:
                return
            feature = to_map(feature, self.stage.layout)
            gates = self.stage.node_gates
            if node == 0 and isinstance(gates, NetworkGates) and (self.imposed is None or gates.serves_others):
                self.native.vote(gates.predict(0, feature).contiguous())
            if self.runs_blocks:
                self.summed = self._seen(self.native.run(feature, self.applies_relu))
            else:
                self.native.put(node, feature)

    def _seen(self, summed: Tensor | None) -> Tensor | None:
        """A sum in the stage's layout."""
        return None if summed is None else from_map(summed, self.stage.layout)

    def compute(self, node: int) -> Tensor | None:
        is_entry = node in self.topology.entry
        with self.without_gradients:
            summed = self._seen(self.native.take(node, self.applies_relu and not is_entry))
            if summed is None or len(summed) == 0:
                return None
            if is_entry:
                y = self.stage.call_block(node, summed, self.further)
                return self.stage.finish_entry(y, lambda: from_map(self.native.take_shortcut(node), self.stage.layout))
            return self.stage.transform(node, summed, self.applies_relu, self.further)

    def finish(self) -> Tensor:
        with self.without_gradients:
            output = self._compute_output()
        return refuse_gradients(output, self.stage, self.x)

    def _compute_output(self) -> Tensor:
        output = self.topology.output
        summed = self.summed if self.runs_blocks else self._seen(self.native.take(output, self.applies_relu))
        if self.observers:
            self._report()
        if summed is None:
            return self.stage.transform(output, self.stage.empty_sum(self.x, self.further))
        return self.stage.transform(output, summed, is_activated=self.applies_relu)

    def _report(self) -> None:
        alpha, weights, ran = self.native.alpha(), self.native.weights(), self.native.ran()
        rows = [(node, list(self.topology.senders(node))) for node in range(1, self.topology.num_nodes)]
        if self.gates is not None:  # they are imposed as weights, but α is the stage's own
            alpha = known_weights(self.stage) * find_alive(self.topology, self.gates > 0.5)[:, None]  # 0 for dead senders
        self.report(
            Wiring(
                self.topology,
                [alpha[:, node, senders] for node, senders in rows],
                [weights[:, node, senders] for node, senders in rows],
                list(ran[:, :-1].unbind(1)),
            )
        )


def known_weights(stage: StageNodes) -> Tensor:
    """The weights of a stage whose edges weigh the same for all samples, (N, N). In evaluation they are α."""
    topology, weighting = stage.topology, stage.weighting
    weights = torch.zeros(topology.num_nodes, topology.num_nodes)
    for node in range(1, topology.num_nodes):
        senders = list(topology.senders(node))
        if node in topology.pinned:
            weights[node, senders] = topology.pinned[node]
        else:
            weights[node, senders] = weighting.weigh(node, weighting.shared_alpha(node)[None])[0].detach()
    return weights


def gate_weights(stage: StageNodes, gates: Tensor) -> Tensor:
    """Given gates as weights to impose, (B, N, N): the stage's own, which are known; 0 on the in-edges of closed blocks."""
    runs = gates.new_ones(len(gates), stage.topology.num_nodes, dtype=torch.float32)
    runs[:, 1:-1] = (gates > 0.5).float()
    return known_weights(stage) * runs[:, :, None]


class NativePlan:
    """Starts native walks through one stage. It holds weighting, gates and plain blocks as constants of the extension."""

    def __init__(self, stage: StageNodes) -> None:
        topology, weighting, gates = stage.topology, stage.weighting, stage.node_gates
        nodes = range(topology.num_nodes)
        routed = weighting if isinstance(weighting, RoutedWeighting) else None
        unbounded = weighting if isinstance(weighting, LinearWeighting | SoftmaxWeighting) else None
        routers: Any = getattr(weighting, "routers", {})
        is_shared = not weighting.reads_features
        columns: Any = {} if gates is None else gates.columns
        self.constants = torch.classes.dgnet.Stage(
            [list(topology.senders(j)) for j in nodes],
            list(topology.entry),
            [topology.pinned.get(j) for j in nodes],
            [list(topology.free_receivers(i)) for i in nodes],
            [[] if gates is None else list(gates.receivers(i)) for i in nodes],
            [_constant(weighting.shared_alpha(j)) if is_shared and j > 0 and j not in topology.pinned else None for j in nodes],
            [_constant(_scaled_weight(routers[str(i)])) if str(i) in routers else None for i in nodes],
            [
                _constant(routers[str(i)].bias) if str(i) in routers and routers[str(i)].bias is not None else None
                for i in nodes
            ],
            [_constant(_scaled_weight(columns[str(i)])) if str(i) in columns else None for i in nodes],
            None if weighting.threshold is None else _constant(weighting.threshold),
            None if gates is None else _constant(gates.bias),
            routed is not None and routed.options.gate == "psi",
            routed is not None and routed.options.inference_weight == "raw",
            1.0 if routed is None else routed.start_weights[torch.float32][0],
            [_start_weights(routed, j) for j in nodes],
            _is_normed(routers),
            _is_normed(columns),
            [_static_weights(weighting, j) for j in nodes],
            _find_form(weighting),
            float(weighting.scale.detach()) if isinstance(weighting, LinearWeighting) else 1.0,
            0.0 if unbounded is None else unbounded.temperature,
        )
        # A stage whose blocks can all be lowered is one call. In other stages each block is called as a module.
        programs = []
        takes_more = isinstance(stage, ConvertedStage) and bool(stage.arguments)
        if stage.shortcut == "edge" and type(stage.activation) in (nn.ReLU, nn.Identity) and not takes_more:
            programs = [lower(block, stage.layout) for block in stage.nodes]
        self.runs_blocks = bool(programs) and all(program is not None for program in programs)
        if self.runs_blocks:
            for node, program in enumerate(programs, start=1):
                self.constants.set_block(node, program)

    def __call__(self, stage: StageNodes, x: Tensor, gates: Tensor | None = None) -> Walk:
        """Start a walk for the raw stage input `x`; in plain PyTorch if the extension does not support the pass."""
        return NativeWalk(self, stage, x, gates) if _is_supported(x) else SparseWalk(stage, x, gates)

    def in_graph(self) -> type[Walk]:
        """See `dgnet.graph.Walk`."""
        return SparseWalk.in_graph()

    def __reduce__(self) -> tuple[Any, ...]:
        return _sparse_walk, ()  # a copy of the stage runs in plain PyTorch


def _sparse_walk() -> type[Walk]:
    return SparseWalk


def _start_weights(routed: RoutedWeighting | None, node: int) -> Tensor | None:
    """What is subtracted from the weights of the node's in-edges, (E,), so that an edge that starts closed starts at 0."""
    if routed is None or routed.closed is None:
        return None
    return _constant(routed.closed[node, list(routed.topology.senders(node))].float() * routed.start_weights[torch.float32][1])


def _static_weights(weighting: Weighting, node: int) -> Tensor | None:
    """The static weights of the node's in-edges, (E,), of a weighting that has them."""
    if not isinstance(weighting, SignedWeighting | LinearWeighting):
        return None
    return _constant(weighting.order.row(weighting.static, node))


def _find_form(weighting: Weighting) -> int:
    """How a weight follows from what routers predict: `Form` in native.cpp."""
    if isinstance(weighting, LinearWeighting):
        return 1 if weighting.options.linear_function == "tanh" else 2
    return 3 if isinstance(weighting, SoftmaxWeighting) else 0


def _scaled_weight(part: PooledLinear) -> Tensor:
    """W of a router or gate for pooled features that are normalised to variance 1, or not at all."""
    return part.weight * part.in_features**-0.5 if part.norm == "unit" else part.weight


def _is_normed(parts: Any) -> bool:
    """Whether routers or gates, which share this option, normalise pooled features."""
    return any(part.norm != "none" for part in parts.values())


_WEIGHTINGS = (RoutedWeighting, SignedWeighting, LinearWeighting, SoftmaxWeighting, LearnedWeighting, FixedWeighting)


def _supports(stage: StageNodes) -> bool:
    """Whether the extension supports all parts of the stage."""
    weighting, gates = stage.weighting, stage.node_gates
    if type(weighting) not in _WEIGHTINGS or type(gates) not in (NodeGates, NetworkGates, type(None)):
        return False
    if any(has_forward_hooks(module) for module in (weighting, stage.activation, gates) if module is not None):
        return False
    if any(parameter.dtype != torch.float32 or not parameter.is_cpu for parameter in stage.parameters()):
        return False
    if weighting.edge_weights > 1 or (isinstance(weighting, LearnedWeighting) and weighting.can_close):
        return False
    if stage.takes_gates and weighting.reads_features:
        return False
    if (weighting.reads_features or gates is not None) and stage.router_reads != "feature":
        return False
    if not isinstance(weighting, RoutedWeighting | LinearWeighting | SoftmaxWeighting):
        return True
    kind = Router if isinstance(weighting, RoutedWeighting) else PooledLinear
    return weighting.pool is global_average_pool and all(type(router) is kind for router in weighting.routers.values())


def _constant(values: Tensor) -> Tensor:
    return values.detach().clone(memory_format=torch.contiguous_format)
