"""Loss and accuracies of a classifier, accumulated over batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy


def build_metrics(num_classes: int, prefix: str = "") -> MetricCollection:
    """`loss` (cross-entropy), `top1` and `top5` (shares, 0 to 1): update with `update_metrics`."""
    accuracies = {f"top{k}": MulticlassAccuracy(num_classes, top_k=min(k, num_classes), average="micro") for k in (1, 5)}
    return MetricCollection({"loss": MeanMetric(), **accuracies}, prefix=prefix, compute_groups=False)


@torch.no_grad()
def update_metrics(metrics: MetricCollection, logits: Tensor, labels: Tensor, executed: Tensor | None = None) -> None:
    """`logits`: (B, classes); `labels`: (B,); `executed`: share of the dense cost, (B,), for a collection that has it."""
    logits = logits.detach().float()
    metrics["loss"].update(F.cross_entropy(logits, labels, reduction="none"))
    metrics["top1"].update(logits, labels)
    metrics["top5"].update(logits, labels)
    if executed is not None:
        metrics["executed"].update(executed.detach())
