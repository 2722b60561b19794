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

from dgnet.errors import UnknownOptionError, UsageError, check_choice, did_you_mean, reason, shorten
from dgnet.graph import (
    PooledLinear,
    StageNodes,
    Topology,
    TopologyLike,
    Weighting,
    find_stages,
    least_logit,
    link_gates,
)
from dgnet.models._agreement import Agreement, compare, find_tolerance
from dgnet.models._connectivity import Connectivity, WeightingLike
from dgnet.models._converted import Conversion, ConvertedNetwork, ConvertedRun, ConvertedStage, Joined, converted_class
from dgnet.models._increment import Increment
from dgnet.models._inputs import find_channels, find_image_size
from dgnet.models._isolation import copy_network, find_device, find_dtype, plain_context
from dgnet.models._runs import Run, find_runs
from dgnet.models._verify import find_difference
from dgnet.presets import expand_preset

# The start of every weight at 1 and of every gate open; and routers that read features of any scale.
_ROUTED_START = {"router_std": 0.0, "router_norm": "layer", "unit_start": True}
_GATED_START = {"node_gate_std": 0.0, "router_norm": "layer"}


def convert(
    network: nn.Module,
    *,
    topology: TopologyLike | None = None,
    weighting: WeightingLike | None = None,
    node_gate: str | None = None,
    preset: str | None = None,
    stages: str | Sequence[str] = "auto",
    image_size: int | tuple[int, int] | None = None,
    check: Tensor | None = None,
    **options: Any,
) -> nn.Module:
    """A copy of `network` with dynamic connectivity that computes the same function. Its `conversion` is a report.

    Runs of two or more residual blocks, which keep the shape of their feature and are called one after the other, become
    stages; with gates also single blocks. All blocks of a run get the same further arguments, or none. The rest stays static.
    The copy's class is a subclass of the network's own.

    `topology`: by default "complete". `weighting`: "routed" (the default), "signed", "linear", "softmax", "learned" or "fixed".
    `node_gate`: "hard" or "gumbel" for a gate on each block. `preset`: a name of `dgnet.presets` in place of these three, for
    connectivity in the form of another network. `stages`: "auto", or the names of modules whose blocks become stages, also
    blocks without a residual shortcut. `image_size`: pixels, side or height and width; by default the network's own. `check`:
    images, (B, C, H, W), on which both networks must agree. `options`: further ones of `dgnet.Connectivity`.

    The network and the copy run once on two random images, to see that they compute the same; not on the meta device. In
    training mode the network must call the blocks in the same way.

    Raises UsageError for a network that takes no images or has no run, and if the function would change.
    """
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"convert takes a network, an nn.Module, got {network!r}; build it with timm.create_model, or convert by name with"
            " dgnet.create_model(NAME, dynamic=True)"
        )
    if check is not None and not (isinstance(check, Tensor) and check.ndim == 4 and len(check)):
        raise UsageError(f"check is a batch of images, (B, C, H, W), got {shorten(repr(check))}")
    if preset is not None:
        axes = {"topology": topology, "weighting": weighting, "node_gate": node_gate}
        given = {name: value for name, value in axes.items() if value is not None}
        options = expand_preset(type(network).__name__, preset, {**given, **options, "dynamic": True})
        del options["dynamic"]
        topology, weighting = options.pop("topology"), options.pop("weighting")
        node_gate = options.pop("node_gate", None)
    topology, weighting = "complete" if topology is None else topology, weighting or "routed"
    connectivity = _read_connectivity(topology, weighting, node_gate, options)
    with plain_context(network):
        result, size = _convert(network, connectivity, _read_stages(stages), image_size)
        why = find_difference(network, result, _last_blocks(result), find_channels(network), size)
        if why:
            raise UsageError(
                f"{type(network).__name__} cannot be converted without changing its function: {why}; leave out the options that"
                " change the start of weights or gates, or name the modules to convert with stages"
            )
    if check is not None:
        result.conversion = replace(result.conversion, agreement=check_agreement(network, result, check))
    return result


def _convert(
    network: nn.Module,
    connectivity: Connectivity,
    within: tuple[str, ...] | None,
    image_size: int | tuple[int, int] | None,
) -> tuple[ConvertedNetwork, tuple[int, int]]:
    """`convert` without the comparison; and the size of the images with which runs were found."""
    if find_stages(network):
        raise UsageError(f"{type(network).__name__} is dynamic already")
    for name in _OWN_ATTRIBUTES:
        if hasattr(network, name):
            raise UsageError(f"{type(network).__name__} has an attribute {name!r}, which dgnet sets; rename it")
    converted = copy_network(network)
    # With a gate, a block that stands alone can be skipped; without one, its three edges are not worth a router.
    least_blocks = 2 if connectivity.node_gate == "none" else 1
    size = find_image_size(network, image_size)
    found = find_runs(network, size, find_channels(network), within, least_blocks)
    if not found.runs:
        named = [block for block in found.static if within is None or block.name.startswith(within)]
        why = "; ".join(f"{block.name}: {block.reason}" for block in named[:3]) or "it has no residual blocks"
        gates = "; with node_gate='hard' single blocks become stages too" if found.removable and least_blocks > 1 else ""
        raise UsageError(f"{type(network).__name__} has no run of blocks that could become a stage ({why}){gates}")
    if connectivity.gate_policy == "convolutional" and found.runs[0].layout == "NLC":
        raise UsageError(
            f"gate_policy='convolutional' is not possible: the first stage of {type(network).__name__} holds tokens, not maps;"
            " leave it out"
        )
    described = tuple(ConvertedRun.of(run, converted.get_submodule(run.names[0])) for run in found.runs)
    static_names: dict[str, str] = {}
    topologies = connectivity.build_topologies([len(run.names) + 2 for run in found.runs])
    for number, (run, graph) in enumerate(zip(found.runs, topologies, strict=True), start=1):
        stage = _build_stage(converted, run, connectivity, graph, number)
        for step, name in enumerate(run.names):
            place = Joined(stage, step) if step else stage
            place.training = stage.training
            converted.set_submodule(name, place)
            static_names[f"{name}."] = f"{run.names[0]}.nodes.{step}.block."
    link_gates([stage.node_gates for stage in find_stages(converted)])
    result = cast(ConvertedNetwork, converted)
    try:
        result.__class__ = converted_class(type(network))
    except TypeError as error:  # such as a class with slots, or one that must not have subclasses
        raise UsageError(
            f"{type(network).__name__} cannot be converted: no subclass of its class can be made ({reason(error)})"
        ) from error
    result.static_names = static_names
    result.connectivity_options = connectivity.plain_options()
    result.conversion = Conversion(described, found.static, within or "auto")
    return result, size


_OWN_ATTRIBUTES = ("static_names", "connectivity_options", "conversion")


def _last_blocks(network: ConvertedNetwork) -> dict[str, str]:
    """The name of each stage -> that of its last block."""
    return {run.name: run.blocks[-1] for run in network.conversion.stages}


def to_static(network: nn.Module) -> nn.Module:
    """A static copy of a converted network whose weights still are 1 and whose gates are always open; see `convert`.

    Raises UsageError for another network, and if a weight or gate has changed.
    """
    if not isinstance(network, ConvertedNetwork):
        raise UsageError(f"{type(network).__name__} was not made by dgnet.convert")
    change = find_change_of_network(network)
    if change:
        raise UsageError(change)
    return take_apart(network)


def find_change_of_network(network: ConvertedNetwork, image_size: int | tuple[int, int] | None = None) -> str:
    """Why a converted network does not compute what its blocks compute in a row; "" if it does.

    `image_size`: of the random images on which it is compared, in pixels; None: the network's own.
    """
    for run in network.conversion.stages:
        change = find_change(cast(StageNodes, network.get_submodule(run.name)))
        if change:
            return f"stage {run.name} cannot become static: {change}"
    size = find_image_size(network, image_size)
    why = find_difference(take_apart(network), cast(nn.Module, network), _last_blocks(network), find_channels(network), size)
    return f"{type(network).__name__} cannot become static: {why}" if why else ""


def add_gates(network: ConvertedNetwork, image_size: int | tuple[int, int] | None = None) -> nn.Module:
    """What `network` becomes if gates are added, which also make stages of single blocks. Not for running.

    `image_size`: with which runs are found, in pixels; None: the network's own.
    """
    options = {**network.stored_options(), "node_gate": "hard"}
    del options["dynamic"]
    within = _read_stages(options.pop("stages"))
    connectivity = _read_connectivity(options.pop("topology"), options.pop("weighting"), options.pop("node_gate"), options)
    static = take_apart(network)
    with plain_context(static):
        try:
            return _convert(deepcopy(static).to("meta"), connectivity, within, image_size)[0]
        except UsageError:  # it reads values
            return _convert(static, connectivity, within, image_size)[0]


def take_apart(network: ConvertedNetwork) -> nn.Module:
    """A copy whose blocks are where they were, called in a row, whatever the weights are."""
    network = cast(ConvertedNetwork, copy_network(cast(nn.Module, network)))
    for run in network.conversion.stages:
        stage = cast(StageNodes, network.get_submodule(run.name))
        for name, node in zip(run.blocks, stage.nodes, strict=True):
            assert isinstance(node, Increment)
            network.set_submodule(name, node.take_block())
    static, own = cast(nn.Module, network), network.static_class
    for name in _OWN_ATTRIBUTES:
        delattr(static, name)
    static.__class__ = own
    return static


def find_change(stage: StageNodes) -> str:
    """Why a converted stage does not compute what its blocks compute in a row, as far as its parameters say; "" otherwise."""
    topology, weighting, gates = stage.topology, stage.weighting, stage.node_gates
    if any(parameter.is_meta for parameter in stage.parameters()):
        return ""
    if gates is not None:
        if any(reader.weight.any() for reader in gates.readers):
            return "its gates depend on the image"
        if (gates.bias[1:-1] < max(0.0, least_logit(stage.threshold_offset))).any():  # 0: in training
            return "a gate is closed"
    routers: Any = getattr(weighting, "routers", {})
    is_known = not weighting.reads_features or type(weighting).constant_alpha is not Weighting.constant_alpha
    if not is_known or any(not isinstance(router, PooledLinear) for router in routers.values()):
        return ""
    weighting = deepcopy(weighting).eval()  # in which edges close
    for node in range(1, topology.num_nodes):
        alpha = weighting.constant_alpha(node)
        if alpha is None:
            return "its weights depend on the image"
        is_open = weighting.find_open(node, alpha[None], stage.threshold_offset)
        if is_open is not None and not is_open.all():
            return "an edge is closed"
        if not torch.allclose(weighting.weigh(node, alpha[None]), torch.ones_like(alpha), rtol=0, atol=1e-5):
            return "an edge does not weigh 1"
    return ""


def check_agreement(static: nn.Module, converted: nn.Module, images: Tensor) -> Agreement:
    """Compare the outputs of both networks on `images`, (B, C, H, W), in evaluation mode.

    Raises UsageError if they differ by more than rounding in the network's precision, and if the static network does not take
    the images.
    """
    try:
        agreement = compare(static, converted, images)
    except UsageError:
        raise
    except Exception as error:  # a module may raise anything
        given = f"{tuple(images.shape)}, {images.dtype}, on {images.device}"
        raise UsageError(
            f"{type(static).__name__} does not run on the images of the check, {given} ({reason(error)})"
        ) from error
    agreement.require(type(static).__name__, find_tolerance(static))
    return agreement


def _read_connectivity(
    topology: TopologyLike, weighting: WeightingLike, node_gate: str | None, options: dict[str, Any]
) -> Connectivity:
    """The options of the stages, with the start of a conversion where the user gives none."""
    if node_gate is not None:
        check_choice("node_gate", node_gate, ("none", "hard", "gumbel"))
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
    start = _ROUTED_START if isinstance(weighting, str) and weighting == "routed" and options.get("router") is None else {}
    start = start | (_GATED_START if node_gate not in (None, "none") else {})
    return Connectivity(topology=topology, weighting=weighting, node_gate=node_gate or "none", **{**start, **options})


def _build_stage(network: nn.Module, run: Run, connectivity: Connectivity, topology: Topology, number: int) -> ConvertedStage:
    """The blocks of `run` as a stage. Raises UsageError if it would compute another function."""
    num_nodes = topology.num_nodes
    if topology.num_edges < num_nodes * (num_nodes - 1) // 2:
        change, advice = "it lacks edges", "only topology='complete' keeps it"
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
        change, advice = find_change(stage), "leave out the options that change the start of weights or gates"
    if change:
        raise UsageError(
            f"with these options the network would compute another function: in stage {number}, {run.names[0]}, {change};"
            f" {advice}"
        )
    stage.arguments = run.arguments
    stage.name = run.names[0]
    _fit_added(stage, network.get_submodule(run.names[0]))
    return stage


def _fit_added(stage: ConvertedStage, block: nn.Module) -> None:
    """Give what a conversion adds the device, precision and mode of the run's first `block`. Blocks stay as they are."""
    device, dtype = find_device(block), find_dtype(block)
    stage.mask = stage.mask.to(device)
    for part in (stage.weighting, stage.node_gates):
        if part is not None:
            part.to(device, dtype)
    held = {module for node in stage.nodes for module in cast(Increment, node).block.modules()}
    for module in stage.modules():
        if module not in held:
            module.training = block.training


def _read_stages(stages: Any) -> tuple[str, ...] | None:
    """The names of modules in `stages`; None for "auto"."""
    if isinstance(stages, str) and stages == "auto":
        return None
    names = (stages,) if isinstance(stages, str) else stages
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
        raise UsageError(f"stages is 'auto' or a list of names of modules, got {stages!r}")
    return tuple(names)
