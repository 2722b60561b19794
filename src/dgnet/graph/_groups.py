"""Weights for each group of channels: (B, E, g) in place of (B, E).

An edge with g groups has g weights. Group k is the k-th part of C/g channels of the feature. An edge opens and closes as a
whole: where one number is needed, it is the mean over the groups.

Letters: B batch, E in-edges of a node, g groups, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dgnet.errors import UsageError
from dgnet.options import Options, option


@dataclass(frozen=True, kw_only=True)
class GroupOptions(Options):
    """Options of weightings that have weights for each group of channels."""

    weight_groups: int = option(
        1,
        "groups of channels with weights of their own on each edge",
        used_by={"weighting": ("routed", "signed", "linear", "softmax", "learned")},
    )

    def check(self) -> None:
        """Raises UsageError if the number of groups is no whole number above 0."""
        if not isinstance(self.weight_groups, int) or self.weight_groups < 1:
            raise UsageError(f"weight_groups must be a whole number from 1 on, got {self.weight_groups!r}")


def check_groups(groups: int, channels: int) -> int:
    """`groups`. Raises UsageError if they do not divide the channels."""
    if channels % groups:
        raise UsageError(f"weight_groups={groups} does not divide the {channels} channels of a stage")
    return groups


def split_groups(values: Tensor, groups: int) -> Tensor:
    """(B, E·g) -> (B, E, g), for one group as it is: what a layer has predicted for edges and groups."""
    return values if groups == 1 else values.unflatten(1, (-1, groups))


def mean_over_groups(values: Tensor) -> Tensor:
    """(B, E, g) -> (B, E); (B, E) as it is."""
    return values if values.ndim == 2 else values.mean(2)


def along_groups(is_open: Tensor, weights: Tensor) -> Tensor:
    """What holds for whole edges, (B, E), in the form that meets `weights`, (B, E) or (B, E, g)."""
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
