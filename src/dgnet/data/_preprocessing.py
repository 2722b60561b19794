"""Preprocessing: from a decoded image to the network's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import timm.data
from torchvision import transforms

from dgnet.errors import UsageError, check_choice, check_range
from dgnet.options import LARGEST_SIDE

INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "hamming", "box")
"""timm's names, without its "random", with which an evaluation is not the same twice."""
CROP_MODES = ("center", "squash", "border")
"""Center: resize the short side, crop. Squash: resize to the size. Border: resize the long side, pad."""
PAD_CROPS = {"pad-crop": "constant", "reflect-crop": "reflect"}
"""Augmentations that pad an image and crop it at random, and torchvision's name of what they pad it with."""
_CHANNELS = (1, 3)  # of what Pillow reads: grey, RGB
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
    mean: tuple[float, ...]  # for each channel, of images in [0, 1]; one channel: images are read as grey, three: as RGB
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0  # share of the short side in the centre crop of evaluation
    crop_mode: str = "center"  # of evaluation

    def __post_init__(self) -> None:
        for side in self.image_size:
            check_range("image_size", side, 1, LARGEST_SIDE)
        if len(self.mean) not in _CHANNELS or len(self.mean) != len(self.std):
            raise UsageError(
                "mean and std must have 3 values each, for RGB images, or 1 each, for grey ones,"
                f" got {list(self.mean)} and {list(self.std)}"
            )
        for value in self.std:
            if value <= 0:
                raise UsageError(f"std must be above 0, got {value}")
            check_range("std", value, 1e-6, _LARGEST_VALUE)
        for value in self.mean:
            check_range("mean", value, -_LARGEST_VALUE, _LARGEST_VALUE)
        check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        check_choice("crop_mode", self.crop_mode, CROP_MODES)
        check_range("crop_pct", self.crop_pct, 0.01, 2)  # some of timm's are above 1

    @classmethod
    def of(
        cls,
        pretrained_cfg: dict[str, Any],
        image_size: int | None = None,
        in_chans: int | None = None,
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
    ) -> Preprocessing:
        """The preprocessing of a model's timm config, with what is given in its place.

        `image_size`: in pixels. `in_chans`: 3 for RGB, 1 for grey images, whose mean and std are the averages over RGB. `mean`,
        `std`: one value for each channel, or one for all. Raises UsageError for another number of channels or values.
        """
        size = tuple(pretrained_cfg["input_size"][1:]) if image_size is None else (image_size, image_size)
        channels = 3 if in_chans is None else in_chans
        if channels not in _CHANNELS:
            raise UsageError(f"--in-chans must be 1 or 3, got {channels}: images are read as grey (1) or RGB (3)")
        return cls(
            size,
            _for_channels(channels, "--mean", mean, pretrained_cfg["mean"]),
            _for_channels(channels, "--std", std, pretrained_cfg["std"]),
            pretrained_cfg["interpolation"],
            pretrained_cfg["crop_pct"],
            pretrained_cfg.get("crop_mode") or "center",
        )

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the network's input."""
        return (len(self.mean), *self.image_size)

    @property
    def network_options(self) -> dict[str, int]:
        """The arguments of `create_model` for this input. Empty for RGB, so that networks without `in_chans` can be built."""
        return {} if len(self.mean) == 3 else {"in_chans": len(self.mean)}

    def to_dict(self) -> dict[str, Any]:
        """The fields as lists, numbers and strings."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def evaluation_transform(self) -> transforms.Compose:
        """Resize, crop, normalise: an RGB image to `input_shape`."""
        transform: transforms.Compose = timm.data.create_transform(
            self.input_shape,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )
        return self._from_rgb(transform)

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
        eighth, 4 pixels for CIFAR's 32, and cropped at random), "reflect-crop" (the same, padded with what lies at the border,
        mirrored), or "none", which draws nothing. `hflip`: probability of a horizontal flip.
        """
        if augment == "none":
            return self.evaluation_transform()
        crop, change, finish = self._timm_training_transforms(hflip, augmentation)
        if augment == "rrc":
            return self._from_rgb(transforms.Compose([*crop.transforms, *change.transforms, *finish.transforms]))
        height, width = self.image_size
        return transforms.Compose(
            [
                self.cropping(),
                transforms.RandomCrop(self.image_size, (width // 8, height // 8), padding_mode=PAD_CROPS[augment]),
                transforms.RandomHorizontalFlip(hflip),
                *(change.transforms if augmentation.auto_augment or augmentation.color_jitter else ()),
                *finish.transforms,
            ]
        )

    def _timm_training_transforms(self, hflip: float, augmentation: Augmentation) -> list[transforms.Compose]:
        """timm's three steps: random resized crop and flip; changes of colour and shape; to a tensor, normalise, erase."""
        steps: tuple[transforms.Compose, ...] = timm.data.create_transform(
            self.input_shape,
            is_training=True,
            separate=True,
            hflip=hflip,
            mean=self.mean,
            std=self.std,
            **{**asdict(augmentation), "interpolation": augmentation.interpolation or self.interpolation},
        )
        return list(steps)

    def _from_rgb(self, transform: transforms.Compose) -> transforms.Compose:
        """`transform`, after a conversion to grey if the network's input has one channel."""
        return transform if len(self.mean) == 3 else transforms.Compose([transforms.Grayscale(), *transform.transforms])


def _for_channels(channels: int, what: str, given: Sequence[float] | float | None, own: Sequence[float]) -> tuple[float, ...]:
    """`given`, or else a model's `own` values for RGB, as one value for each channel."""
    given = [given] if isinstance(given, int | float) else given
    values = tuple(own if given is None else given)
    if given is None and channels == 1:
        return (sum(values) / len(values),)
    if len(values) == 1:
        return values * channels
    if len(values) != channels:
        expected = "one value" if channels == 1 else f"one value, or one for each of {channels} channels"
        raise UsageError(f"{what} must have {expected}, got {list(values)}")
    return values
