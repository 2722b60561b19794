"""Loss and accuracies of a classifier, and how its connectivity behaved, accumulated over batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from dgnet.data import IGNORED
from dgnet.graph import DynamicGraph

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


def build_metrics(prefix: str = "", means: Sequence[str] = ()) -> MetricCollection:
    """`loss` (cross-entropy), `top1` and `top5` (shares, 0 to 1), and `means` of other figures."""
    return build_means(prefix, ("loss", "top1", "top5", *means))


def build_means(prefix: str, names: Sequence[str]) -> MetricCollection:
    """A `WeightedMean` for each name."""
    return MetricCollection({name: WeightedMean() for name in names}, prefix=prefix, compute_groups=False)


@torch.no_grad()
def update_metrics(
    metrics: MetricCollection, logits: Tensor, labels: Tensor, figures: Mapping[str, Tensor] | None = None
) -> None:
    """`logits`: (B, classes); `labels`: (B,), images of label IGNORED do not count; `figures`: of each image, (B,)."""
    logits = logits.detach().float()
    counts = (labels != IGNORED).float()
    metrics["loss"].update(F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED), counts)
    for k in (1, 5):
        hits = logits.topk(min(k, logits.shape[1])).indices == labels[:, None]
        metrics[f"top{k}"].update(hits.any(1).float(), counts)
    for name, values in (figures or {}).items():
        metrics[name].update(values.detach(), counts)


def edge_figures(stages: Sequence[DynamicGraph], adjacency: Sequence[Tensor]) -> dict[str, Tensor]:
    """Of each image, (B,), for each stage: the mean weight of its edges, and the share of them that is closed.

    `adjacency`: for each stage the weights as aggregated, (B, N, N).
    """
    figures = {}
    for name, stage, matrix in zip(edge_figure_names(stages), stages, adjacency, strict=True):
        weights = matrix[:, stage.topology.mask.to(matrix.device)]
        figures[name[0]] = weights.mean(1)
        figures[name[1]] = (weights == 0).float().mean(1)
    return figures


def edge_figure_names(stages: Sequence[DynamicGraph]) -> list[tuple[str, str]]:
    """The names of `edge_figures`, a pair for each stage."""
    return [(f"stage{number}_edge_weight", f"stage{number}_closed_edges") for number in range(1, len(stages) + 1)]
