"""What happens to an image between its file and the network."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import timm.data
from torchvision import transforms


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the network: plain values, so that a checkpoint can carry them."""

    image_size: tuple[int, int]  # height, width in pixels
    mean: tuple[float, ...]  # of each channel, for images in [0, 1]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0  # share of the short side that evaluation's centre crop keeps

    @classmethod
    def of(cls, pretrained_cfg: dict[str, Any], image_size: int | None = None) -> Preprocessing:
        """A model's own preprocessing (its timm default config), at another size where one is given."""
        size = (image_size, image_size) if image_size else tuple(pretrained_cfg["input_size"][1:])
        return cls(
            size,
            tuple(pretrained_cfg["mean"]),
            tuple(pretrained_cfg["std"]),
            pretrained_cfg["interpolation"],
            pretrained_cfg["crop_pct"],
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values: lists, numbers, strings."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`. Raises TypeError or ValueError for values that are no preprocessing."""
        return cls(
            **{
                **values,
                "image_size": tuple(int(side) for side in values["image_size"]),
                "mean": tuple(float(value) for value in values["mean"]),
                "std": tuple(float(value) for value in values["std"]),
            }
        )

    def evaluation_transform(self) -> transforms.Compose:
        """Resize, centre crop, normalise: an image to (3, H, W)."""
        transform: transforms.Compose = timm.data.create_transform(
            (3, *self.image_size),
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
        )
        return transform

    def cropping(self) -> transforms.Compose:
        """The part of `evaluation_transform` before tensors: resize, centre crop."""
        *resize_and_crop, _, _ = self.evaluation_transform().transforms
        return transforms.Compose(resize_and_crop)

    def training_transform(self, augment: str, hflip: float) -> transforms.Compose:
        """Random augmentation, then normalise.

        `augment`: "rrc" (random resized crop, as on ImageNet), "pad-crop" (evaluation's crop, zero-padded by an eighth and
        cropped again: 4 pixels of CIFAR's 32), or "none". `hflip`: probability of a horizontal flip.
        """
        if augment == "none":
            return self.evaluation_transform()
        if augment == "rrc":
            transform: transforms.Compose = timm.data.create_transform(
                (3, *self.image_size),
                is_training=True,
                hflip=hflip,
                color_jitter=0.0,
                interpolation=self.interpolation,
                mean=self.mean,
                std=self.std,
            )
            return transform
        height, width = self.image_size
        return transforms.Compose(
            [
                self.cropping(),
                transforms.RandomCrop(self.image_size, padding=(width // 8, height // 8)),
                transforms.RandomHorizontalFlip(hflip),
                transforms.ToTensor(),
                transforms.Normalize(self.mean, self.std),
            ]
        )
