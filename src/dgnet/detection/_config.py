"""Options of `dgnet detect train`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from dgnet.errors import UsageError, check_range
from dgnet.options import check_bounds, flag, option
from dgnet.training import RunConfig
from dgnet.typed import Location

SIZE_BOUNDS: dict[str, tuple[float, ...]] = dict.fromkeys(("short_side", "long_side", "fpn_channels"), (1, 100_000))
"""The lowest and the highest value of a detector's sizes, in pixels and channels."""

_BOUNDS: dict[str, tuple[float, ...]] = {
    **SIZE_BOUNDS,
    "iterations": (1,),
    "evaluate_every": (1,),
    "evaluation_batch_size": (1,),
    "warmup_factor": (0, 1),
    "frozen_stages": (0,),
}


@dataclass(frozen=True)
class DetectConfig(RunConfig):
    """Options of a training run of a detector; the defaults are the 1× schedule (§6.3).

    Raises UsageError for a value that is not allowed.
    """

    model: str = option("dg_resnet50", "model name of the backbone; for a list: dgnet models")
    batch_size: int = option(16, "images in a training step, on all devices together")
    optimizer: str = option("momentum", "timm optimiser name; momentum is SGD with momentum, sgd has Nesterov momentum")
    lr: float = option(0.02, "learning rate after warm-up")
    weight_decay: float = option(1e-4, "weight decay; never on learned edge weights")
    data: Location = option("", "training annotations: a JSON file in COCO's format, such as instances_train2017.json")
    images: Location = option("", "folder of the training images")
    val_data: Location = option("", "evaluation annotations: a JSON file in COCO's format")
    val_images: Location | None = option(None, "folder of the evaluation images; by default --images")
    iterations: int = option(90_000, "training steps")
    evaluate_every: int = option(5_000, "number of iterations between evaluations; must divide --iterations")
    evaluation_batch_size: int = option(1, "images per device in an evaluation batch, padded to the largest")
    lr_steps: list[int] = option([60_000, 80_000], "iterations after which the learning rate falls to a tenth")
    warmup_iterations: int = option(1_000, "iterations of linear warm-up")
    warmup_factor: float = option(0.001, "learning rate at the start of warm-up, as a share of --lr")
    short_side: int = option(800, "scale images to this short side, in pixels, unless --long-side gives a smaller image")
    long_side: int = option(1333, "longest side of a scaled image, in pixels")
    fpn_channels: int = option(256, "channels of the feature pyramid")
    fpn_norm: bool = option(False, "batch normalisation in the feature pyramid; for training from random weights")
    frozen_stages: int = option(0, "do not train this many of the backbone's stem and stages; the stem counts as one")
    frozen_norm: bool = option(False, "do not train the backbone's batch normalisation: keep statistics, scale and shift")
    detector_kwargs: dict[str, Any] = option(
        {}, "further options of torchvision's FasterRCNN: {rpn_post_nms_top_n_train: 1000, box_detections_per_img: 100, …}"
    )

    command: ClassVar[str] = "detect train"

    def __post_init__(self) -> None:
        from dgnet.detection._detector import check_options

        super().__post_init__()
        check_bounds(self, _BOUNDS)
        check_range("--warmup-iterations", self.warmup_iterations, 0, self.iterations)
        check_options(self.detector_kwargs)
        for name in ("data", "images", "val_data"):
            if not getattr(self, name):
                raise UsageError(f"{flag(name)} is needed: --data JSON --images FOLDER --val-data JSON --val-images FOLDER")
        if self.iterations % self.evaluate_every:
            raise UsageError(
                f"--evaluate-every {self.evaluate_every} leaves out the last of {self.iterations} iterations;"
                " use a divisor of --iterations"
            )
        if self.long_side < self.short_side:
            raise UsageError(f"--long-side {self.long_side} must not be less than --short-side {self.short_side}")
        if any(later <= earlier for earlier, later in pairwise([0, *self.lr_steps])):
            raise UsageError(f"--lr-steps must be increasing whole numbers from 1 on, got {self.lr_steps}")
        if (self.frozen_stages or self.frozen_norm) and self.weights is None:
            name = "frozen_stages" if self.frozen_stages else "frozen_norm"
            raise UsageError(f"{flag(name)} would freeze random weights; give trained ones with --weights, or leave it out")

    def schedule(self) -> tuple[int, int]:
        return self.iterations // self.evaluate_every, 1

    @property
    def evaluation_images(self) -> str:
        """The folder of the evaluation images."""
        return self.val_images or self.images

    @property
    def detector_options(self) -> dict[str, Any]:
        """Arguments of `Detector` other than network and classes."""
        names = ("short_side", "long_side", "fpn_channels", "fpn_norm", "frozen_stages", "frozen_norm")
        return {**{name: getattr(self, name) for name in names}, "options": self.detector_kwargs}
