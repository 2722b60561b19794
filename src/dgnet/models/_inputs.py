"""What images a network takes, as far as it says."""

from __future__ import annotations

from torch import nn

_DEFAULT_SIDE = 224


def find_channels(network: nn.Module) -> int:
    """The number of channels of the images that `network` takes; 3 if it does not say."""
    given = getattr(network, "in_chans", None)
    if isinstance(given, int):
        return given
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    return 3 if first is None else first.in_channels


def find_image_size(network: nn.Module, given: int | tuple[int, int] | None = None) -> tuple[int, int]:
    """Height and width in pixels: `given` (a side, or both), or what `network` is built for, or 224."""
    if given is not None:
        return (given, given) if isinstance(given, int) else (given[0], given[1])
    for module in (network, getattr(network, "model", None)):  # `model`: of timm's feature extractors
        built_for = getattr(getattr(module, "patch_embed", None), "img_size", None)
        if isinstance(built_for, tuple) and len(built_for) == 2:
            return built_for
        cfg = getattr(module, "pretrained_cfg", None)
        if isinstance(cfg, dict) and "input_size" in cfg:
            return cfg["input_size"][1], cfg["input_size"][2]
    return _DEFAULT_SIDE, _DEFAULT_SIDE
