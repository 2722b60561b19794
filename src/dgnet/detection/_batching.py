"""Images of different sizes in batches: which go together, and what is drawn for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dgnet.data._images import seed_generators
from dgnet.detection._coco import CocoDetection, Target, flip
from dgnet.training._loading import TrainingOrder


class AspectRatioOrder(TrainingOrder):
    """Steps of landscape or of portrait images: a batch is padded to its largest image, so images of one kind waste less.

    At most one step of an epoch mixes both, and at most one batch of that: what is left over of each kind. So no image is
    left out more often than another. `aspect_ratios`: width over height of each image. Otherwise as TrainingOrder.
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
        steps.append(torch.cat(rest).view(-1, self.batch_size))  # a step or none: all images together fill steps
        by_kind = torch.cat(steps)
        return by_kind[torch.randperm(len(by_kind), generator=generator)].flatten()


class DetectionItems(Dataset[tuple[Tensor, Target]]):
    """Items of a data set by (epoch, index), mirrored with probability `hflip`: a function of (`seed`, epoch, index).

    Index -1, which evens processes out in evaluation, is the first image again, without an id.
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
    """A batch as torchvision's detectors take it: a list of images and a list of targets."""
    images, targets = zip(*items, strict=True)
    return list(images), list(targets)
