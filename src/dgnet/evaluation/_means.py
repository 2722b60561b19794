"""Means of figures of each image, as Lightning logs them.

Letters: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from dgnet.evaluation._pass import Batch

STATES = ("total", "weight")
"""The states of a `WeightedMean`."""


class WeightedMean(Metric):
    """The mean of figures of each image, (B,), with weights.

    In place of torchmetrics' own mean and accuracies: to leave images out they wait for the device, and the mean's
    `nan_strategy="disable"`, which does not, ignores the weights (torchmetrics 1.9).
    """

    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        for state in STATES:
            self.add_state(state, torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, values: Tensor, weights: Tensor) -> None:
        """Add a batch."""
        # An image that does not count may have any value, infinity too.
        self.total += torch.where(weights > 0, values * weights, 0.0).sum()
        self.weight += weights.sum()

    def compute(self) -> Tensor:
        """The mean; not a number where nothing counted."""
        return self.total / self.weight


def build_means(prefix: str, names: Sequence[str]) -> MetricCollection:
    """A `WeightedMean` for each name."""
    return MetricCollection({name: WeightedMean() for name in names}, prefix=prefix, compute_groups=False)


@torch.no_grad()
def update_means(means: MetricCollection, figures: Mapping[str, Tensor], counts: Tensor) -> None:
    """Add a batch. `figures`: of each image, (B,), by name; `counts`: which images count, (B,) bool."""
    weights = counts.float()
    for name, values in figures.items():
        means[name].update(values.detach(), weights)


class Means:
    """The meter that adds to `means` what `find` reads in a batch: figures of each image, and which images count."""

    def __init__(
        self, means: MetricCollection, find: Callable[[Batch], tuple[Mapping[str, Tensor], Tensor]], needs_connectivity: bool
    ) -> None:
        self.means, self.find, self.needs_connectivity = means, find, needs_connectivity

    def update(self, batch: Batch) -> None:
        """Add a batch."""
        update_means(self.means, *self.find(batch))
