"""From a static network to a dynamic one: take blocks apart, build stages as graphs; the mixin that all families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from timm.layers import ConvNormAct
from timm.models import register_notrace_module
from timm.models.resnet import downsample_conv
from torch import Tensor, nn

from dgnet.errors import UsageError
from dgnet.graph import TOPOLOGIES, DynamicGraph, RandomGraphOptions, Topology, aggregate, find_stages, link_gates
from dgnet.models._connectivity import Connectivity
from dgnet.models._state import LoadsWrapped

register_notrace_module(DynamicGraph)  # timm's tools for torch.fx do not look inside a stage


@dataclass(frozen=True)
class BlockParts:
    """The parts of a residual block: activation(transform(x) + shortcut(x)).

    `shortcut`: the identity or a projection; None if the block has no shortcut.
    """

    transform: Transform
    shortcut: nn.Module | None
    activation: nn.Module
    in_channels: int
    out_channels: int
    stride: int
    shortcut_name: str = ""  # of the shortcut in the static block


class Transform(nn.Sequential):
    """f_j: a block's convolution path up to its last normalisation, under the static block's own module names."""

    @property
    def takes_scale(self) -> bool:
        """Whether f_j begins with a convolution without bias whose output has no more elements than its input.

        Without bias it commutes with a scale. See `StageNodes.compute`.
        """
        first, _ = self._split()
        if not isinstance(first, nn.Conv2d) or first.bias is not None:
            return False
        return first.out_channels <= first.in_channels * first.stride[0] * first.stride[1]

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """f_j(x), or f_j(scale · x) for `scale` (B,). The backward pass then keeps no scaled copy of x."""
        if scale is None:
            for module in self:
                x = module(x)
            return x
        first, rest = self._split()
        x = aggregate([first(x)], scale[:, None])
        for module in rest:
            x = module(x)
        return x

    def _split(self) -> tuple[nn.Module, list[nn.Module]]:
        """The first module and the others. If the first is timm's `ConvNormAct`, it is taken apart too."""
        first, *rest = self
        if isinstance(first, ConvNormAct):
            first, *rest = [*first.children(), *rest]
        return first, rest

    def zero_init_last(self) -> None:
        """Set γ of the last normalisation to 0, as timm's blocks do; timm's `init_weights` calls this."""
        norms = [module for module in self.children() if isinstance(module, nn.BatchNorm2d)]
        if norms:
            nn.init.zeros_(norms[-1].weight)


def take_modules(block: nn.Module, names: Sequence[str]) -> Transform:
    """The children of `block` with these names, in this order, without missing ones and identities."""
    transform = Transform()
    for name in names:
        module = getattr(block, name, None)
        if module is not None and not isinstance(module, nn.Identity):
            transform.add_module(name, module)
    return transform


def build_projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """1×1 convolution and normalisation, from the shape of a stage's input to that of its output."""
    projection: Any = downsample_conv(in_channels, out_channels, kernel_size=1, stride=stride)
    nn.init.kaiming_normal_(projection[0].weight, mode="fan_out", nonlinearity="relu")
    built: nn.Module = projection
    return built


def build_stage(parts: Sequence[BlockParts], topology: Topology, connectivity: Connectivity, stage: int) -> DynamicGraph:
    """Static blocks as a graph of N = blocks + 2 nodes. `stage`: counted from 1.

    The first block's shortcut becomes the input node. If it has none and the shape changes, a projection is built, but only if
    something reads it. Raises UsageError if blocks, topology and options do not fit together.
    """
    weighting = connectivity.build_weighting(topology, parts[0].out_channels, stage)
    node_gates = connectivity.build_node_gates(topology, parts[0].out_channels, stage)
    first = parts[0]
    for node, part in enumerate(parts, start=1):
        reads_raw = (part.in_channels, part.stride) != (part.out_channels, 1)
        if reads_raw and node not in topology.entry:
            raise UsageError(
                f"node {node} changes the shape and must be an entry node of the topology, which has {topology.entry}"
            )
        if node in topology.entry and (part.in_channels, part.stride) != (first.in_channels, first.stride):
            raise UsageError(f"node {node} cannot read the raw stage input and must not be an entry node of the topology")
        if connectivity.shortcut == "node" and part.shortcut is None and node not in topology.entry:
            raise UsageError("shortcut='node' is not possible: the blocks of this network have no shortcut; leave it out")
    activation = parts[-1].activation
    if connectivity.router_reads == "activation" and isinstance(activation, nn.Identity):
        raise UsageError(
            "router_reads='activation' has no effect: this network has no activation after additions; leave it out"
        )
    entry_shortcut = first.shortcut is not None
    reads_features = weighting.reads_features and bool(topology.free_receivers(0))
    is_read = topology.reads_input_node or reads_features or node_gates is not None
    input: nn.Module = nn.Identity()
    if is_read or (connectivity.shortcut == "node" and entry_shortcut):
        if first.shortcut is not None:
            input = first.shortcut
        elif first.in_channels != first.out_channels or first.stride != 1:
            input = build_projection(first.in_channels, first.out_channels, first.stride)
    return DynamicGraph(
        topology,
        weighting,
        input=input,
        nodes=[part.transform for part in parts],
        activation=activation,
        options=connectivity,
        entry_shortcut=entry_shortcut,
        node_gates=node_gates,
    )


def stored_options(network: nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
    """Plain arguments of `create_model` that build `network` again. `options`: those that it was built with."""
    if not isinstance(network, DynamicNetwork):
        return dict(options)
    given = Connectivity.names()
    return {**{name: value for name, value in options.items() if name not in given}, **network.stored_options()}


_WITHOUT_DECAY = tuple(f"weighting.{name}" for name in ("tau", "alpha", "static", "scale"))
"""Ends of the names of parameters that do not decay."""


class DynamicNetwork(LoadsWrapped):
    """Mixin before the static class of a network with dynamic stages: what timm's interface says of their parameters."""

    connectivity_options: dict[str, Any]
    """`Connectivity.plain_options` of the network."""
    static_names: Mapping[str, str] = MappingProxyType({})
    """Prefixes of the static network's parameter names -> prefixes of the same parameters here."""

    @property
    def graph_names(self) -> tuple[str, ...]:
        """The names of the dynamic stages, in order."""
        return tuple(name for name, module in self.named_modules() if isinstance(module, DynamicGraph))

    def translate_static(self, state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A static checkpoint with timm's names. A family whose names in torchvision differ overrides this."""
        return state_dict

    def stored_options(self) -> dict[str, Any]:
        """Plain arguments of `create_model` that give the same connectivity.

        Random graphs, and the user's own, are given by their edges instead of by options. A weighting or router of the user's
        own is given by its import path; one that has none is left out.
        """
        options = dict(self.connectivity_options)
        if options.get("topology") not in TOPOLOGIES:
            drawn = {f.name for f in fields(RandomGraphOptions)}
            options = {name: value for name, value in options.items() if name not in drawn}
            options["topology"] = [stage.topology.to_dict() for stage in find_stages(self)]
        return options

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        """The static network's initialisation, except for weightings and gates, which have their own.

        timm's class may have none, as RegNet and MobileNetV2, or one that leaves some layers as they are: weights that are new
        for certain are those of a network that `create_model` builds.
        """
        static = getattr(super(), "init_weights", None)
        deciders = [part for stage in find_stages(self) for part in (stage.weighting, stage.node_gates) if part is not None]
        # A router of the user's own may initialise its layers differently, and have no `reset_parameters`.
        before = [{name: tensor.clone() for name, tensor in part.state_dict().items()} for part in deciders]
        if static is not None:
            static(*args, **kwargs)
        for part, state in zip(deciders, before, strict=True):
            part.load_state_dict(state)
            part.reset_parameters()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each node in the backward pass: a stage keeps its N features, but nothing inside the nodes."""
        for stage in find_stages(self):
            stage.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """The names of thresholds, and of what edges weigh whatever the image is: decay would pull them towards 0."""
        return {name for name, _ in self.named_parameters() if name.endswith(_WITHOUT_DECAY)}


class DynamicFamily(DynamicNetwork):
    """Mixin before the static class of dgnet's own networks, whose stages are graphs from the start."""

    stage_names: tuple[str, ...]
    """The names of the modules that become dynamic stages, in order."""

    def static_obstacle(self, weights_of: str) -> str:
        """Why this network cannot compute the function of its static counterpart, whatever its options; "" if it can.

        `weights_of`: the name of the static model, "" if it is not known.
        """
        return ""

    @property
    def stages(self) -> list[DynamicGraph]:
        """The dynamic stages, in order."""
        return find_stages(self)

    def build_stages(self, split_block: Callable[[nn.Module], BlockParts], connectivity: Connectivity) -> None:
        """Replace the static stages, each of them a sequence of blocks, with graphs."""
        self.connectivity_options = connectivity.plain_options()
        static_names: dict[str, str] = {}
        stages = {name: dict(self.get_submodule(name).named_children()) for name in self.stage_names}
        topologies = connectivity.build_topologies([len(blocks) + 2 for blocks in stages.values()])
        for stage, ((name, blocks), topology) in enumerate(zip(stages.items(), topologies, strict=True), start=1):
            parts = [split_block(block) for block in blocks.values()]
            self.set_submodule(name, build_stage(parts, topology, connectivity, stage))
            for position, (block_name, part) in enumerate(zip(blocks, parts, strict=True)):
                if part.shortcut_name and position == 0:
                    static_names[f"{name}.{block_name}.{part.shortcut_name}."] = f"{name}.input."
                static_names[f"{name}.{block_name}."] = f"{name}.nodes.{position}."
        link_gates([stage.node_gates for stage in self.stages])
        self.static_names = static_names

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups: stem, then each node. A projection is in the group of its stage's first block."""
        matcher: dict[str, Any] = super().group_matcher(coarse=True)  # type: ignore[misc]
        if coarse:
            return matcher
        blocks = matcher["blocks"]
        (stage, _), *rest = [(blocks, None)] if isinstance(blocks, str) else blocks
        nodes = [(rf"{stage}\.nodes\.(\d+)", None), (rf"{stage}\.input", (0,)), (stage, (99999,))]
        return {**matcher, "blocks": [*nodes, *rest]}
