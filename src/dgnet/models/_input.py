"""What a network takes as input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models import adapt_input_conv, get_pretrained_cfg
from torch import Tensor, nn


def input_channels(network: nn.Module) -> int:
    """The number of channels of a network's images: its `in_chans`, else those of its first convolution, else 3."""
    own = getattr(network, "in_chans", None)
    if isinstance(own, int):
        return own
    return next((module.in_channels for module in network.modules() if isinstance(module, nn.Conv2d)), 3)


def first_convolutions(network: nn.Module) -> tuple[str, ...]:
    """The names of the convolutions that read the image, according to the network's timm config."""
    names = getattr(network, "pretrained_cfg", {}).get("first_conv") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def adapt_input(network: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for RGB images, for a network of another number of channels. For grey images they are summed over RGB."""
    channels, adapted = input_channels(network), dict(state_dict)
    for name in (f"{name}.weight" for name in first_convolutions(network)):
        if name in adapted and adapted[name].ndim == 4 and adapted[name].shape[1] == 3 and channels != 3:
            adapted[name] = adapt_input_conv(channels, adapted[name])
    return adapted


def match_image_size(name: str, options: Mapping[str, Any], image_size: int | None) -> tuple[dict[str, Any], int | None]:
    """Options and image size in pixels that agree, for a network whose parts depend on the size, such as most transformers.

    For a network that timm marks so, `image_size` sets its option `img_size`. A given `img_size` sets the image size. For all
    other networks, and where both are given, nothing changes.
    """
    own = options.get("img_size")
    cfg = get_pretrained_cfg(name)
    if image_size is None:
        return dict(options), own if isinstance(own, int) else None
    if own is None and cfg is not None and cfg.fixed_input_size:
        return {**options, "img_size": image_size}, image_size
    return dict(options), image_size
