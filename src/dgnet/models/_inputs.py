"""What images a network takes, as far as it says."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any

from timm.models import adapt_input_conv, get_pretrained_cfg
from torch import Tensor, nn

from dgnet.errors import UsageError

_DEFAULT_SIDE = 224


def find_channels(network: nn.Module) -> int:
    """The number of channels of the images that `network` takes; 3 if it does not say."""
    given = getattr(network, "in_chans", None)
    if isinstance(given, int):
        return given
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    return 3 if first is None else first.in_channels


def find_image_size(network: nn.Module, given: int | tuple[int, int] | None = None) -> tuple[int, int]:
    """Height and width in pixels: `given` (a side, or both), or what `network` is built for, or 224.

    Raises UsageError if `given` is neither.
    """
    if given is not None:
        sides = (given, given) if isinstance(given, int) else given
        is_pair = isinstance(sides, tuple | list) and len(sides) == 2
        if not is_pair or not all(type(side) is int and side > 0 for side in sides):
            raise UsageError(f"image_size is a number of pixels, or height and width, got {given!r}")
        return sides[0], sides[1]
    modules = network, getattr(network, "model", None)  # `model`: of timm's feature extractors
    for module in modules:
        built_for = getattr(getattr(module, "patch_embed", None), "img_size", None)
        if isinstance(built_for, tuple) and len(built_for) == 2:
            return built_for
    for module in modules:
        cfg = getattr(module, "pretrained_cfg", None)
        if isinstance(cfg, dict) and "input_size" in cfg:
            return cfg["input_size"][1], cfg["input_size"][2]
    return _DEFAULT_SIDE, _DEFAULT_SIDE


def first_convolutions(network: nn.Module) -> tuple[str, ...]:
    """The names of the convolutions that read the image, according to the network's timm config."""
    names = getattr(network, "pretrained_cfg", {}).get("first_conv") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def adapt_input(network: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for RGB images, for a network of another number of channels. For grey images they are summed over RGB."""
    channels, adapted = find_channels(network), dict(state_dict)
    for name in (f"{name}.weight" for name in first_convolutions(network)):
        if name in adapted and adapted[name].ndim == 4 and adapted[name].shape[1] == 3 and channels != 3:
            adapted[name] = adapt_input_conv(channels, adapted[name])
    return adapted


def adapt_positions(network: nn.Module, state_dict: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """The tensors `names` of `state_dict`, which have another shape in `network`, for images of its size, where timm knows how.

    timm resamples positions of its published weights so. For weights of another network nothing is returned.
    """
    module = sys.modules[getattr(network, "static_class", type(network)).__module__]
    adapt = getattr(module, "checkpoint_filter_fn", None)
    if adapt is None or not names:
        return {}
    try:
        adapted, own = adapt(dict(state_dict), network), network.state_dict()
    except Exception:  # timm's functions may raise anything for weights that are not the network's
        return {}
    return {name: adapted[name] for name in names if name in adapted and adapted[name].shape == own[name].shape}


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
