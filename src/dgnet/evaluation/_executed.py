"""Executed cost of each image, in multiply-adds."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgnet._cost import CostModel
from dgnet.evaluation._pass import Batch
from dgnet.evaluation._ranks import gather


class ExecutedCost:
    """Executed multiply-adds. Keeps one number and the label for each image."""

    needs_connectivity = True

    def __init__(self, costs: CostModel, class_names: list[str]) -> None:
        self.costs, self.class_names = costs, class_names
        self.executed: list[Tensor] = []
        self.labels: list[Tensor] = []

    def update(self, batch: Batch) -> None:
        """Add a batch whose targets are labels."""
        self.executed.append(executed_by_image(self.costs, batch))
        self.labels.append(batch.targets.cpu())

    def summary(self) -> dict[str, Any]:
        """The cost figures of `Evaluation`. All processes must call it."""
        parts = gather((self.executed, self.labels))
        executed = torch.cat([chunk for chunks, _ in parts for chunk in chunks])
        labels = torch.cat([chunk for _, chunks in parts for chunk in chunks])
        named = Counter(self.class_names)
        return {
            **executed_figures(self.costs, executed),
            "executed_by_class": {
                # Names may repeat: ImageNet has two kinds of crane.
                name if named[name] == 1 else f"{name} ({index})": float(executed[labels == index].mean())
                for index, name in enumerate(self.class_names)
                if (labels == index).any()
            },
        }


_PERCENTILES = (5, 25, 50, 75, 95)


def executed_figures(costs: CostModel, executed: Tensor) -> dict[str, Any]:
    """The cost figures of `Evaluation` over all images. `executed`: multiply-adds of each image, (images,)."""
    values = np.percentile(executed.numpy(), _PERCENTILES)
    return {
        "dense_multiply_adds": costs.dense,
        "executed_multiply_adds": float(executed.mean()),
        "executed_std": float(executed.std(correction=0)),
        "executed_percentiles": {str(share): float(value) for share, value in zip(_PERCENTILES, values, strict=True)},
    }


def executed_by_image(costs: CostModel, batch: Batch) -> Tensor:
    """Executed multiply-adds of each image, (B,) float64 on the CPU; the dense cost for a static network."""
    if batch.record is None:
        return torch.full((len(batch.targets),), float(costs.dense), dtype=torch.float64)
    return costs.executed_in(batch.record)
