"""Means over images, as metrics that Lightning can log.

Letters: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from dgnet.evaluation._pass import Batch

STATES = ("total", "weight")
"""The names of the states of a `WeightedMean`."""


class WeightedMean(Metric):
    """Weighted mean of one value per image, (B,).

    Used instead of torchmetrics' mean and accuracies, which wait for the GPU to leave images out. Its mean with
    `nan_strategy="disable"` does not wait, but ignores the weights (torchmetrics 1.9).
    """

    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        for state in STATES:
            self.add_state(state, torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, values: Tensor, weights: Tensor) -> None:
        """Add a batch: `values` and `weights`, (B,)."""
        # An image of weight 0 may have any value, also infinity or NaN.
        self.total += torch.where(weights > 0, values * weights, 0.0).sum()
        self.weight += weights.sum()

    def compute(self) -> Tensor:
        """The mean; NaN if all weights are 0."""
        return self.total / self.weight


def build_means(prefix: str, names: Sequence[str]) -> MetricCollection:
    """A `WeightedMean` for each name."""
    return MetricCollection({name: WeightedMean() for name in names}, prefix=prefix, compute_groups=False)


@torch.no_grad()
def update_means(means: MetricCollection, figures: Mapping[str, Tensor], counts: Tensor) -> None:
    """Add a batch. `figures`: for each name the value of each image, (B,); `counts`: which images count, (B,) bool."""
    weights = counts.float()
    for name, values in figures.items():
        means[name].update(values.detach(), weights)


class Means:
    """A meter that adds each batch to `means`. `find`: from a batch to the arguments of `update_means`."""

    def __init__(
        self, means: MetricCollection, find: Callable[[Batch], tuple[Mapping[str, Tensor], Tensor]], needs_connectivity: bool
    ) -> None:
        self.means, self.find, self.needs_connectivity = means, find, needs_connectivity

    def update(self, batch: Batch) -> None:
        """Add a batch."""
        update_means(self.means, *self.find(batch))
