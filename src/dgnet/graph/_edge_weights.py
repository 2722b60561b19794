"""Several weights for each edge: for groups of channels, and for a node's block and its shortcut. (B, E, k) in place of (B, E).

Group n of g is the n-th part of C/g channels of a feature. With two ways, a node's block reads one sum and its shortcut
another: k = 2g, the block's weights first. An edge opens and closes as a whole: where one number is needed, it is the mean of
the edge's weights.

Letters: B batch, E in-edges of a node, g groups, k weights of an edge, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dgnet.errors import UsageError
from dgnet.options import Options, option

_WEIGHTED = {"weighting": ("routed", "signed", "linear", "softmax", "learned")}


@dataclass(frozen=True, kw_only=True)
class GroupOptions(Options):
    """Options of weightings that may have several weights for each edge."""

    weight_groups: int = option(
        1,
        "groups of channels with weights of their own on each edge",
        used_by=_WEIGHTED,
    )
    two_way: bool = option(
        False, "separate weights for a node's block and for its shortcut; needs shortcut='node'", used_by=_WEIGHTED
    )

    @property
    def edge_weights(self) -> int:
        """k, the weights of an edge."""
        return self.weight_groups * (2 if self.two_way else 1)

    def check(self) -> None:
        """Raises UsageError if the number of groups is no whole number above 0."""
        if not isinstance(self.weight_groups, int) or self.weight_groups < 1:
            raise UsageError(f"weight_groups must be a whole number from 1 on, got {self.weight_groups!r}")


def count_edge_weights(options: GroupOptions, channels: int) -> int:
    """k, the weights of an edge. Raises UsageError if the groups do not divide the channels."""
    if channels % options.weight_groups:
        raise UsageError(f"weight_groups={options.weight_groups} does not divide the {channels} channels of a stage")
    return options.edge_weights


def split_ways(weights: Tensor, two_way: bool) -> tuple[Tensor, Tensor]:
    """The weights of the sum that a node's block reads, and of that which its shortcut passes on: each (B, E) or (B, E, g)."""
    if not two_way or weights.ndim == 2:  # imposed and pinned weights are the same for both
        return weights, weights
    block, shortcut = weights.chunk(2, dim=2)
    return (block.squeeze(2), shortcut.squeeze(2)) if block.shape[2] == 1 else (block, shortcut)


def split_edges(values: Tensor, edge_weights: int) -> Tensor:
    """(B, E·k) -> (B, E, k), for k = 1 as it is: what a layer has predicted for all weights of all edges."""
    return values if edge_weights == 1 else values.unflatten(1, (-1, edge_weights))


def mean_of_edge(values: Tensor) -> Tensor:
    """(B, E, k) -> (B, E); (B, E) as it is."""
    return values if values.ndim == 2 else values.mean(2)


def of_whole_edges(is_open: Tensor, weights: Tensor) -> Tensor:
    """What holds for whole edges, (B, E), in the form that meets `weights`, (B, E) or (B, E, k)."""
    return is_open if weights.ndim == 2 else is_open[..., None]


def sum_in_groups(
    sum: Callable[[Sequence[Tensor], Tensor], Tensor], features: Sequence[Tensor], weights: Tensor, layout: str
) -> Tensor:
    """Call `sum` on features and weights, in views of (B, g, C/g, …) if the weights have groups; `layout`: of the features."""
    if weights.ndim == 2:
        return sum(features, weights)
    channel = 1 if layout == "NCHW" else features[0].ndim - 1
    views = [feature.unflatten(channel, (weights.shape[2], -1)).movedim(channel, 1) for feature in features]
    return sum(views, weights).movedim(1, channel).flatten(channel, channel + 1)
