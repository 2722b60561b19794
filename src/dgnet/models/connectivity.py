"""From a static stage to a dynamic one: the two axes and their options, and the builder that all families share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from dgnet.errors import UsageError, check_choice, check_range
from dgnet.graph import (
    DynamicGraph,
    FixedWeighting,
    LearnedWeighting,
    RoutedWeighting,
    Topology,
    Weighting,
    build_topology,
    global_average_pool,
)
from dgnet.graph.topology import TopologyLike

WeightingLike = str | Callable[[Topology, int], Weighting]


@dataclass(frozen=True)
class Connectivity:
    """How the nodes of each stage are connected. The defaults are DG-Net's; what the paper leaves open is an option.

    Raises UsageError for an unknown value, and for an option that has no effect on the chosen weighting.
    """

    topology: TopologyLike = "complete"  # "complete", "residual", "chain", a mask, or a callable of num_nodes
    weighting: WeightingLike = "routed"  # "routed", "learned", "fixed", or a callable (topology, channels) -> Weighting
    shortcut: str = "edge"  # the residual shortcut is an "edge" of the graph, or stays in the "node"
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
    # Learned weighting
    learned_start: float = 1.0
    learned_activation: str = "identity"  # or "sigmoid"

    def __post_init__(self) -> None:
        if isinstance(self.weighting, str):
            check_choice("weighting", self.weighting, _OPTIONS)
        for name in ("router", "router_pool"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise UsageError(f"{name} must be a class or callable, got {getattr(self, name)!r}; see docs/extending.md")
        for name in ("router_bias", "threshold", "learned_start"):
            check_range(name, getattr(self, name))
        check_range("router_std", self.router_std, 0)
        if not isinstance(self.learn_threshold, bool):
            raise UsageError(f"learn_threshold must be true or false, got {self.learn_threshold!r}")
        for weighting, options in _OPTIONS.items():
            for name in options if weighting != self.weighting else ():
                if getattr(self, name) != getattr(type(self), name):
                    raise UsageError(
                        f"{name}={getattr(self, name)!r} has no effect with weighting={self.weighting!r};"
                        f" leave it out, or use weighting={weighting!r}"
                    )

    def plain_options(self) -> dict[str, Any]:
        """Every option that has an effect, with its value: what a checkpoint keeps, so that a new default cannot change it.

        A class or callable is left out: it has no plain form.
        """
        idle = {name for weighting, names in _OPTIONS.items() if weighting != self.weighting for name in names}
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in idle}
        return {name: value for name, value in values.items() if isinstance(value, str | bool | int | float)}

    @classmethod
    def take_from(cls, kwargs: dict[str, Any]) -> Connectivity:
        """Remove the options of this class from a model's keyword arguments and make one of them."""
        return cls(**{f.name: kwargs.pop(f.name) for f in fields(cls) if f.name in kwargs})

    def build_weighting(self, topology: Topology, channels: int) -> Weighting:
        """The weighting of one stage."""
        if not isinstance(self.weighting, str):
            return self.weighting(topology, channels)
        if self.weighting == "fixed":
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
        )


_OPTIONS = {
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
    ),
    "learned": ("learned_start", "learned_activation"),
    "fixed": (),
}


@dataclass(frozen=True)
class BlockParts:
    """A residual block taken apart: activation(transform(x) + shortcut(x)).

    `shortcut`: None where the block has none; the identity or a projection otherwise.
    """

    transform: Transform
    shortcut: nn.Module | None
    activation: nn.Module


class Transform(nn.Sequential):
    """f_j: a block's convolution path up to its last normalisation, under the static block's own module names."""

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


def build_stage(
    blocks: Sequence[nn.Module], split_block: Callable[[nn.Module], BlockParts], channels: int, connectivity: Connectivity
) -> DynamicGraph:
    """A stage of static blocks as a graph of N = blocks + 2 nodes.

    `channels`: C of the stage. The first block's shortcut becomes the input node, where something reads it.
    Raises UsageError where the topology does not fit.
    """
    parts = [split_block(block) for block in blocks]
    topology = build_topology(connectivity.topology, len(blocks) + 2)
    weighting = connectivity.build_weighting(topology, channels)
    entry_shortcut = parts[0].shortcut is not None
    in_node = connectivity.shortcut == "node" and entry_shortcut
    projection = parts[0].shortcut if topology.reads_input_node or weighting.reads_features or in_node else None
    return DynamicGraph(
        topology,
        weighting,
        input=projection if projection is not None else nn.Identity(),
        nodes=[part.transform for part in parts],
        activation=parts[-1].activation,
        shortcut=connectivity.shortcut,
        entry_shortcut=entry_shortcut,
        router_reads=connectivity.router_reads,
    )


class DynamicNetwork(nn.Module):
    """What dynamic networks add to their static class, as a mixin before it: timm's interface over `DynamicGraph` stages."""

    stage_names: tuple[str, ...]
    feature_info: Any
    connectivity_options: dict[str, Any]
    """`Connectivity.plain_options` of the network: passed to `create_model`, they build the same connectivity."""

    @property
    def stages(self) -> list[DynamicGraph]:
        """The dynamic stages, in order."""
        return [getattr(self, name) for name in self.stage_names]

    def build_stages(self, split_block: Callable[[nn.Module], BlockParts], connectivity: Connectivity) -> None:
        """Replace the static stages, each an nn.Sequential of blocks, by graphs; C of each comes from `feature_info`."""
        channels = {info["module"]: info["num_chs"] for info in self.feature_info}
        self.connectivity_options = connectivity.plain_options()
        for index, name in enumerate(self.stage_names, start=1):
            blocks = list(getattr(self, name).children())
            try:
                setattr(self, name, build_stage(blocks, split_block, channels[name], connectivity))
            except UsageError as error:
                raise UsageError(f"stage {index}: {error}") from None

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        """The static network's initialisation, then the weightings' own: it must not reach into routers."""
        super().init_weights(*args, **kwargs)  # type: ignore[misc]
        for stage in self.stages:
            if isinstance(stage, DynamicGraph):  # the static constructor calls this before the graphs are there
                stage.weighting.reset_parameters()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each node in the backward pass: a stage keeps its N features and nothing inside the nodes."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Thresholds and learned edge weights: decay would pull them towards 0."""
        return {name for name, _ in self.named_parameters() if name.endswith(("weighting.tau", "weighting.alpha"))}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups: stem, then each node; a projection goes with its stage's first block."""
        if coarse:
            return {"stem": r"^conv1|bn1|maxpool", "blocks": r"^layer(\d+)"}
        return {
            "stem": r"^conv1|bn1|maxpool",
            "blocks": [(r"^layer(\d+)\.nodes\.(\d+)", None), (r"^layer(\d+)\.input", (0,)), (r"^layer(\d+)", (99999,))],
        }
