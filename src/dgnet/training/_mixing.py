"""Mixup and CutMix on a batch, by timm."""

from __future__ import annotations

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor

from dgnet.data import IGNORED
from dgnet.training._config import TrainConfig


class Mixing:
    """Mixes image i of a batch with image B - 1 - i. `classes`: their number.

    What is drawn is a function of the seed that a call is given.
    """

    def __init__(self, config: TrainConfig, classes: int) -> None:
        self.end = config.mixup_off_epoch
        self.mix = Mixup(
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            prob=config.mixup_prob,
            switch_prob=config.mixup_switch_prob,
            mode=config.mixup_mode,
            label_smoothing=config.label_smoothing,
            num_classes=classes,
        )

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mixed images, (B, 3, H, W); the classes' shares in the targets, (B, K); the class with the largest share, (B,).

        The label of an image is IGNORED if its own or that of the image mixed into it is. `images` are changed in place.
        """
        self.mix.mixup_enabled = self.end is None or epoch < self.end
        counts = labels != IGNORED
        if self.mix.mixup_enabled:
            counts = counts & counts.flip(0)
        np.random.seed(seed % 2**32)  # timm draws from NumPy's global generator
        images, targets = self.mix(images, labels.clamp(min=0))
        return images, targets, torch.where(counts, targets.argmax(1), IGNORED)
