"""torchvision's Faster R-CNN on any registered network, static or dynamic (§6.3)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.image_list import ImageList

from dgnet.detection._backbone import Backbone, announce_area
from dgnet.errors import UsageError, check_range, did_you_mean, reason
from dgnet.graph import ValidArea

# Arguments of FasterRCNN that the detector decides, and how.
_TAKEN = {
    "backbone": "it is the model",
    "num_classes": "it follows from the data",
    "min_size": "use short_side",
    "max_size": "use long_side",
    "image_mean": "it is the model's own",
    "image_std": "it is the model's own",
}
OPTIONS: dict[str, float] = {
    name: parameter.default
    for name, parameter in inspect.signature(FasterRCNN.__init__).parameters.items()
    if name not in _TAKEN and isinstance(parameter.default, int | float)
}
"""The numbers that FasterRCNN takes, and their defaults."""


def check_options(options: Mapping[str, Any]) -> None:
    """Raises UsageError for an option that FasterRCNN has not, or a value of another kind than its default."""
    for name, value in options.items():
        if name in _TAKEN:
            raise UsageError(f"the detector's {name} cannot be set: {_TAKEN[name]}")
        if name not in OPTIONS:
            raise UsageError(f"torchvision's FasterRCNN has no number {name!r}{did_you_mean(name, OPTIONS)}")
        check_range(name, value, 0)
        if isinstance(OPTIONS[name], int) and not isinstance(value, int):
            raise UsageError(f"{name} must be a whole number, got {value}")


class Detector(FasterRCNN):
    """Faster R-CNN with a feature pyramid on `network`, which loses its classifier.

    Takes and gives what torchvision's does: a list of images, (3, H, W) in [0, 1], and in training a list of targets; gives
    losses in training, and a list of {boxes, scores, labels} in evaluation. With a static network it is torchvision's.

    `num_classes`: without background. `short_side`, `long_side`: in pixels, what images are scaled to. `options`: further
    arguments of torchvision's `FasterRCNN`. The others: see `Backbone`.

    Raises UsageError for an option that FasterRCNN has not, and for a network without the feature maps.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        short_side: int = 800,
        long_side: int = 1333,
        fpn_channels: int = 256,
        fpn_norm: bool = False,
        frozen_stages: int = 0,
        frozen_norm: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        options = dict(options or {})
        check_options(options)
        cfg: Any = network.pretrained_cfg
        backbone = Backbone(network, fpn_channels, frozen_stages, frozen_norm, fpn_norm)
        sizes = {"min_size": short_side, "max_size": long_side}
        try:
            super().__init__(
                backbone, num_classes + 1, **sizes, image_mean=list(cfg["mean"]), image_std=list(cfg["std"]), **options
            )
        except (TypeError, ValueError, AssertionError) as error:
            given = ", ".join(f"{name}={value!r}" for name, value in options.items())
            raise UsageError(f"torchvision's FasterRCNN cannot be built with {given}: {reason(error)}") from None
        # The transform pads a batch, and knows what it padded.
        self.transform.register_forward_hook(_announce_area)
        # Boxes are computed in float32 under autocast too: half precision rounds their corners by pixels.
        for module in (self.rpn.head, self.roi_heads.box_predictor):
            module.register_forward_hook(_lift)


def _announce_area(
    module: nn.Module, inputs: tuple[Any, ...], outputs: tuple[ImageList, list[dict[str, Tensor]] | None]
) -> None:
    images = outputs[0]
    height, width = images.tensors.shape[-2:]
    is_padded = any(tuple(size) != (height, width) for size in images.image_sizes)
    announce_area(ValidArea(images.image_sizes, (height, width)) if is_padded else None)


def _lift(module: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> Any:
    """Outputs in float32, whatever lists and tuples hold them."""
    if isinstance(outputs, Tensor):
        return outputs.float()
    return type(outputs)(_lift(module, inputs, output) for output in outputs)
