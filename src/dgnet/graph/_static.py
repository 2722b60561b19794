"""Static weights s_ij of a stage's free edges, learned and of either sign, and what they start at.

If all edges of a complete graph start with the same weight, all nodes of a stage read nearly the same sum. Other starts let
each node read another sum from the first step on.

Letters: N nodes of a stage, E edges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dgnet.errors import UsageError, check_choice, shorten
from dgnet.graph._edge_weights import GroupOptions
from dgnet.graph._topology import RANDOM_TOPOLOGIES, RandomGraphOptions, Topology, build_topology
from dgnet.options import option

STATIC_STARTS = ("ones", "identity", "normal", *RANDOM_TOPOLOGIES)


@dataclass(frozen=True)
class StaticOptions(RandomGraphOptions, GroupOptions):
    """Options of static weights."""

    static_start: Any = option(
        "ones",
        "start of the static weights: ones; identity: 1 from the preceding node, else 0; normal: mean 0, variance 1 / number of"
        " in-edges; er, ba, ws: 1 on the edges of such a graph, else 0; an (N, N) tensor, or a list with one for each stage",
        used_by={"weighting": ("learned", "signed", "linear")},
    )

    def check(self) -> None:
        """Raises UsageError for an unknown start."""
        if isinstance(self.static_start, str):
            check_choice("static_start", self.static_start, STATIC_STARTS)
        elif not isinstance(self.static_start, Tensor | list | tuple):
            raise UsageError(
                f"static_start is {', '.join(STATIC_STARTS)}, an (N, N) tensor or a list of these, got"
                f" {shorten(repr(self.static_start))}"
            )


def find_start(topology: Topology, options: StaticOptions, stage: int = 1) -> Tensor | None:
    """What the static weights of a stage start at, (N, N), row j for node j's in-edges; None: drawn at random ("normal").

    `stage`: counted from 1. Raises UsageError if a start weighs edges that the topology lacks, or has another size.
    """
    start, n = options.static_start, topology.num_nodes
    if isinstance(start, list | tuple):
        if stage > len(start):
            raise UsageError(f"static_start lists {len(start)} stages, the network has more")
        start = start[stage - 1]
    if isinstance(start, Tensor):
        if start.shape != (n, n) or start.is_complex() or not start.isfinite().all():
            raise UsageError(
                f"static_start of stage {stage} must be {n}×{n} finite numbers, got the shape {tuple(start.shape)}"
            )
        weights = start.detach().float().cpu()
    elif start == "normal":
        return None
    elif start == "ones":
        weights = topology.mask.float()
    elif start == "identity":
        weights = torch.zeros(n, n, device="cpu")
        for node in range(1, n):
            weights[node, topology.senders(node)[-1]] = 1.0
    else:
        graph = build_topology(start, n, options, stage)
        weights = graph.mask.float()
        for node, weight in graph.pinned.items():
            weights[node] *= weight
    if (weights != 0)[~topology.mask].any():
        raise UsageError(
            f"static_start of stage {stage} weighs an edge that the topology lacks; use topology='complete', or another start"
        )
    return weights


class EdgeOrder:
    """Where the weights of each node's free in-edges lie in one vector of all free edges: a slice for each receiving node.

    With k > 1 weights for each edge, values are (E, k) where they would be (E,).
    """

    def __init__(self, topology: Topology, edge_weights: int = 1) -> None:
        self.topology = topology
        degrees = [0 if j in topology.pinned else len(topology.senders(j)) for j in range(topology.num_nodes)]
        self.offsets = [sum(degrees[:j]) for j in range(topology.num_nodes + 1)]
        self.shape = (sum(degrees),) if edge_weights == 1 else (sum(degrees), edge_weights)
        """Of the values of all free edges."""

    def row(self, values: Tensor, node: int) -> Tensor:
        """The values of the node's in-edges, (E_j,), in the order of `topology.senders(node)`. `values`: (E,)."""
        return values[self.offsets[node] : self.offsets[node + 1]]

    @torch.no_grad()
    def fill(self, values: Tensor, start: Tensor | None, scale: float = 1.0) -> None:
        """Set `values`, (E,), to `scale` times a start; see `find_start`."""
        for node in range(1, self.topology.num_nodes):
            own = self.row(values, node)
            if start is None and len(own):
                nn.init.normal_(own, std=abs(scale) * len(own) ** -0.5)
            elif start is not None and len(own):
                values_of_edges = scale * start[node, list(self.topology.senders(node))]
                own.copy_(values_of_edges if own.ndim == 1 else values_of_edges[:, None])
