"""Batches of images of different sizes: which images are put together, and random flips."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dgnet.data import seed_generators
from dgnet.detection._coco import CocoDetection, Target, flip
from dgnet.training import TrainingOrder


class AspectRatioOrder(TrainingOrder):
    """Steps of only landscape or only portrait images. A batch is padded to its largest image, so this needs less padding.

    At most one step of an epoch mixes both, in at most one batch: the rest of each kind. So all images are left out equally
    often. `aspect_ratios`: width over height of each image. Otherwise like TrainingOrder.
    """

    def __init__(
        self, aspect_ratios: Sequence[float], batch_size: int, seed: int, rank: int = 0, ranks: int = 1, accumulate: int = 1
    ) -> None:
        super().__init__(len(aspect_ratios), batch_size, seed, rank, ranks, accumulate)
        self.is_landscape = torch.tensor(aspect_ratios) >= 1

    def shuffle(self, generator: torch.Generator) -> Tensor:
        order = super().shuffle(generator)
        is_landscape = self.is_landscape[order]
        steps, rest = [], []
        for kind in (order[is_landscape], order[~is_landscape]):
            whole = len(kind) // self.batch_size * self.batch_size
            steps.append(kind[:whole].view(-1, self.batch_size))
            rest.append(kind[whole:])
        steps.append(torch.cat(rest).view(-1, self.batch_size))  # one step or none
        by_kind = torch.cat(steps)
        return by_kind[torch.randperm(len(by_kind), generator=generator)].flatten()


class DetectionItems(Dataset[tuple[Tensor, Target]]):
    """Items of a data set by (epoch, index), flipped with probability `hflip`: a function of (`seed`, epoch, index).

    Index -1 gives the first image without an id. It fills up batches, so that in evaluation all processes have equally many.
    """

    def __init__(self, dataset: CocoDetection, hflip: float = 0.0, seed: int = 0) -> None:
        self.dataset, self.hflip, self.seed = dataset, hflip, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Target]:
        epoch, index = key
        image, target = self.dataset[max(index, 0)]
        if index < 0:
            return image, {**target, "image_id": None}
        if self.hflip:
            seed_generators(self.seed, epoch, index)
            if torch.rand(()) < self.hflip:
                return flip(image, target)
        return image, target


def collate(items: Sequence[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """A batch for torchvision's detectors: a list of images and a list of targets."""
    images, targets = zip(*items, strict=True)
    return list(images), list(targets)
