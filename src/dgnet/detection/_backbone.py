"""Any registered network under a feature pyramid; a dynamic one reads nothing but the images of a padded batch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from timm.layers import SqueezeExcite
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from dgnet.errors import UsageError
from dgnet.graph import ValidArea, current_area, find_stages, use_area

STRIDES = (4, 8, 16, 32)
"""Of the feature maps that the pyramid is built on (§6.3)."""

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Backbone(nn.Module):
    """`network` up to its last stage, and a feature pyramid on its maps of strides 4 to 32: maps "0" to "3" and "pool".

    The network's parameters are those of `body`, the pyramid's those of `fpn`: names as torchvision's, so that its
    checkpoints of the same backbone load.

    `frozen_stages`: so many of stem and stages do not train, the stem counting as one. `frozen_norm`: batch normalisations
    keep their statistics, scale and shift. `fpn_norm`: batch normalisation in the pyramid too.

    Where the network is dynamic, routers pool over each image's own area, and each spatial convolution sees zeros beside it:
    an image has the same maps and the same wiring whatever it is padded with. (The pyramid and what follows see the padding,
    as they do in torchvision.) `announce_area` says how the next batch is padded; a static network is as torchvision's.

    Raises UsageError for a network that lacks one of the maps.
    """

    def __init__(
        self,
        network: nn.Module,
        channels: int = 256,
        frozen_stages: int = 0,
        frozen_norm: bool = False,
        fpn_norm: bool = False,
    ) -> None:
        super().__init__()
        infos = _feature_infos(network)
        self.indices = _find_maps(network, infos)
        stages = self.indices[-1] + 1
        if not 0 <= frozen_stages <= stages:
            raise UsageError(f"--frozen-stages must be 0 to {stages}, stem and stages, got {frozen_stages}")
        frozen = set(_modules_up_to(network, str(infos[frozen_stages - 1]["module"])) if frozen_stages else [])
        if frozen_norm:
            frozen |= {module for module in network.modules() if isinstance(module, _NORMS)}
        for module in frozen:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
        network.prune_intermediate_layers(list(self.indices), prune_head=True)  # type: ignore[operator]
        self.body = network
        self.still = [name for name, module in network.named_modules() if module in frozen and isinstance(module, _NORMS)]
        widths = [int(infos[index]["num_chs"]) for index in self.indices]
        norm = nn.BatchNorm2d if fpn_norm else None
        self.fpn = FeaturePyramidNetwork(widths, channels, LastLevelMaxPool(), norm)
        self.out_channels = channels
        self.stages = find_stages(network)
        if self.stages:
            self._register_masks()
        self.train()  # Lightning leaves modules in the mode that they are built in

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        for name in self.still:
            self.body.get_submodule(name).eval()
        return self

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Maps by name, (B, channels, H / stride, W / stride), from a padded batch, (B, 3, H, W)."""
        area = _ANNOUNCED.get()
        _ANNOUNCED.set(None)
        if area is not None and self.training and any(stage.grad_checkpointing for stage in self.stages):
            raise UsageError("gradient checkpointing does not go with padded images: the second pass would see the padding")
        with use_area(area if self.stages else None):
            maps = self.body.forward_intermediates(  # type: ignore[operator]
                images, indices=list(self.indices), stop_early=True, intermediates_only=True
            )
        named = OrderedDict((str(level), feature) for level, feature in enumerate(maps))
        # In float32 under autocast too: anchors take their type from the maps.
        return OrderedDict((level, feature.float()) for level, feature in self.fpn(named).items())

    def _register_masks(self) -> None:
        for module in self.body.modules():
            if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1:
                module.register_forward_pre_hook(_mask)
            elif isinstance(module, SqueezeExcite):
                module.register_forward_pre_hook(_mask)
                module.register_forward_pre_hook(_note_share)
                module.fc1.register_forward_pre_hook(_rescale_mean)


_ANNOUNCED: ContextVar[ValidArea | None] = ContextVar("announced_area", default=None)


def announce_area(area: ValidArea | None) -> None:
    """Say how the batch is padded that a `Backbone` reads next in this thread or task; None for no padding."""
    _ANNOUNCED.set(area)


def _mask(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Zeros in the padding of what a module reads: normalisation has filled it."""
    area = current_area()
    if area is None:
        return None
    feature, *rest = inputs
    return (feature * area.mask(feature), *rest)


def _note_share(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Keep, for the mean that follows, the share of the map that holds pixels."""
    area = current_area()
    if area is not None:
        area.shares[id(module.fc1)] = area.share(inputs[0])


def _rescale_mean(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """The mean over the image's own area from that over the map, (n, C, 1, 1)."""
    area = current_area()
    if area is None:
        return None
    return (inputs[0] / area.shares[id(module)].to(inputs[0].dtype)[:, None, None, None],)


def _feature_infos(network: nn.Module) -> list[Mapping[str, Any]]:
    infos = getattr(network, "feature_info", None)
    if not infos or not hasattr(network, "forward_intermediates"):
        raise UsageError(f"{type(network).__name__} has no feature maps to detect on; use a network of stages, as dg_resnet50")
    return list(infos.get_dicts() if hasattr(infos, "get_dicts") else infos)


def _find_maps(network: nn.Module, infos: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """The indices of the last map of each stride."""
    by_stride = {int(info["reduction"]): index for index, info in enumerate(infos)}
    missing = [stride for stride in STRIDES if stride not in by_stride]
    if missing:
        has = ", ".join(map(str, by_stride))
        needs = ", ".join(map(str, STRIDES))
        raise UsageError(f"{type(network).__name__} has feature maps of strides {has}, and detection needs {needs}")
    return tuple(by_stride[stride] for stride in STRIDES)


def _modules_up_to(network: nn.Module, name: str) -> list[nn.Module]:
    """The modules of `network` in order, up to the module `name` and those in it."""
    found: list[nn.Module] = []
    is_reached = False
    for other, module in network.named_modules():
        is_within = other == name or other.startswith(f"{name}.")
        if is_reached and not is_within:
            break
        is_reached |= is_within
        found.append(module)
    return found
