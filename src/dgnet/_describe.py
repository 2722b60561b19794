"""Describe a dynamic network: its stages, what stayed static and why, what it costs, and how to fine-tune it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dgnet._cost import CostModel, StageCost, cost_model
from dgnet.errors import UsageError
from dgnet.graph import DynamicGraph, find_stages, require_stages
from dgnet.models import (
    Agreement,
    ConvertedNetwork,
    DynamicNetwork,
    Increment,
    add_gates,
    as_words,
    find_image_size,
    missing_options,
)

_BUDGET = 0.7
"""Of the next command, where the network can reach it."""
_RECIPE = ("--optimizer", "adamw", "--lr", "2e-4")
_ADVICE = "AdamW with a rate of 1e-4 to 5e-4 suits trained weights; the defaults of dgnet train are for training from scratch"
_NAMES = 6
"""Of blocks in a line, at most."""


@dataclass(frozen=True)
class StageDescription:
    """A dynamic stage."""

    name: str  # of its module
    block_class: str
    blocks: int
    edges: int
    added_params: int  # of routers, gates and thresholds, and of a projection that the static network does not have
    multiply_adds: int  # of one image, with every edge open
    skippable: float  # percent of the network's multiply-adds that need not run if its blocks have gates


@dataclass(frozen=True)
class StaticDescription:
    """Blocks that stayed static for the same reason."""

    reason: str
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class Description:
    """What a dynamic network is. `print` shows it as text; `dataclasses.asdict` gives plain values."""

    network: str  # class
    image_size: tuple[int, int]  # height, width in pixels, for which multiply-adds are counted
    stages: tuple[StageDescription, ...]
    static: tuple[StaticDescription, ...]  # empty for dgnet's own networks
    gated: tuple[str, ...]  # single blocks that become stages too if gates are added
    params: int
    added_params: int
    multiply_adds: int  # of one image, with every edge open
    router_multiply_adds: int  # of routers and gates, part of `multiply_adds`
    least_budget: float  # the lowest --budget of dgnet train, which adds gates: the share that always runs
    agreement: Agreement | None  # with the static network, if it was checked
    next_command: str

    def __str__(self) -> str:
        blocks = sum(stage.blocks for stage in self.stages)
        lines = [
            f"{self.network}: {_count(len(self.stages), 'dynamic stage')} of {_count(blocks, 'block')}",
            "",
            *self._table(),
            "",
        ]
        if self.static:
            lines += [f"static: {_list(group.blocks)}: {group.reason}" for group in self.static] + [""]
        share = 100 * self.added_params / max(self.params - self.added_params, 1)
        size, routers = "×".join(map(str, self.image_size)), 100 * self.router_multiply_adds / max(self.multiply_adds, 1)
        lines += [
            f"parameters {self.params:,}, of which {self.added_params:,} are added ({share:+.2f} %)",
            f"multiply-adds at {size} pixels {self.multiply_adds / 1e6:,.2f} M, of which routers and gates {routers:.2f} %",
            f"least budget {self.least_budget:.3f}: the share that always runs, if blocks have gates (--budget adds them"
            + (f", also to {_list(self.gated)})" if self.gated else ")"),
        ]
        if self.agreement is not None:
            lines.append(describe_agreement(self.agreement))
        return "\n".join([*lines, f"next: {self.next_command}", f"      ({_ADVICE})"])

    def _table(self) -> list[str]:
        rows: list[tuple[str, ...]] = [("stage", "blocks", "", "edges", "added params", "MAdds M", "can be skipped")]
        for stage in self.stages:
            figures = f"{stage.added_params:,}", f"{stage.multiply_adds / 1e6:,.2f}", f"{stage.skippable:.1f} %"
            rows.append((stage.name, str(stage.blocks), stage.block_class, str(stage.edges), *figures))
        skippable = f"{sum(stage.skippable for stage in self.stages):.1f} %"
        total = sum(stage.multiply_adds for stage in self.stages)
        added = sum(stage.added_params for stage in self.stages)
        rows.append(
            ("all", str(sum(stage.blocks for stage in self.stages)), "", "", f"{added:,}", f"{total / 1e6:,.2f}", skippable)
        )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        is_text = (True, False, True, False, False, False, False)
        return [
            "  ".join(
                cell.ljust(width) if left else cell.rjust(width) for cell, width, left in zip(row, widths, is_text, strict=True)
            ).rstrip()
            for row in rows
        ]


def describe(
    model: nn.Module,
    image_size: int | tuple[int, int] | None = None,
    *,
    name: str | None = None,
    weights: str = "FILE",
    model_kwargs: Mapping[str, Any] | None = None,
) -> Description:
    """Describe a network with dynamic stages, from `dgnet.convert` or one of dgnet's own.

    `image_size`: pixels, side or height and width; by default the network's own. For the next command: `name` of the model, by
    default the one in its timm config; `weights` that it was made from; `model_kwargs` that it was created with, besides those
    of its connectivity.

    Raises UsageError for a network without dynamic stages, and for a size that it cannot take.
    """
    require_stages(model)
    size = find_image_size(model, image_size)
    graphs = {name: module for name, module in model.named_modules() if isinstance(module, DynamicGraph)}
    costs = cost_model(model, size)
    gated, gated_costs = _add_gates(model, list(graphs), costs, size)
    added = {stage: _count_added(model, stage) for stage in graphs}
    stages = tuple(
        StageDescription(
            stage,
            _find_class(graph),
            len(graph.topology.blocks),
            graph.topology.num_edges,
            added[stage],
            cost.dense,
            100 * (gated[stage].dense - gated[stage].least) / max(gated_costs.dense, 1),
        )
        for (stage, graph), cost in zip(graphs.items(), costs.stages, strict=True)
    )
    conversion = model.conversion if isinstance(model, ConvertedNetwork) else None
    least = gated_costs.least / max(gated_costs.dense, 1)
    return Description(
        network=type(model).__name__,
        image_size=size,
        stages=stages,
        static=() if conversion is None else _group((block.name, block.reason) for block in conversion.static),
        gated=tuple(name for name in gated if name not in graphs),
        params=sum(parameter.numel() for parameter in model.parameters()),
        added_params=sum(added.values()),
        multiply_adds=costs.dense,
        router_multiply_adds=sum(sum(cost.routers) for cost in costs.stages),
        least_budget=least,
        agreement=None if conversion is None else conversion.agreement,
        next_command=_next_command(model, name, weights, model_kwargs or {}, size, least),
    )


def _add_gates(
    model: nn.Module, stages: Sequence[str], costs: CostModel, size: tuple[int, int]
) -> tuple[dict[str, StageCost], CostModel]:
    """The costs if every block has a gate, by stage and in total. `costs`: of the network as it is, with these `stages`."""
    # The gates of these stages cost next to nothing: only the input and the output node always run.
    own = [replace(stage, always=(0, stage.topology.output)) for stage in costs.stages]
    by_name = dict(zip(stages, own, strict=True))
    if not isinstance(model, ConvertedNetwork) or any(stage.has_gates for stage in find_stages(model)):
        return by_name, replace(costs, stages=own)
    gated: Any = add_gates(model, size)
    total = cost_model(gated, size)
    return {**by_name, **dict(zip(gated.graph_names, total.stages, strict=True))}, total


def describe_agreement(agreement: Agreement) -> str:
    """One line."""
    line = (
        f"on {_count(agreement.images, 'photo')} the logits differ from the static network's by at most"
        f" {agreement.difference:.1e} of the largest one; the same class for {agreement.same_class:.2f} %"
    )
    if agreement.top1 is not None:
        line += f"; top-1 {agreement.top1:.2f} %, of the static network {agreement.top1_static:.2f} %"
    return line


def _find_class(graph: DynamicGraph) -> str:
    """The class of a stage's blocks, which may be of several."""
    blocks = [node.block if isinstance(node, Increment) else node for node in graph.nodes]
    return ", ".join(dict.fromkeys(type(block).__name__ for block in blocks))


def _count_added(network: nn.Module, stage: str) -> int:
    """The parameters of a stage that belong to no block and that the static network does not have."""
    static = tuple(network.static_names.values()) if isinstance(network, DynamicNetwork) else ()
    graph = network.get_submodule(stage)
    prefix = f"{stage}." if stage else ""
    return sum(
        parameter.numel()
        for name, parameter in graph.named_parameters()
        if not name.startswith("nodes.") and not f"{prefix}{name}".startswith(static)
    )


def _group(static: Iterable[tuple[str, str]]) -> tuple[StaticDescription, ...]:
    """Pairs of block and reason, as one entry for each reason."""
    groups: dict[str, list[str]] = {}
    for block, reason in static:
        groups.setdefault(reason, []).append(block)
    return tuple(StaticDescription(reason, tuple(blocks)) for reason, blocks in groups.items())


def _next_command(
    network: nn.Module,
    name: str | None,
    weights: str,
    model_kwargs: Mapping[str, Any],
    image_size: tuple[int, int],
    least: float,
) -> str:
    """The command that fine-tunes the network."""
    cfg = getattr(network, "pretrained_cfg", None) or {}
    words = ["dgnet", "train", "--model", name or cfg.get("architecture", "NAME")]
    stored = network.stored_options() if isinstance(network, DynamicNetwork) else {}
    options = {**model_kwargs, **missing_options(stored)}
    options.pop("img_size", None)
    budget = _BUDGET if least < _BUDGET - 0.05 else math.ceil(50 * (1 + least)) / 100  # half-way to 1, rounded up
    if budget < 1 and options.get("node_gate") == "hard":
        del options["node_gate"]  # --budget adds them
    words += ["--dynamic", "true"] if options.pop("dynamic", False) else []
    words += ["--weights", weights]
    words += ["--budget", f"{budget:g}"] if budget < 1 else []
    words += ["--data", "DATA", *_RECIPE]
    if image_size != tuple(cfg.get("input_size", (3, *image_size))[1:]):
        words += ["--image-size", str(max(image_size))]
    try:
        words += as_words(options)
    except TypeError as error:
        raise UsageError(f"model_kwargs has a value that the command line cannot take: {error}") from error
    return shlex.join(words)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return ", ".join(names[:_NAMES]) + more
