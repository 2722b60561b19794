"""Options of augmentation: what is drawn for each image, and how the images of a batch are mixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgnet.errors import UsageError, reason
from dgnet.options import check_bounds, flag, option

if TYPE_CHECKING:
    from dgnet.data import Augmentation

INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "hamming", "box", "random")

_PER_IMAGE = ("auto_augment", "color_jitter", "reprob")
_OF_CROP = ("scale", "ratio", "train_interpolation")
_OF_MIXING = {"mixup_prob": 1.0, "mixup_switch_prob": 0.5, "mixup_mode": "batch", "mixup_off_epoch": None}

_BOUNDS: dict[str, tuple[float, ...]] = {
    "color_jitter": (0, 10),
    "reprob": (0, 1),
    "recount": (1, 100),
    "mixup": (0, 1000),
    "cutmix": (0, 1000),
    "mixup_prob": (0, 1),
    "mixup_switch_prob": (0, 1),
    "mixup_off_epoch": (1,),
    "aug_repeats": (1, 100),
}


@dataclass(frozen=True)
class AugmentationOptions:
    """timm's augmentations, under timm's names."""

    augment: str = option(
        "auto",
        "rrc: random resized crop; pad-crop: pad with zeros, crop at random; reflect-crop: the same with mirrored borders;"
        " none; auto: pad-crop up to 64 pixels, else rrc",
        ("auto", "rrc", "pad-crop", "reflect-crop", "none"),
    )
    scale: list[float] | None = option(None, "rrc: share of the image's area, from and to; by default [0.08, 1]")
    ratio: list[float] | None = option(None, "rrc: width over height, from and to; by default [0.75, 1.3333]")
    train_interpolation: str | None = option(
        None, f"rrc: {', '.join(INTERPOLATIONS)} (bilinear or bicubic); by default the model's own"
    )
    auto_augment: str | None = option(
        None, "timm's policy: rand-m9-mstd0.5-inc1 (RandAugment), original, v0 (AutoAugment), 3a, augmix-…; by default none"
    )
    color_jitter: float = option(0.0, "change brightness, contrast and saturation by up to this factor, as in 0.4")
    reprob: float = option(0.0, "probability of random erasing")
    remode: str = option(
        "pixel", "erase with const: the mean; rand: one random colour; pixel: noise", ("const", "rand", "pixel")
    )
    recount: int = option(1, "most rectangles that are erased in an image")
    mixup: float = option(0.0, "alpha of mixup; 0: no mixup")
    cutmix: float = option(0.0, "alpha of CutMix; 0: no CutMix")
    mixup_prob: float = option(1.0, "probability of mixup or CutMix, for each batch or as --mixup-mode says")
    mixup_switch_prob: float = option(0.5, "probability of CutMix instead of mixup, if both are used")
    mixup_mode: str = option(
        "batch", "draw once for each batch, pair of images, or image (elem): batch, pair, elem", ("batch", "pair", "elem")
    )
    mixup_off_epoch: int | None = option(None, "mix images in this many first epochs only; by default in all")
    aug_repeats: int = option(
        1, "repeated augmentation: an epoch has this many differently augmented copies of fewer images, in the same steps"
    )

    def check(self) -> None:
        """Raises UsageError for a value that is not allowed."""
        check_bounds(self, _BOUNDS)
        for name, most in (("scale", 1.0), ("ratio", 100.0)):
            pair = getattr(self, name)
            if pair is not None and (len(pair) != 2 or not 0.001 <= pair[0] <= pair[1] <= most):
                raise UsageError(
                    f"{flag(name)} must be two increasing numbers from 0.001 to {most:g}, as in [0.5, 1]; got {pair}"
                )
        if self.train_interpolation not in (None, *INTERPOLATIONS):
            raise UsageError(
                f"unknown --train-interpolation {self.train_interpolation!r}; allowed: {', '.join(INTERPOLATIONS)}"
            )
        if self.auto_augment is not None:
            _check_policy(self.auto_augment)
            if self.color_jitter and "3a" not in self.auto_augment:
                raise UsageError(
                    f"timm leaves out colour jitter with --auto-augment {self.auto_augment}; leave out --color-jitter"
                )
        for name, default in _OF_MIXING.items():
            if not self.mixes and getattr(self, name) != default:
                raise UsageError(f"{flag(name)} needs --mixup or --cutmix; add one, or leave it out")

    @property
    def mixes(self) -> bool:
        """Whether the images of a batch are mixed."""
        return bool(self.mixup or self.cutmix)

    @property
    def augmentation(self) -> Augmentation:
        """What is drawn for each image besides its crop and flip."""
        from dgnet.data import Augmentation

        return Augmentation(
            scale=None if self.scale is None else (self.scale[0], self.scale[1]),
            ratio=None if self.ratio is None else (self.ratio[0], self.ratio[1]),
            interpolation=self.train_interpolation,
            auto_augment=self.auto_augment,
            color_jitter=self.color_jitter,
            re_prob=self.reprob,
            re_mode=self.remode,
            re_count=self.recount,
        )

    def check_use(self, augment: str, is_cached: bool) -> None:
        """Raises UsageError for options that have no effect with the kind of crop `augment`, or with `--cache true`."""
        for name in (*_PER_IMAGE, *_OF_CROP):
            if not getattr(self, name):
                continue
            if is_cached:
                raise UsageError(
                    f"{flag(name)} needs the images one by one, and --cache true has them in batches; leave one out"
                )
            if augment == "none":
                raise UsageError(f"{flag(name)} has no effect with --augment none; leave one out")
            if name in _OF_CROP and augment != "rrc":
                raise UsageError(
                    f"{flag(name)} needs --augment rrc, and this run uses {augment}; add it, or leave {flag(name)} out"
                )


def _check_policy(policy: str) -> None:
    """Raises UsageError for a text that timm does not read as a policy."""
    from timm.data import create_transform

    try:
        create_transform((3, 32, 32), is_training=True, auto_augment=policy)
    except Exception as error:  # timm checks with assertions, and looks names up
        raise UsageError(
            f"--auto-augment {policy!r} is no policy of timm, such as rand-m9-mstd0.5-inc1, original, v0, 3a or augmix-m5-w4-d2"
            f" ({type(error).__name__}: {reason(error)})"
        ) from None
