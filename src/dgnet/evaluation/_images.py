"""Figures of each single image: prediction, loss, cost and edge weights.

Letters: B batch, E edges of all stages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from dgnet._cost import CostModel
from dgnet.data import IGNORED
from dgnet.evaluation._executed import executed_by_image
from dgnet.evaluation._pass import Batch
from dgnet.evaluation._wiring import flatten_edges


@dataclass(frozen=True)
class ImageFigures:
    """Figures of some images, on the CPU."""

    indices: Tensor  # (B,), positions in the data set
    labels: Tensor  # (B,), IGNORED if there is none
    predictions: Tensor  # (B,), class indices
    confidences: Tensor  # (B,), the probability of the predicted class
    losses: Tensor  # (B,), cross-entropy; NaN without a label
    executed: Tensor  # (B,), multiply-adds of the nodes that ran and the edges that were open
    weights: Tensor  # (B, E), as aggregated, 0 where closed; see `flatten_edges`


def image_figures(batch: Batch, costs: CostModel) -> ImageFigures:
    """The figures of a batch, computed in float64. The network must have dynamic stages."""
    assert batch.record is not None
    logits, labels = batch.outputs.detach().cpu().double(), batch.targets.cpu()
    confidences, predictions = logits.softmax(1).max(1)
    losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
    return ImageFigures(
        indices=torch.tensor(batch.indices, dtype=torch.int64),
        labels=labels,
        predictions=predictions,
        confidences=confidences,
        losses=torch.where(labels == IGNORED, math.nan, losses),
        executed=executed_by_image(costs, batch),
        weights=flatten_edges(batch.adjacency, batch.record.topology),
    )


class ImageByImage:
    """The figures of every image. Memory grows with the number of images."""

    needs_connectivity = True

    def __init__(self, costs: CostModel) -> None:
        self.costs = costs
        self.parts: list[ImageFigures] = []

    def update(self, batch: Batch) -> None:
        """Add a batch."""
        self.parts.append(image_figures(batch, self.costs))

    def summary(self) -> ImageFigures:
        """The figures of all images, in the order of the pass."""
        columns = {f.name: torch.cat([getattr(part, f.name) for part in self.parts]) for f in fields(ImageFigures)}
        return ImageFigures(**columns)
