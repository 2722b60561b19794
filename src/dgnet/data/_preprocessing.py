"""Preprocessing: from a decoded image to the network's input."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import timm.data
from torchvision import transforms

from dgnet.errors import UsageError, check_choice, check_range
from dgnet.options import LARGEST_SIDE

INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "hamming", "box")
"""timm's names, without its "random", with which an evaluation is not the same twice."""
_LARGEST_VALUE = 1_000_000
"""Of mean and std: images are in [0, 1], or in [0, 255] for some. Normalised with a larger one, all images are the same."""


@dataclass(frozen=True)
class Augmentation:
    """What is drawn for a training image besides crop and flip, in the terms of `timm.data.create_transform`."""

    scale: tuple[float, float] | None = None  # of a random resized crop: share of the area
    ratio: tuple[float, float] | None = None  # of a random resized crop: width over height
    interpolation: str | None = None  # of a random resized crop; "random": bilinear or bicubic; None: the model's own
    auto_augment: str | None = None
    color_jitter: float = 0.0
    re_prob: float = 0.0
    re_mode: str = "pixel"
    re_count: int = 1


@dataclass(frozen=True)
class Preprocessing:
    """Size, normalisation and cropping of images, as plain values that a checkpoint can store.

    Raises UsageError for a value that is out of range.
    """

    image_size: tuple[int, int]  # height, width in pixels
    mean: tuple[float, ...]  # for each channel, of images in [0, 1]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0  # share of the short side in the centre crop of evaluation

    def __post_init__(self) -> None:
        for side in self.image_size:
            check_range("image_size", side, 1, LARGEST_SIDE)
        if len(self.mean) != 3 or len(self.std) != 3:
            raise UsageError(f"mean and std must have 3 values each, for RGB, got {list(self.mean)} and {list(self.std)}")
        for value in self.std:
            if value <= 0:
                raise UsageError(f"std must be above 0, got {value}")
            check_range("std", value, 1e-6, _LARGEST_VALUE)
        for value in self.mean:
            check_range("mean", value, -_LARGEST_VALUE, _LARGEST_VALUE)
        check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        check_range("crop_pct", self.crop_pct, 0.01, 2)  # some of timm's are above 1

    @classmethod
    def of(cls, pretrained_cfg: dict[str, Any], image_size: int | None = None) -> Preprocessing:
        """The preprocessing of a model's timm config, at another `image_size` in pixels if one is given."""
        size = (image_size, image_size) if image_size else tuple(pretrained_cfg["input_size"][1:])
        return cls(
            size,
            tuple(pretrained_cfg["mean"]),
            tuple(pretrained_cfg["std"]),
            pretrained_cfg["interpolation"],
            pretrained_cfg["crop_pct"],
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as lists, numbers and strings."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

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
        """The part of `evaluation_transform` that works on images: resize, centre crop."""
        *resize_and_crop, _, _ = self.evaluation_transform().transforms
        return transforms.Compose(resize_and_crop)

    def training_transform(
        self,
        augment: str,
        hflip: float,
        augmentation: Augmentation = Augmentation(),
    ) -> transforms.Compose:
        """Random augmentation, then normalise.

        `augment`: "rrc" (random resized crop, as for ImageNet), "pad-crop" (the crop of evaluation, padded with zeros by an
        eighth, 4 pixels for CIFAR's 32, and cropped at random), or "none", which draws nothing. `hflip`: probability of a
        horizontal flip.
        """
        if augment == "none":
            return self.evaluation_transform()
        crop, change, finish = self._timm_training_transforms(hflip, augmentation)
        if augment == "rrc":
            return transforms.Compose([*crop.transforms, *change.transforms, *finish.transforms])
        height, width = self.image_size
        return transforms.Compose(
            [
                self.cropping(),
                transforms.RandomCrop(self.image_size, padding=(width // 8, height // 8)),
                transforms.RandomHorizontalFlip(hflip),
                *(change.transforms if augmentation.auto_augment or augmentation.color_jitter else ()),
                *finish.transforms,
            ]
        )

    def _timm_training_transforms(self, hflip: float, augmentation: Augmentation) -> list[transforms.Compose]:
        """timm's three steps: random resized crop and flip; changes of colour and shape; to a tensor, normalise, erase."""
        steps: tuple[transforms.Compose, ...] = timm.data.create_transform(
            (3, *self.image_size),
            is_training=True,
            separate=True,
            hflip=hflip,
            mean=self.mean,
            std=self.std,
            **{**asdict(augmentation), "interpolation": augmentation.interpolation or self.interpolation},
        )
        return list(steps)
