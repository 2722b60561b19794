"""A data set of tensors."""

from __future__ import annotations

from torch import Tensor

from dgnet.data import ImageDataset


class Images(ImageDataset):
    """Tensors that need no reading."""

    def __init__(self, images: Tensor, labels: list[int], classes: int = 5) -> None:
        self.images, self.labels = images, labels
        self.class_names = [str(label) for label in range(classes)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


class Counted(Images):
    """Images that note in `loaded` which of them were loaded."""

    def __init__(self, images: Tensor, labels: list[int], classes: int = 5) -> None:
        super().__init__(images, labels, classes)
        self.loaded: list[int] = []

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.loaded.append(index)
        return super().__getitem__(index)
