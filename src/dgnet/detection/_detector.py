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

# Arguments of FasterRCNN that cannot be set as options, and the reason or the option to use instead.
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
"""The numeric arguments of FasterRCNN, and their defaults."""


def check_options(options: Mapping[str, Any]) -> None:
    """Raises UsageError for an option that FasterRCNN does not have, a negative value, or a fraction for a whole number."""
    for name, value in options.items():
        if name in _TAKEN:
            raise UsageError(f"the detector's {name} cannot be set: {_TAKEN[name]}")
        if name not in OPTIONS:
            raise UsageError(f"torchvision's FasterRCNN has no numeric option {name!r}{did_you_mean(name, OPTIONS)}")
        check_range(name, value, 0)
        if isinstance(OPTIONS[name], int) and not isinstance(value, int):
            raise UsageError(f"{name} must be a whole number, got {value}")


class Detector(FasterRCNN):  # type: ignore[misc]  # torchvision has no types
    """Faster R-CNN with a feature pyramid on `network`, whose classifier is removed.

    Inputs and outputs are those of torchvision's detectors. Inputs: a list of images, (3, H, W) in [0, 1], and in training a
    list of targets. Outputs: losses in training, a list of {boxes, scores, labels} in evaluation. With a static network the
    results are torchvision's.

    `num_classes`: without background. `short_side`, `long_side`: images are scaled to these sides, in pixels. `options`:
    further arguments of torchvision's `FasterRCNN`. The others: see `Backbone`.

    Raises UsageError for an option that FasterRCNN does not have, and for a network without the feature maps.
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
        # The transform pads a batch; its output has the size of each image before padding.
        self.transform.register_forward_hook(_announce_area)
        # Boxes are computed in float32, under autocast too: half precision would shift their corners by pixels.
        for module in (self.rpn.head, self.roi_heads.box_predictor):
            module.register_forward_hook(_to_float32)


def _announce_area(
    module: nn.Module, inputs: tuple[Any, ...], outputs: tuple[ImageList, list[dict[str, Tensor]] | None]
) -> None:
    images = outputs[0]
    height, width = images.tensors.shape[-2:]
    is_padded = any(tuple(size) != (height, width) for size in images.image_sizes)
    announce_area(ValidArea(images.image_sizes, (height, width)) if is_padded else None)


def _to_float32(module: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> Any:
    """Outputs in float32: a tensor, or nested lists and tuples of tensors."""
    if isinstance(outputs, Tensor):
        return outputs.float()
    return type(outputs)(_to_float32(module, inputs, output) for output in outputs)
