"""From a static stage to a dynamic one: the two axes and their options, and the builder that all families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from random import Random
from types import MappingProxyType
from typing import Any

from timm.layers import ConvNormAct
from timm.models.resnet import downsample_conv
from torch import Tensor, nn

from dgnet.errors import UsageError, check_choice, check_range
from dgnet.graph import (
    DynamicGraph,
    FixedWeighting,
    LearnedWeighting,
    NodeGates,
    RoutedWeighting,
    Topology,
    Weighting,
    aggregate,
    build_topology,
    find_stages,
    global_average_pool,
)
from dgnet.graph.topology import TOPOLOGIES, TopologyLike

WeightingLike = str | Callable[[Topology, int], Weighting]


@dataclass(frozen=True)
class Connectivity:
    """How the nodes of each stage are connected. The defaults are DG-Net's; what the paper leaves open is an option.

    Raises UsageError for an unknown value, and for an option that has no effect on the chosen topology or weighting.
    """

    # A name, names with commas (one a stage), a mask, a callable of num_nodes, or a list of these (one a stage).
    topology: TopologyLike | list[Any] = "complete"
    weighting: WeightingLike = "routed"  # "routed", "learned", "fixed", or a callable (topology, channels) -> Weighting
    shortcut: str = "edge"  # the residual shortcut is an "edge" of the graph, or stays in the "node"
    # Random topologies (Xie et al., 2019)
    topology_seed: int = 0
    er_p: float = 0.2
    ba_m: int = 5
    ws_k: int = 4
    ws_p: float = 0.75
    # Routed weighting
    router: Callable[[int, int], nn.Module] | None = None  # (channels, num_edges) -> module: (B, C) -> α (B, E); None: Router
    router_bias: float = 3.0  # b at start: +3 opens every edge (§6.4, Fig. 4)
    router_std: float = 0.01  # W at start
    router_reads: str = "feature"  # routers see the "feature" that is distributed, or its "activation"
    router_pool: Callable[[Tensor], Tensor] | None = None  # (B, C, H, W) -> (B, C); None: global average pooling
    gate: str = "psi"  # training weight: "psi" = α·σ(α - τ), or "alpha"
    threshold: float = 0.0  # τ at start
    learn_threshold: bool = True
    inference_weight: str = "gated"  # an open edge in evaluation weighs as in training, or its "raw" α (Eq. 5)
    # Gates on blocks, whatever the weighting
    node_gate: str = "none"  # "hard", or "gumbel" with noise in training: a block runs for a sample or does not
    node_gate_bias: float = 2.0  # at start: a gumbel gate is open with probability σ(2) = 0.88, a hard one open
    threshold_offset: float = 0.0  # in evaluation edges close under τ + offset, gates under ½ + offset
    # Learned weighting
    learned_start: float = 1.0
    learned_activation: str = "identity"  # or "sigmoid"

    def __post_init__(self) -> None:
        if isinstance(self.weighting, str):
            check_choice("weighting", self.weighting, _WEIGHTING_OPTIONS)
        for name in self._topology_names():
            check_choice("topology", name, TOPOLOGIES)
        for name in ("router", "router_pool"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise UsageError(f"{name} must be a class or callable, got {getattr(self, name)!r}; see docs/extending.md")
        check_choice("node_gate", self.node_gate, _NODE_GATE_OPTIONS)
        for name in ("router_bias", "threshold", "threshold_offset", "node_gate_bias", "learned_start"):
            check_range(name, getattr(self, name))
        check_range("router_std", self.router_std, 0)
        if self.learned_start == 0 and self.learned_activation == "identity":
            raise UsageError(
                "learned_start must not be 0: edges that weigh 0 count as closed, and nothing would reach the output"
            )
        for name in ("topology_seed", "ba_m", "ws_k"):
            if not isinstance(getattr(self, name), int):
                raise UsageError(f"{name} must be a whole number, got {getattr(self, name)!r}")
        if not isinstance(self.learn_threshold, bool):
            raise UsageError(f"learn_threshold must be true or false, got {self.learn_threshold!r}")
        for option, axis in self._idle_options().items():
            if getattr(self, option) != getattr(type(self), option):
                allowed = " or ".join(f"{axis}={value!r}" for value in _AXES[axis] if option in _AXES[axis][value])
                raise UsageError(
                    f"{option}={getattr(self, option)!r} has no effect with {axis}={getattr(self, axis)!r};"
                    f" leave it out, or use {allowed}"
                )

    def _idle_options(self) -> dict[str, str]:
        """Options without effect on the chosen values of the axes, and an axis that each belongs to."""
        weightings = [self.weighting] if isinstance(self.weighting, str) else []
        chosen = {"topology": self._topology_names(), "weighting": weightings, "node_gate": [self.node_gate]}
        used = {option for axis, names in chosen.items() for name in names for option in _AXES[axis][name]}
        if not weightings:
            used.add("router_reads")  # the stage applies it, whatever the user's own weighting is
        belongs: dict[str, str] = {}
        for axis, options in _AXES.items():
            for option in (option for named in options.values() for option in named):
                belongs.setdefault(option, axis)
        return {option: axis for option, axis in belongs.items() if option not in used}

    def _topology_names(self) -> list[str]:
        if isinstance(self.topology, str):
            return [name.strip() for name in self.topology.split(",")]
        return [name for name in self.topology if isinstance(name, str)] if isinstance(self.topology, list) else []

    def plain_options(self) -> dict[str, Any]:
        """Every option that has an effect, with its value, so that a new default cannot change an old run.

        A class or callable is left out: it has no plain form.
        """
        idle = self._idle_options()
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in idle}
        return {name: value for name, value in values.items() if isinstance(value, str | bool | int | float)}

    @classmethod
    def take_from(cls, kwargs: dict[str, Any]) -> Connectivity:
        """Remove the options of this class from a model's keyword arguments and make one of them."""
        return cls(**{f.name: kwargs.pop(f.name) for f in fields(cls) if f.name in kwargs})

    def build_topologies(self, nodes: Sequence[int]) -> list[Topology]:
        """The topology of each stage, from its number of nodes. A random one differs from stage to stage.

        Raises UsageError, naming the stage, where one does not fit.
        """
        listed = self.topology
        if isinstance(listed, str) and "," in listed:
            listed = self._topology_names()
        if isinstance(listed, list) and len(listed) != len(nodes):
            raise UsageError(f"topology lists {len(listed)} stages, the network has {len(nodes)}")
        each = listed if isinstance(listed, list) else [listed] * len(nodes)
        return [self._build_topology(one, stage, n) for stage, (one, n) in enumerate(zip(each, nodes, strict=True), start=1)]

    def _build_topology(self, topology: TopologyLike, stage: int, num_nodes: int) -> Topology:
        options: dict[str, Any] = {}
        if isinstance(topology, str) and TOPOLOGY_OPTIONS.get(topology):
            options = {name: getattr(self, name) for name in TOPOLOGY_OPTIONS[topology] if name != "topology_seed"}
            options["rng"] = Random(f"{self.topology_seed}/{stage}")
        try:
            return build_topology(topology, num_nodes, **options)
        except UsageError as error:
            raise UsageError(f"stage {stage}: {error}") from None

    def build_weighting(self, topology: Topology, channels: int) -> Weighting:
        """The weighting of one stage; a topology that pins all its edges leaves nothing to learn."""
        if not isinstance(self.weighting, str):
            return self.weighting(topology, channels)
        if self.weighting == "fixed" or not any(map(topology.free_receivers, range(topology.num_nodes))):
            return FixedWeighting(topology, channels)
        if self.weighting == "learned":
            return LearnedWeighting(topology, channels, self.learned_start, self.learned_activation)
        return RoutedWeighting(
            topology,
            channels,
            router=self.router,
            bias=self.router_bias,
            std=self.router_std,
            pool=self.router_pool or global_average_pool,
            gate=self.gate,
            threshold=self.threshold,
            learn_threshold=self.learn_threshold,
            inference_weight=self.inference_weight,
            offset=self.threshold_offset,
        )

    def build_node_gates(self, topology: Topology, channels: int) -> NodeGates | None:
        """The gates of one stage's blocks, if any."""
        if self.node_gate == "none":
            return None
        return NodeGates(topology, channels, self.node_gate, self.node_gate_bias, offset=self.threshold_offset)


# Which options have an effect on which value of an axis.
TOPOLOGY_OPTIONS: dict[str, tuple[str, ...]] = {
    "complete": (),
    "residual": (),
    "chain": (),
    "er": ("topology_seed", "er_p"),
    "ba": ("topology_seed", "ba_m"),
    "ws": ("topology_seed", "ws_k", "ws_p"),
}
_WEIGHTING_OPTIONS: dict[str, tuple[str, ...]] = {
    "routed": (
        "router",
        "router_bias",
        "router_std",
        "router_reads",
        "router_pool",
        "gate",
        "threshold",
        "learn_threshold",
        "inference_weight",
        "threshold_offset",
    ),
    "learned": ("learned_start", "learned_activation"),
    "fixed": (),
}
_GATED = ("node_gate_bias", "threshold_offset", "router_reads")
_NODE_GATE_OPTIONS: dict[str, tuple[str, ...]] = {"none": (), "hard": _GATED, "gumbel": _GATED}
_AXES = {"topology": TOPOLOGY_OPTIONS, "weighting": _WEIGHTING_OPTIONS, "node_gate": _NODE_GATE_OPTIONS}


@dataclass(frozen=True)
class BlockParts:
    """A residual block taken apart: activation(transform(x) + shortcut(x)).

    `shortcut`: None where the block has none; the identity or a projection otherwise.
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
        """Whether f_j begins with a convolution that commutes with a scale and writes no more than it reads."""
        first, _ = self._split()
        if not isinstance(first, nn.Conv2d) or first.bias is not None:
            return False
        return first.out_channels <= first.in_channels * first.stride[0] * first.stride[1]

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """f_j(x), or f_j(scale · x) for `scale` (B,), without a scaled copy of x for the backward pass to keep."""
        if scale is None:
            return super().forward(x)
        first, rest = self._split()
        x = aggregate([first(x)], scale[:, None])
        for module in rest:
            x = module(x)
        return x

    def _split(self) -> tuple[nn.Module, list[nn.Module]]:
        """The first module and the others, timm's convolution with normalisation and activation taken apart."""
        first, *rest = self
        if isinstance(first, ConvNormAct):
            first, *rest = [*first.children(), *rest]
        return first, rest

    def zero_init_last(self) -> None:
        """Start the last normalisation at γ = 0, as timm's blocks do; timm's `init_weights` calls this."""
        norms = [module for module in self.children() if isinstance(module, nn.BatchNorm2d)]
        if norms:
            nn.init.zeros_(norms[-1].weight)


def take_modules(block: nn.Module, names: Sequence[str]) -> Transform:
    """The named children of `block` in this order, without those that are absent or do nothing."""
    transform = Transform()
    for name in names:
        module = getattr(block, name, None)
        if module is not None and not isinstance(module, nn.Identity):
            transform.add_module(name, module)
    return transform


def build_projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """1×1 convolution and normalisation: brings a stage's input to its output's shape."""
    projection: Any = downsample_conv(in_channels, out_channels, kernel_size=1, stride=stride)
    nn.init.kaiming_normal_(projection[0].weight, mode="fan_out", nonlinearity="relu")
    return projection


def build_stage(parts: Sequence[BlockParts], topology: Topology, connectivity: Connectivity) -> DynamicGraph:
    """A stage of static blocks as a graph of N = blocks + 2 nodes.

    The first block's shortcut becomes the input node; where it has none and the shape changes, a projection is added. It is
    built only if something reads it. Raises UsageError where blocks, topology and options do not fit together.
    """
    weighting = connectivity.build_weighting(topology, parts[0].out_channels)
    node_gates = connectivity.build_node_gates(topology, parts[0].out_channels)
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
            raise UsageError("shortcut='node' cannot be had: the blocks of this network have no shortcut; leave it out")
    activation = parts[-1].activation
    if connectivity.router_reads == "activation" and isinstance(activation, nn.Identity):
        raise UsageError("router_reads='activation' has no effect: nothing follows the addition in this network; leave it out")
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
        shortcut=connectivity.shortcut,
        entry_shortcut=entry_shortcut,
        router_reads=connectivity.router_reads,
        node_gates=node_gates,
    )


def stored_options(network: nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
    """Plain arguments of `create_model` that build `network` again, which was built with `options`."""
    if not isinstance(network, DynamicNetwork):
        return dict(options)
    given = {f.name for f in fields(Connectivity)}
    return {**{name: value for name, value in options.items() if name not in given}, **network.stored_options()}


class DynamicNetwork(nn.Module):
    """What dynamic networks add to their static class, as a mixin before it: timm's interface over `DynamicGraph` stages."""

    stage_names: tuple[str, ...]
    connectivity_options: dict[str, Any]
    """`Connectivity.plain_options` of the network."""
    static_names: Mapping[str, str] = MappingProxyType({})
    """How the static network's parameter names begin, and how the same parameters' names begin here."""

    @property
    def stages(self) -> list[DynamicGraph]:
        """The dynamic stages, in order."""
        return find_stages(self)

    def build_stages(self, split_block: Callable[[nn.Module], BlockParts], connectivity: Connectivity) -> None:
        """Replace the static stages, each a sequence of blocks, by graphs."""
        self.connectivity_options = connectivity.plain_options()
        static_names: dict[str, str] = {}
        stages = {name: dict(self.get_submodule(name).named_children()) for name in self.stage_names}
        topologies = connectivity.build_topologies([len(blocks) + 2 for blocks in stages.values()])
        for (name, blocks), topology in zip(stages.items(), topologies, strict=True):
            parts = [split_block(block) for block in blocks.values()]
            self.set_submodule(name, build_stage(parts, topology, connectivity))
            for position, (block_name, part) in enumerate(zip(blocks, parts, strict=True)):
                if part.shortcut_name and position == 0:
                    static_names[f"{name}.{block_name}.{part.shortcut_name}."] = f"{name}.input."
                static_names[f"{name}.{block_name}."] = f"{name}.nodes.{position}."
        self.static_names = static_names

    def translate_static(self, state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A static checkpoint under timm's names; a family whose torchvision names differ overrides this."""
        return state_dict

    def stored_options(self) -> dict[str, Any]:
        """Plain arguments of `create_model` that give the same connectivity; graphs without a fixed name by their edges.

        They stand in place of the options of `Connectivity` that the network was built with. A weighting or router of the
        user's own has no plain form and is left out.
        """
        drawn = {option for options in TOPOLOGY_OPTIONS.values() for option in options}
        options = {name: value for name, value in self.connectivity_options.items() if name not in drawn}
        if TOPOLOGY_OPTIONS.get(options.get("topology", "")) != ():
            options["topology"] = [stage.topology.to_dict() for stage in self.stages]
        return options

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        """The static network's initialisation, then the weightings' own: it must not reach into routers."""
        static = getattr(super(), "init_weights", None)
        deciders = [part for stage in self.stages for part in (stage.weighting, stage.node_gates) if part is not None]
        # A router of the user's own may have started its layers as it likes, and have no `reset_parameters`.
        before = [{name: tensor.clone() for name, tensor in part.state_dict().items()} for part in deciders]
        if static is not None:
            static(*args, **kwargs)
        for part, state in zip(deciders, before, strict=True):
            part.load_state_dict(state)
            part.reset_parameters()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each node in the backward pass: a stage keeps its N features and nothing inside the nodes."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Thresholds and learned edge weights: decay would pull them towards 0."""
        return {name for name, _ in self.named_parameters() if name.endswith(("weighting.tau", "weighting.alpha"))}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups: stem, then each node; a projection goes with its stage's first block."""
        matcher: dict[str, Any] = super().group_matcher(coarse=True)  # type: ignore[misc]
        if coarse:
            return matcher
        blocks = matcher["blocks"]
        (stage, _), *rest = [(blocks, None)] if isinstance(blocks, str) else blocks
        nodes = [(rf"{stage}\.nodes\.(\d+)", None), (rf"{stage}\.input", (0,)), (stage, (99999,))]
        return {**matcher, "blocks": [*nodes, *rest]}
