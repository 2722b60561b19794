"""Make a network dynamic without changing its function: runs of residual blocks become stages, complete graphs of weight 1.

In a stage the input node passes the run's input on, and node j computes what its block adds, block_j(x̂_j) - x̂_j. While every
weight is 1, x̂_j = x_0 + Σ_{i<j} x_i is what block j read in the static network, and the output node's sum is what the last
block put out. A block that is skipped leaves the sum as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from dgnet.errors import UnknownOptionError, UsageError, did_you_mean, shorten
from dgnet.graph import (
    FixedWeighting,
    LearnedWeighting,
    RoutedWeighting,
    Router,
    StageNodes,
    Topology,
    TopologyLike,
    find_stages,
)
from dgnet.models._agreement import TOLERANCE, Agreement, compare
from dgnet.models._connectivity import Connectivity, WeightingLike
from dgnet.models._converted import Conversion, ConvertedNetwork, ConvertedRun, ConvertedStage, Joined, converted_class
from dgnet.models._increment import Increment
from dgnet.models._inputs import find_channels, find_image_size
from dgnet.models._runs import Run, find_runs

# The start of every weight at 1 and of every gate open; and routers that read features of any scale.
_ROUTED_START = {"router_std": 0.0, "router_norm": "layer", "unit_start": True}
_GATED_START = {"node_gate_std": 0.0, "router_norm": "layer"}


def convert(
    network: nn.Module,
    *,
    topology: TopologyLike = "complete",
    weighting: WeightingLike = "routed",
    node_gate: str | None = None,
    stages: str | Sequence[str] = "auto",
    image_size: int | tuple[int, int] | None = None,
    check: Tensor | None = None,
    **options: Any,
) -> nn.Module:
    """A copy of `network` with dynamic connectivity that computes the same function. Its `conversion` is a report.

    Runs of two or more residual blocks, which keep the shape of their feature and are called one after the other, become
    stages; with gates also single blocks. All blocks of a run get the same further arguments, or none. The rest stays static.
    The copy's class is a subclass of the network's own.

    `weighting`: "routed", "learned" or "fixed". `node_gate`: "hard" or "gumbel" for a gate on each block. `stages`: "auto", or
    the names of modules whose blocks become stages, also blocks without a residual shortcut. `image_size`: pixels, side or
    height and width; by default the network's own. `check`: images, (B, C, H, W), on which both networks must agree.
    `options`: further ones of `dgnet.Connectivity`.

    Raises UsageError for a network that takes no images or has no run, for a topology under which the function would change,
    and if the networks do not agree on `check`.
    """
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"convert takes a network, an nn.Module, got {network!r}; build it with timm.create_model, or convert by name with"
            " dgnet.create_model(NAME, dynamic=True)"
        )
    if check is not None and not (isinstance(check, Tensor) and check.ndim == 4 and len(check)):
        raise UsageError(f"check is a batch of images, (B, C, H, W), got {shorten(repr(check))}")
    if find_stages(network):
        raise UsageError(f"{type(network).__name__} is dynamic already")
    connectivity = _read_connectivity(topology, weighting, node_gate, options)
    within = _read_stages(stages)
    # With a gate, a block that stands alone can be skipped; without one, its three edges are not worth a router.
    least_blocks = 2 if connectivity.node_gate == "none" else 1
    size = find_image_size(network, image_size)
    found = find_runs(network, size, find_channels(network), within, least_blocks)
    if not found.runs:
        named = [block for block in found.static if within is None or block.name.startswith(within)]
        why = "; ".join(f"{block.name}: {block.reason}" for block in named[:3]) or "it has no residual blocks"
        gates = "; with node_gate='hard' single blocks become stages too" if found.removable and least_blocks > 1 else ""
        raise UsageError(f"{type(network).__name__} has no run of blocks that could become a stage ({why}){gates}")
    converted = deepcopy(network)
    described = tuple(ConvertedRun.of(run, converted.get_submodule(run.names[0])) for run in found.runs)
    static_names: dict[str, str] = {}
    topologies = connectivity.build_topologies([len(run.names) + 2 for run in found.runs])
    for number, (run, graph) in enumerate(zip(found.runs, topologies, strict=True), start=1):
        stage = _build_stage(converted, run, connectivity, graph, number)
        for step, name in enumerate(run.names):
            converted.set_submodule(name, Joined(stage, step) if step else stage)
            static_names[f"{name}."] = f"{run.names[0]}.nodes.{step}.block."
    result = cast(ConvertedNetwork, converted)
    result.__class__ = converted_class(type(network))
    result.static_names = static_names
    result.connectivity_options = connectivity.plain_options()
    result.conversion = Conversion(described, found.static, tuple(within) if within else "auto")
    result.train(network.training)
    if check is not None:
        result.conversion = replace(result.conversion, agreement=check_agreement(network, result, check))
    return result


def to_static(network: nn.Module) -> nn.Module:
    """A static copy of a converted network whose weights still are 1 and whose gates are always open; see `convert`.

    Raises UsageError for another network, and if a weight or gate has changed.
    """
    if not isinstance(network, ConvertedNetwork):
        raise UsageError(f"{type(network).__name__} was not made by dgnet.convert")
    for run in network.conversion.stages:
        change = find_change(cast(StageNodes, network.get_submodule(run.name)))
        if change:
            raise UsageError(f"stage {run.name} cannot become static: {change}")
    return _take_apart(deepcopy(network))


def add_gates(network: ConvertedNetwork) -> nn.Module:
    """What `network` becomes if gates are added, which also make stages of single blocks. On the meta device, untrained."""
    options = network.stored_options()
    del options["dynamic"]
    return convert(_take_apart(deepcopy(network).to("meta")), **{**options, "node_gate": "hard"})


def _take_apart(network: ConvertedNetwork) -> nn.Module:
    """`network`, changed in place: its blocks where they were, called in a row."""
    for run in network.conversion.stages:
        stage = cast(StageNodes, network.get_submodule(run.name))
        for name, node in zip(run.blocks, stage.nodes, strict=True):
            assert isinstance(node, Increment)
            network.set_submodule(name, node.take_block())
    static, own = cast(nn.Module, network), network.static_class
    for name in ("static_names", "connectivity_options", "conversion"):
        delattr(static, name)
    static.__class__ = own
    return static


def find_change(stage: StageNodes) -> str:
    """Why a converted stage does not compute what its blocks compute in a row; "" if it does, or if that cannot be told."""
    topology, weighting, gates = stage.topology, stage.weighting, stage.node_gates
    if any(parameter.is_meta for parameter in stage.parameters()):
        return ""
    if gates is not None:
        columns: Any = gates.columns.values()
        if any(column.weight.any() for column in columns):
            return "its gates depend on the image"
        if (gates.bias[1:-1] < 0).any():
            return "a gate is closed"
    if not isinstance(weighting, RoutedWeighting | LearnedWeighting | FixedWeighting):
        return ""
    routers: Any = weighting.routers if isinstance(weighting, RoutedWeighting) else {}
    if any(not isinstance(router, Router) for router in routers.values()):
        return ""
    if any(router.weight.any() for router in routers.values()):
        return "its weights depend on the image"
    for node in range(1, topology.num_nodes):
        alpha = (
            torch.stack(
                [routers[str(i)].bias[topology.free_receivers(i).index(node)] for i in topology.senders(node)]
            ).sigmoid()
            if routers
            else weighting.shared_alpha(node)
        )
        if weighting.threshold is not None and (alpha < weighting.threshold[node] + stage.threshold_offset).any():
            return "an edge is closed"
        if not torch.allclose(weighting.weigh(node, alpha), torch.ones_like(alpha), rtol=0, atol=1e-5):
            return "an edge does not weigh 1"
    return ""


def check_agreement(static: nn.Module, converted: nn.Module, images: Tensor, tolerance: float = TOLERANCE) -> Agreement:
    """Compare the outputs of both networks on `images`, (B, C, H, W), in evaluation mode.

    Raises UsageError if they differ by more than `tolerance` of the largest logit.
    """
    agreement = compare(static, converted, images)
    agreement.require(type(static).__name__, tolerance)
    return agreement


def _read_connectivity(
    topology: TopologyLike, weighting: WeightingLike, node_gate: str | None, options: dict[str, Any]
) -> Connectivity:
    """The options of the stages, with the start of a conversion where the user gives none."""
    known = Connectivity.names()
    for name in options:
        if name not in known:
            raise UnknownOptionError(
                f"conversion has no option {name!r}{did_you_mean(name, known)}; connectivity options: {', '.join(known)}", name
            )
    if options.get("shortcut", "edge") != "edge":
        raise UsageError(
            "shortcut='node' is not possible: a converted block is a node that computes what it adds; leave it out"
        )
    start = _ROUTED_START if weighting == "routed" and options.get("router") is None else {}
    start = start | (_GATED_START if node_gate not in (None, "none") else {})
    return Connectivity(topology=topology, weighting=weighting, node_gate=node_gate or "none", **{**start, **options})


def _build_stage(network: nn.Module, run: Run, connectivity: Connectivity, topology: Topology, number: int) -> ConvertedStage:
    """The blocks of `run` as a stage. Raises UsageError if it would compute another function."""
    num_nodes = topology.num_nodes
    if topology.num_edges < num_nodes * (num_nodes - 1) // 2:
        change = "it lacks edges"
    else:
        stage = ConvertedStage(
            topology,
            connectivity.build_weighting(topology, run.channels, number),
            input=nn.Identity(),
            nodes=[Increment(network.get_submodule(name)) for name in run.names],
            activation=nn.Identity(),
            options=connectivity,
            node_gates=connectivity.build_node_gates(topology, run.channels, number),
            layout=run.layout,
        )
        change = find_change(stage)
    if change:
        is_cut = topology.num_edges < num_nodes * (num_nodes - 1) // 2
        advice = (
            "only topology='complete' keeps it" if is_cut else "leave out the options that change the start of weights or gates"
        )
        raise UsageError(
            f"with these options the network would compute another function: in stage {number}, {run.names[0]}, {change};"
            f" {advice}"
        )
    stage.arguments = run.arguments
    like = next(network.parameters())
    return stage.to(like.device, like.dtype) if like.is_floating_point() else stage.to(like.device)


def _read_stages(stages: Any) -> tuple[str, ...] | None:
    """The names of modules in `stages`; None for "auto"."""
    if stages == "auto":
        return None
    names = (stages,) if isinstance(stages, str) else stages
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
        raise UsageError(f"stages is 'auto' or a list of names of modules, got {stages!r}")
    return tuple(names)
