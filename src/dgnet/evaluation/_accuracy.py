"""Loss and accuracy of a classifier.

Letters: B batch, K classes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dgnet.data import IGNORED
from dgnet.evaluation._pass import Batch
from dgnet.evaluation._ranks import gather

ACCURACY = ("loss", "top1", "top5")
"""The names of the figures in `accuracy_figures`."""


@torch.no_grad()
def accuracy_figures(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """For each image, (B,): cross-entropy; 1 if the label is the most probable class; 1 if it is among the 5 most probable.

    `logits`: (B, K); `labels`: (B,). All figures of an image with label IGNORED are 0.
    """
    logits = logits.detach().float()
    figures = {"loss": F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)}
    for k in (1, 5):
        hits = logits.topk(min(k, logits.shape[1])).indices == labels[:, None]
        figures[f"top{k}"] = hits.any(1).float()
    return figures


class Accuracy:
    """Mean loss and accuracies over the labelled images, with exact counts over all processes."""

    needs_connectivity = False

    def __init__(self) -> None:
        self.images = 0
        self.sums = torch.zeros(4, dtype=torch.float64)  # labelled images, then ACCURACY

    def update(self, batch: Batch) -> None:
        """Add a batch whose outputs are logits."""
        figures = accuracy_figures(batch.outputs, batch.targets)
        is_labelled = (batch.targets != IGNORED).float()
        self.images += len(batch.targets)
        self.sums += torch.stack([is_labelled, *(figures[name] for name in ACCURACY)]).cpu().double().sum(1)

    def summary(self) -> dict[str, float]:
        """The accuracy figures of `Evaluation`; NaN if no image has a label. All processes must call it."""
        parts = gather((self.images, self.sums))
        labelled, loss, *hits = torch.stack([sums for _, sums in parts]).sum(0).tolist()
        top1, top5 = (100 * count / labelled if labelled else math.nan for count in hits)
        mean = loss / labelled if labelled else math.nan
        return {"top1": top1, "top5": top5, "loss": mean, "images": sum(images for images, _ in parts)}
