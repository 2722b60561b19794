"""Small data sets as tensors on the training device: decoded once, then augmented batch by batch on the device."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import functional as TF
from tqdm import tqdm

from dgnet.data import PAD_CROPS, ImageDataset, Preprocessing, mix_seed
from dgnet.training._loading import TrainingOrder


class CachedLoader:
    """Batches of a data set whose decoded images are kept in memory: images (B, C, H, W), normalised, and labels (B,).

    The pixels are those of `Preprocessing`'s transforms. With `augment` "pad-crop" or "reflect-crop" each image is padded by an
    eighth, cropped at random and flipped with probability `hflip`, like in `Preprocessing.training_transform`. What is drawn
    for an image is a function of (seed, epoch, index), and of the number of the copy if the order repeats images.

    `order`: a training order. Without it every image is given once, in the order of the data set, `batch_size` at a time.

    Raises BadImageError for an image that does not decode.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        preprocessing: Preprocessing,
        batch_size: int,
        order: TrainingOrder | None = None,
        augment: str = "none",
        hflip: float = 0.0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.images, self.labels = _decode_all(dataset, preprocessing, torch.device(device))
        self.batch_size = batch_size
        self.order = order
        self.padding = [side // 8 if augment in PAD_CROPS else 0 for side in preprocessing.image_size]
        self.pads_with_mirror = PAD_CROPS.get(augment) == "reflect"
        self.hflip = hflip if augment in PAD_CROPS else 0.0
        self.mean = torch.tensor(preprocessing.mean, device=device)[:, None, None]
        self.std = torch.tensor(preprocessing.std, device=device)[:, None, None]

    def __len__(self) -> int:
        return len(self.order) if self.order is not None else -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.order is None:
            for index in torch.arange(len(self.images), device=self.images.device).split(self.batch_size):
                yield self._normalise(self.images[index]), self.labels[index]
            return
        order, device = self.order, self.images.device
        places = self._draw_places(mix_seed(order.seed, order.epoch, 1), order.repeats)
        for index, copy in zip(order.indices().to(device), order.copies().to(device), strict=True):
            row = index + len(self.images) * copy
            yield self._normalise(self._crop(self.images[index], *(column[row] for column in places))), self.labels[index]

    def _normalise(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - self.mean) / self.std

    def _draw_places(self, seed: int, repeats: int) -> tuple[Tensor, Tensor, Tensor]:
        """For each image, copy by copy: top, left, and whether to flip it, (images × `repeats`, 1) each.

        Drawn on the CPU: the same for every device.
        """
        generator = torch.Generator().manual_seed(seed)
        shape, (down, across) = (len(self.images) * repeats, 1), self.padding
        top = torch.randint(2 * down + 1, shape, generator=generator)
        left = torch.randint(2 * across + 1, shape, generator=generator)
        flipped = torch.rand(shape, generator=generator) < self.hflip
        device = self.images.device
        return top.to(device), left.to(device), flipped.to(device)

    def _crop(self, images: Tensor, top: Tensor, left: Tensor, flipped: Tensor) -> Tensor:
        """Pad each image, crop it at its (`top`, `left`), and mirror it where `flipped`; (B, C, H, W)."""
        batch, channels, height, width = images.shape
        (down, across), device = self.padding, images.device
        rows = top + torch.arange(height, device=device)
        columns = torch.arange(width, device=device)
        columns = left + torch.where(flipped, width - 1 - columns, columns)
        if self.pads_with_mirror:
            padded, rows, columns = images, _mirror(rows - down, height), _mirror(columns - across, width)
        else:
            padded = F.pad(images, (across, across, down, down))
        sample = torch.arange(batch, device=device)[:, None, None, None]
        channel = torch.arange(channels, device=device)[None, :, None, None]
        return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _mirror(index: Tensor, side: int) -> Tensor:
    """The places of pixels beyond a border, mirrored at the pixel on the border; those within stay as they are."""
    last = side - 1
    return last - (last - index.abs()).abs()


def _decode_all(dataset: ImageDataset, preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    """uint8 images (N, C, H, W), resized and cropped as for evaluation, and labels (N,)."""
    resize_and_crop = preprocessing.cropping()
    images = torch.empty((len(dataset), *preprocessing.input_shape), dtype=torch.uint8)
    labels = torch.empty(len(dataset), dtype=torch.long)
    for index in tqdm(range(len(dataset)), desc="decoding images", leave=False, disable=None, file=sys.stderr):
        image, label = dataset.load(index)
        images[index] = TF.pil_to_tensor(resize_and_crop(image))
        labels[index] = label
    return images.to(device), labels.to(device)
