"""The parts of a stage, and what one node computes: x_j = f_j(Σ α_ij x_i) (Eq. 3).

Letters: B batch, N nodes of a stage, E in-edges of a node, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dgnet.errors import UsageError, check_choice, check_range
from dgnet.graph._aggregate import aggregate
from dgnet.graph._edge_weights import mean_of_edge, split_ways, sum_in_groups
from dgnet.graph._gating import NodeGates
from dgnet.graph._layout import LAYOUTS
from dgnet.graph._sharing import Sharing
from dgnet.graph._topology import Topology
from dgnet.graph._weighting import Weighting
from dgnet.options import Options, option

OWN_WEIGHTING = "<your own>"
"""The name of any weighting of the user's own among the values of the axis `weighting`."""


class Further(NamedTuple):
    """What every block of a stage is called with besides its feature, the same for all samples. Usually nothing."""

    values: tuple[Any, ...]
    named: dict[str, Any]


NOTHING = Further((), {})


_READERS = {"weighting": ("routed", "signed", "linear", "softmax", OWN_WEIGHTING), "node_gate": ("hard", "gumbel")}


@dataclass(frozen=True)
class StageOptions(Options):
    """Options of a stage that do not belong to topology or weighting."""

    shortcut: str = option("edge", "the residual shortcut is an edge of the graph, or stays in the node", ("edge", "node"))
    router_reads: str = option(
        "feature", "routers and gates read x_i as distributed, or its activation", ("feature", "activation"), _READERS
    )
    threshold_offset: float = option(
        0.0, "in evaluation edges close below τ + offset, gates below ½ + offset", used_by=_READERS
    )

    def check(self) -> None:
        """Raises UsageError for an invalid value."""
        check_range("threshold_offset", self.threshold_offset)


class StageNodes(nn.Module):
    """The modules of a stage, and the computation of each node.

    `input`: raw stage input -> x_0 (a projection, or the identity). `nodes`: f_1 … f_{N-2}, the static blocks without their
    shortcut and without the activation after their addition. `activation`: that activation. `node_gates`: block gates, or None.
    `layout`: of all features, (B, C, H, W) if "NCHW"; see `dgnet.graph.LAYOUTS`. `takes_gates`: gates are decided outside, as
    by a controller that sees the image, and given to each forward pass.

    `shortcut="edge"`: the residual shortcut is an edge. The activation is applied to each aggregated sum, except that of an
    entry node. `shortcut="node"`: the shortcut is inside the node, x_j = activation(f_j(x̂_j) + x̂_j), and nothing is applied
    to the sum. An entry node then adds x_0, weighted by its in-edge, if `entry_shortcut` is true: its static block has a
    shortcut.
    """

    def __init__(
        self,
        topology: Topology,
        weighting: Weighting,
        input: nn.Module,
        nodes: Sequence[nn.Module],
        activation: nn.Module,
        options: StageOptions | None = None,
        entry_shortcut: bool = True,
        node_gates: NodeGates | None = None,
        layout: str = "NCHW",
        takes_gates: bool = False,
    ) -> None:
        super().__init__()
        options = options or StageOptions()
        if len(nodes) != len(topology.blocks):
            raise UsageError(f"a topology of {topology.num_nodes} nodes has {len(topology.blocks)} blocks, got {len(nodes)}")
        check_choice("layout", layout, LAYOUTS)
        self.topology = topology
        self.layout = layout
        self.mask: Tensor
        # In the state dict, so that weights of one random graph are not loaded into another.
        self.register_buffer("mask", topology.mask.clone())
        nn.Module.register_load_state_dict_pre_hook(self, _check_mask)  # torch gives this method no types
        self.shortcut = options.shortcut
        self.router_reads = options.router_reads
        self.threshold_offset = options.threshold_offset
        self.entry_shortcut = entry_shortcut
        self.grad_checkpointing = False
        self.input = input
        self.nodes = nn.ModuleList(nodes)
        self.activation = activation
        self.weighting = weighting
        self.node_gates = node_gates
        self.takes_gates = takes_gates
        if takes_gates and node_gates is not None:
            raise UsageError("a stage that is given its gates has no node_gates of its own")

    @property
    def has_gates(self) -> bool:
        """Whether gates close blocks, the stage's own or given ones."""
        return self.takes_gates or self.node_gates is not None

    def compute(
        self,
        node: int,
        weights: Tensor,
        is_open: Tensor | None,
        *sources: Tensor,
        further: Further = NOTHING,
        sharing: Sharing | None = None,
    ) -> Tensor:
        """Aggregate and transform, x_j = f_j(Σ_i α_ij x_i) (Eq. 3): (B, C, H, W). For the output node, the stage's output.

        `weights`: (B, E), or (B, E, k) with several weights for each edge; `is_open`: (B, E), None: all open. `sources`: the
        features of the in-edges; for an entry node the raw stage input and x_0. A source may also be a sum of several of them.
        `sharing`: that of the forward pass, in training.
        """
        sum_senders = partial(self._sum, sources[len(sources) - weights.shape[1] :], is_open=is_open, sharing=sharing)
        sum_raw = partial(self._sum, sources[:1], is_open=is_open, sharing=sharing)
        block = self.nodes[node - 1] if node in self.topology.entry else None
        if self.training and getattr(block, "takes_scale", False):
            # A fast path: the block computes f_j(α · x) without storing α · x.
            own, passed = map(mean_of_edge, split_ways(weights, self.weighting.two_way))
            assert block is not None
            return self.finish_entry(block(sources[0], scale=own[:, 0]), lambda: sum_senders(passed))
        return self.compute_from_sums(node, weights, sum_raw, sum_senders, further)

    def _sum(self, sources: Sequence[Tensor], weights: Tensor, is_open: Tensor | None, sharing: Sharing | None) -> Tensor:
        return sum_in_groups(partial(aggregate, is_open=is_open, sharing=sharing), sources, weights, self.layout)

    def compute_from_sums(
        self,
        node: int,
        weights: Tensor,
        sum_raw: Callable[[Tensor], Tensor],
        sum_senders: Callable[[Tensor], Tensor],
        further: Further,
    ) -> Tensor:
        """As `compute`, from two functions of weights, Σ_i w_i x_i: of the raw stage input, and of the senders' features."""
        own, passed = split_ways(weights, self.weighting.two_way)  # of what the block reads, and of what its shortcut passes on
        if node in self.topology.entry:  # one weight for all channels: the raw input may have other ones
            y = self.call_block(node, sum_raw(mean_of_edge(own)), further)
            return self.finish_entry(y, lambda: sum_senders(mean_of_edge(passed)))
        if node == self.topology.output:
            return self.transform(node, sum_senders(passed), further=further)
        summed = sum_senders(own)
        return self.transform(node, summed, further=further, passed=summed if passed is own else sum_senders(passed))

    def transform(
        self, node: int, x: Tensor, is_activated: bool = False, further: Further = NOTHING, passed: Tensor | None = None
    ) -> Tensor:
        """x_j from x̂_j, (B, C, H, W); for the output node, the stage's output. Not for entry nodes.

        `is_activated`: whether the activation after the aggregation was already applied to `x`. `passed`: what the shortcut in
        the node adds; None: `x`.
        """
        if self.shortcut == "edge" and not is_activated:
            x = self.activation(x)
        if node == self.topology.output:
            return x
        y = self.call_block(node, x, further)
        if self.shortcut == "edge":
            return y
        activated: Tensor = self.activation(y + (x if passed is None else passed))
        return activated

    def call_block(self, node: int, x: Tensor, further: Further) -> Tensor:
        """f_j(x), (B, C, H, W)."""
        y: Tensor = self.nodes[node - 1](x, *further.values, **further.named)
        return y

    def finish_entry(self, y: Tensor, shortcut: Callable[[], Tensor]) -> Tensor:
        """x_j of an entry node from `y` = f_j(x̂_j) and, if its block adds one, the weighted shortcut."""
        if self.shortcut == "edge":
            return y
        activated: Tensor = self.activation(y + shortcut() if self.entry_shortcut else y)
        return activated

    def empty_sum(self, x: Tensor, further: Further = NOTHING) -> Tensor:
        """x̂ of an output node that has no open in-edge for any sample: zeros, (B, C, H, W). `x`: the raw stage input."""
        return x.new_zeros(len(x), *self.find_empty_feature(x, further).shape[1:])

    def find_empty_feature(self, x: Tensor, further: Further) -> Tensor:
        """What the nodes distribute for no samples, (0, C, H, W), found by running an empty batch. `x`: the raw stage input."""
        entry = self.topology.entry
        feature: Tensor = self.call_block(entry[0], x[:0], further) if entry else self.input(x[:0])
        return feature


def _check_mask(
    stage: StageNodes,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_messages: list[str],
) -> None:
    """Refuse the weights of a stage with other edges. Weights of a static network hold no mask and are accepted."""
    mask = stage.topology.mask  # the buffer may lie on the meta device
    stored = state_dict.setdefault(f"{prefix}mask", mask)
    if stored.shape != mask.shape or not torch.equal(stored.cpu(), mask):
        error_messages.append(
            f"{prefix.removesuffix('.')} has other edges than this model's; build the model with the same topology and seed"
        )
