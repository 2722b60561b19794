"""The two axes, topology (which edges exist) and weighting (what they weigh), with all their options in one value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from dgnet.code import CODE_OPTIONS, code_path, find_code, is_code_path
from dgnet.errors import UsageError, check_choice, shorten
from dgnet.graph import (
    OWN_WEIGHTING,
    TOPOLOGY_NAMES,
    FixedWeighting,
    GateOptions,
    LearnedOptions,
    LearnedWeighting,
    LinearWeighting,
    NetworkGates,
    NodeGates,
    RoutedWeighting,
    SignedOptions,
    SignedWeighting,
    SoftmaxWeighting,
    StageOptions,
    Topology,
    TopologyLike,
    Weighting,
    build_topology,
)
from dgnet.models._own_code import check_callable, check_weighting
from dgnet.options import Options, is_used, option

WEIGHTING_NAMES = ("routed", "signed", "linear", "softmax", "learned", "fixed")
WeightingLike = str | Callable[[Topology, int], Weighting]


@dataclass(frozen=True)
class Axes(Options):
    """The two axes."""

    topology: TopologyLike | list[Any] = option(
        "complete", "a name, names with commas (one for each stage), a mask, a callable of num_nodes, or a list of these"
    )
    weighting: WeightingLike = option(
        "routed", f"{', '.join(WEIGHTING_NAMES)}, or a callable (topology, channels) -> Weighting"
    )

    def check(self) -> None:
        """Raises UsageError for an unknown name, and for what is neither a name nor anything else that is allowed."""
        if isinstance(self.weighting, str):
            check_choice("weighting", self.weighting, WEIGHTING_NAMES)
        elif not callable(self.weighting):
            raise UsageError(
                f"weighting is {', '.join(WEIGHTING_NAMES)} or a callable (topology, channels) -> Weighting, got"
                f" {shorten(repr(self.weighting))}"
            )
        if not (callable(self.topology) or isinstance(self.topology, str | Topology | Tensor | Mapping | list | tuple)):
            raise UsageError(
                f"topology is a name, a mask, a callable of num_nodes or a list of these, got {shorten(repr(self.topology))}"
            )
        for name in self.topology_names():
            check_choice("topology", name, TOPOLOGY_NAMES)

    def topology_names(self) -> list[str]:
        """The topologies that are given by name, one for each stage or one for all."""
        if isinstance(self.topology, str):
            return [name.strip() for name in self.topology.split(",")]
        return [name for name in self.topology if isinstance(name, str)] if isinstance(self.topology, list | tuple) else []


@dataclass(frozen=True)
class Connectivity(GateOptions, SignedOptions, LearnedOptions, StageOptions, Axes):
    """How the nodes of each stage are connected. The defaults are DG-Net's; what the paper does not specify is an option.

    Each base class is a group of options, defined in the module that uses it. That module receives this object whole.

    Raises UsageError for an unknown value, and for an option that has no effect on the chosen topology or weighting.
    """

    def __post_init__(self) -> None:
        for name in CODE_OPTIONS:
            value = getattr(self, name)
            if is_code_path(value):
                object.__setattr__(self, name, find_code(value, name))
            check_callable(name, getattr(self, name))
        super().__post_init__()

    def check(self) -> None:
        """Raises UsageError for an option without effect."""
        chosen = self._chosen()
        for f in fields(self):
            if not is_used(f, chosen) and getattr(self, f.name) != f.default:
                axis, names = next(iter(f.metadata["used_by"].items()))
                allowed = " or ".join(f"{axis}={name!r}" for name in names if name != OWN_WEIGHTING)
                raise UsageError(
                    f"{f.name}={getattr(self, f.name)!r} has no effect with {axis}={getattr(self, axis)!r};"
                    f" leave it out, or use {allowed}"
                )
        if self.two_way and self.shortcut != "node":
            raise UsageError("two_way needs shortcut='node': with shortcut='edge' a node has no shortcut of its own")
        if self.router_start != "complete":
            if self.topology != "complete":
                raise UsageError(f"router_start={self.router_start!r} opens a part of topology='complete'; leave topology out")
            if self.router is not None:
                raise UsageError(f"router_start={self.router_start!r} has no effect with a router of your own; leave it out")

    def _chosen(self) -> dict[str, list[str]]:
        """For each axis, the values that are in use."""
        starts = [start for start in (self.router_start, self.static_start) if isinstance(start, str)]
        return {
            "topology": [*self.topology_names(), *starts],
            "weighting": [self.weighting] if isinstance(self.weighting, str) else [OWN_WEIGHTING],
            "node_gate": [self.node_gate],
            "gate_reads": [self.gate_reads],
        }

    def plain_options(self) -> dict[str, Any]:
        """Every option that has an effect, with its value, also if it is the default: defaults may change later.

        A class or function is given by its import path. One that has none is left out: it has no plain form.
        """
        chosen = self._chosen()
        values = {f.name: getattr(self, f.name) for f in fields(self) if is_used(f, chosen)}
        values |= {name: code_path(values[name]) for name in CODE_OPTIONS if callable(values.get(name))}
        return {name: value for name, value in values.items() if isinstance(value, str | bool | int | float)}

    @classmethod
    def names(cls) -> list[str]:
        """The names of all options."""
        return [f.name for f in fields(cls)]

    @classmethod
    def take_from(cls, kwargs: dict[str, Any]) -> Connectivity:
        """Remove the options of this class from a model's keyword arguments, and build an object of this class from them."""
        return cls(**{name: kwargs.pop(name) for name in cls.names() if name in kwargs})

    def build_topologies(self, nodes: Sequence[int]) -> list[Topology]:
        """The topology of each stage. `nodes`: their numbers of nodes. Each stage draws its own random graph.

        Raises UsageError, which names the stage, if one does not fit.
        """
        listed = self.topology
        if isinstance(listed, str) and "," in listed:
            listed = self.topology_names()
        if isinstance(listed, list | tuple) and len(listed) != len(nodes):
            raise UsageError(f"topology lists {len(listed)} stages, the network has {len(nodes)}")
        each = listed if isinstance(listed, list | tuple) else [listed] * len(nodes)
        return [self._build_topology(one, stage, n) for stage, (one, n) in enumerate(zip(each, nodes, strict=True), start=1)]

    def _build_topology(self, topology: TopologyLike, stage: int, num_nodes: int) -> Topology:
        try:
            return build_topology(topology, num_nodes, self, stage)
        except UsageError as error:
            raise UsageError(f"stage {stage}: {error}") from None

    def build_weighting(self, topology: Topology, channels: int, stage: int) -> Weighting:
        """The weighting of one stage, counted from 1; a fixed one if all edges are pinned.

        Raises UsageError, which names the stage, if `router_start` does not fit its number of nodes.
        """
        if not isinstance(self.weighting, str):
            return check_weighting(self.weighting(topology, channels), self.weighting)
        if self.weighting == "fixed" or not any(map(topology.free_receivers, range(topology.num_nodes))):
            return FixedWeighting(topology, channels)
        if self.weighting == "learned":
            return LearnedWeighting(topology, channels, self, stage)
        if self.weighting == "signed":
            return SignedWeighting(topology, channels, self, stage)
        if self.weighting == "linear":
            return LinearWeighting(topology, channels, self, stage)
        if self.weighting == "softmax":
            return SoftmaxWeighting(topology, channels, self)
        start = self._build_topology(self.router_start, stage, topology.num_nodes)
        return RoutedWeighting(topology, channels, self, start)

    def build_node_gates(self, topology: Topology, channels: int, stage: int) -> NodeGates | None:
        """The block gates of one stage, counted from 1, or None.

        Raises UsageError, which names the stage, if one closed gate would cut it.
        """
        if self.node_gate == "none":
            return None
        try:
            kind = NetworkGates if self.gate_reads == "network" else NodeGates
            return kind(topology, channels, self)
        except UsageError as error:
            raise UsageError(f"stage {stage}: {error}") from None
