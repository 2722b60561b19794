"""Small data sets as tensors on the training device: decoded once, augmented there a batch at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import Compose
from torchvision.transforms import functional as TF
from tqdm import tqdm

from dgnet.data import ImageDataset, Preprocessing


class CachedLoader:
    """Batches of a data set that lies decoded in memory: images (B, 3, H, W), normalised, and labels (B,).

    The pixels are those of `Preprocessing`'s transforms. With `augment` "pad-crop" each image is padded with zeros by an
    eighth, cropped at random and flipped with probability `hflip`, as `Preprocessing.training_transform` does it image by
    image. `training`: in a new random order each epoch, without a last batch that is not full.

    Raises UsageError, naming the image, for one that does not decode.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        preprocessing: Preprocessing,
        batch_size: int,
        training: bool = False,
        augment: str = "none",
        hflip: float = 0.0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.images, self.labels = _decode_all(dataset, preprocessing, torch.device(device))
        self.batch_size = batch_size
        self.training = training
        self.padding = [side // 8 if augment == "pad-crop" else 0 for side in preprocessing.image_size]
        self.hflip = hflip if augment == "pad-crop" else 0.0
        self.mean = torch.tensor(preprocessing.mean, device=device)[:, None, None]
        self.std = torch.tensor(preprocessing.std, device=device)[:, None, None]

    def __len__(self) -> int:
        full, rest = divmod(len(self.images), self.batch_size)
        return full + (rest > 0 and not self.training)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.images)
        # Drawn on the CPU: an order does not depend on the device.
        order = torch.randperm(count) if self.training else torch.arange(count)
        for index in order.to(self.images.device).split(self.batch_size)[: len(self)]:
            images = self._crop(self.images[index]) if self.training else self.images[index]
            yield (images.float() / 255 - self.mean) / self.std, self.labels[index]

    def _crop(self, images: Tensor) -> Tensor:
        """Each image padded, cropped at a place of its own, some flipped; (B, 3, H, W)."""
        batch, channels, height, width = images.shape
        (down, across), device = self.padding, images.device
        top = torch.randint(2 * down + 1, (batch, 1)).to(device)
        left = torch.randint(2 * across + 1, (batch, 1)).to(device)
        flipped = (torch.rand(batch, 1) < self.hflip).to(device)
        rows = top + torch.arange(height, device=device)
        columns = torch.arange(width, device=device)
        columns = left + torch.where(flipped, width - 1 - columns, columns)
        padded = F.pad(images, (across, across, down, down))
        sample = torch.arange(batch, device=device)[:, None, None, None]
        channel = torch.arange(channels, device=device)[None, :, None, None]
        return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _decode_all(dataset: ImageDataset, preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    """uint8 images (N, 3, H, W), resized and cropped as for evaluation, and labels (N,)."""
    resize_and_crop = Compose(preprocessing.evaluation_transform().transforms[:-2])  # type: ignore[attr-defined]
    images = torch.empty((len(dataset), 3, *preprocessing.image_size), dtype=torch.uint8)
    labels = torch.empty(len(dataset), dtype=torch.long)
    for index in tqdm(range(len(dataset)), desc="decoding images", leave=False, disable=None, file=sys.stderr):
        image, label = dataset.load(index)
        images[index] = TF.pil_to_tensor(resize_and_crop(image))
        labels[index] = label
    return images.to(device), labels.to(device)
