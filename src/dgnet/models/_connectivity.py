"""The two axes, which edges exist and what they weigh, and their options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from random import Random
from typing import Any

from torch import Tensor, nn

from dgnet.errors import UsageError, check_choice, check_range
from dgnet.graph import (
    FixedWeighting,
    LearnedWeighting,
    NodeGates,
    RoutedWeighting,
    Topology,
    Weighting,
    build_topology,
    global_average_pool,
)
from dgnet.graph._topology import TOPOLOGIES, TopologyLike

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
    router_start: str = "complete"  # the topology of the edges that start open, within a complete one
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
        check_choice("router_start", self.router_start, TOPOLOGIES)
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
        if self.router_start != "complete":
            if self.topology != "complete":
                raise UsageError(f"router_start={self.router_start!r} opens a part of topology='complete', which it needs")
            if self.router is not None:
                raise UsageError(f"router_start={self.router_start!r} has no effect with a router of your own; leave it out")

    def _idle_options(self) -> dict[str, str]:
        """Options without effect on the chosen values of the axes, and an axis that each belongs to."""
        weightings = [self.weighting] if isinstance(self.weighting, str) else []
        topologies = [*self._topology_names(), self.router_start]
        chosen = {"topology": topologies, "weighting": weightings, "node_gate": [self.node_gate]}
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

    def build_weighting(self, topology: Topology, channels: int, stage: int) -> Weighting:
        """The weighting of one stage, counted from 1; a topology that pins all its edges leaves nothing to learn.

        Raises UsageError, naming the stage, where `router_start` does not fit its number of nodes.
        """
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
            start=self._build_topology(self.router_start, stage, topology.num_nodes),
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
        "router_start",
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
