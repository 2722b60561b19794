"""The loss of each image: cross-entropy or binary cross-entropy, on classes or on mixed targets."""

from __future__ import annotations

import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy
from torch import Tensor

from dgnet.data import IGNORED
from dgnet.training._config import TrainConfig


class ClassificationLoss:
    """Cross-entropy with label smoothing (§6.1), or timm's binary cross-entropy; for each image."""

    def __init__(self, config: TrainConfig) -> None:
        self.smoothing = config.label_smoothing
        self.sums_classes = config.bce_sum
        self.binary: BinaryCrossEntropy | None = None
        if config.bce_loss:
            self.binary = BinaryCrossEntropy(self.smoothing, config.bce_target_thresh, reduction="none")

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The losses, (B,); 0 for an image without a label.

        `logits`: (B, K). `targets`: labels, (B,), of which some may be IGNORED; or shares of the classes, (B, K), which are
        smoothed already.
        """
        logits = logits.float()
        if self.binary is not None:
            # An image that is ignored has some class here; the caller does not count it.
            losses: Tensor = self.binary(logits, targets.clamp(min=0))
            return losses.sum(1) if self.sums_classes else losses.mean(1)
        if targets.ndim == 2:
            return F.cross_entropy(logits, targets, reduction="none")
        return F.cross_entropy(logits, targets, label_smoothing=self.smoothing, ignore_index=IGNORED, reduction="none")
