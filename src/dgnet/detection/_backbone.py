"""A feature pyramid on any registered network. A dynamic network ignores the padding of a batch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

from timm.layers import SqueezeExcite
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from dgnet.compat.timm import EfficientSqueezeExcite
from dgnet.errors import UsageError
from dgnet.graph import NetworkGates, ValidArea, current_area, find_stages, use_area

STRIDES = (4, 8, 16, 32)
"""Strides of the feature maps from which the pyramid is built (§6.3)."""

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Backbone(nn.Module):
    """`network` without its classifier, and a feature pyramid on its maps of strides 4 to 32: maps "0" to "3" and "pool".

    The submodules `body` (the network) and `fpn` (the pyramid) have torchvision's names, so that its checkpoints of the same
    backbone load.

    `frozen_stages`: how many of stem and stages are not trained; the stem counts as one. `frozen_norm`: batch normalisation
    layers keep their statistics, scale and shift. `fpn_norm`: add batch normalisation to the pyramid.

    In a dynamic network, routers pool over each image's own area, and each convolution larger than 1×1 reads zeros outside this
    area. So an image has the same maps and the same wiring with any padding, unless the network has attention or another layer
    that mixes places, besides convolutions and squeeze-and-excitation. (The pyramid and the heads read the padding, as in
    torchvision.) `announce_area` gives the padding of the next batch. A static network behaves like torchvision's.

    Raises UsageError for a network without one of the maps, and for stages of tokens, of which no area can be told.
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
        embedding = getattr(network, "patch_embed", None)
        if getattr(embedding, "strict_img_size", False):
            raise UsageError(
                f"{type(network).__name__} takes images of one size only, and a detector's have many; where the network can,"
                " allow others with --model-kwargs '{strict_img_size: false}'"
            )
        for stage in find_stages(network):
            policy = stage.node_gates.policy if isinstance(stage.node_gates, NetworkGates) else None
            if policy is not None and len(policy.trunk):
                raise UsageError(
                    "gate_policy='convolutional' is not possible in a detector: its normalisation would read the padding;"
                    " leave it out"
                )
            if stage.layout == "NLC":
                raise UsageError(
                    f"{type(network).__name__} has dynamic stages of tokens, which detection cannot use: routers would read the"
                    " padding; leave out --dynamic, or name stages of maps with --model-kwargs"
                )
        stages = self.indices[-1] + 1
        if not 0 <= frozen_stages <= stages:
            raise UsageError(f"--frozen-stages must be 0 to {stages} (the stem counts as one), got {frozen_stages}")
        frozen = set(_modules_up_to(network, str(infos[frozen_stages - 1]["module"])) if frozen_stages else [])
        if frozen_norm:
            frozen |= {module for module in network.modules() if isinstance(module, _NORMS)}
        for module in frozen:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
        network.prune_intermediate_layers(list(self.indices), prune_head=True)  # type: ignore[operator]
        self.body = network
        self.frozen_norms = [n for n, module in network.named_modules() if module in frozen and isinstance(module, _NORMS)]
        widths = [int(infos[index]["num_chs"]) for index in self.indices]
        norm = nn.BatchNorm2d if fpn_norm else None
        self.fpn = FeaturePyramidNetwork(widths, channels, LastLevelMaxPool(), norm)
        self.out_channels = channels
        self.stages = find_stages(network)
        if self.stages:
            self._register_masks()
        self.train()  # puts frozen normalisation layers into evaluation mode; Lightning does not call `train` at the start

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        for name in self.frozen_norms:
            self.body.get_submodule(name).eval()
        return self

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """From a padded batch, (B, 3, H, W), to the maps by name, (B, channels, H / stride, W / stride)."""
        area = _ANNOUNCED.get()
        _ANNOUNCED.set(None)
        if area is not None and self.training and any(stage.grad_checkpointing for stage in self.stages):
            raise UsageError("gradient checkpointing cannot be used with padded images: its second pass would read the padding")
        with use_area(area if self.stages else None):
            maps = self.body.forward_intermediates(  # type: ignore[operator]
                images, indices=list(self.indices), stop_early=True, intermediates_only=True
            )
        named = OrderedDict((str(level), feature) for level, feature in enumerate(maps))
        # In float32, under autocast too, because anchors get the type of the maps.
        return OrderedDict((level, feature.float()) for level, feature in self.fpn(named).items())

    def _register_masks(self) -> None:
        for module in self.body.modules():
            if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1:
                module.register_forward_pre_hook(_mask)
            elif isinstance(module, SqueezeExcite | EfficientSqueezeExcite):
                reader = module.fc1 if isinstance(module, SqueezeExcite) else module.conv_reduce
                module.register_forward_pre_hook(_mask)
                module.register_forward_pre_hook(partial(_note_share, reader))
                reader.register_forward_pre_hook(_rescale_mean)


_ANNOUNCED: ContextVar[ValidArea | None] = ContextVar("announced_area", default=None)


def announce_area(area: ValidArea | None) -> None:
    """Set the padding of the next batch that a `Backbone` reads in this thread or task; None for no padding."""
    _ANNOUNCED.set(area)


def _mask(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Set the padding of a module's input to zero: after a normalisation layer it is no longer zero."""
    area = current_area()
    if area is None:
        return None
    feature, *rest = inputs
    return (feature * area.mask(feature), *rest)


def _note_share(reader: nn.Module, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Keep the share of the map that the image covers, for `_rescale_mean` of the module that reads the mean."""
    area = current_area()
    if area is not None:
        area.shares[id(reader)] = area.share(inputs[0])


def _rescale_mean(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Turn the mean over the map into the mean over the image's own area, (B, C, 1, 1)."""
    area = current_area()
    if area is None:
        return None
    return (inputs[0] / area.shares[id(module)].to(inputs[0].dtype)[:, None, None, None],)


def _feature_infos(network: nn.Module) -> list[Mapping[str, Any]]:
    infos = getattr(network, "feature_info", None)
    if not infos or not hasattr(network, "forward_intermediates"):
        raise UsageError(
            f"{type(network).__name__} has no feature maps to detect on; use a network with stages, such as dg_resnet50"
        )
    return list(infos.get_dicts() if hasattr(infos, "get_dicts") else infos)


def _find_maps(network: nn.Module, infos: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """For each stride the index of its last map."""
    by_stride = {int(info["reduction"]): index for index, info in enumerate(infos)}
    missing = [stride for stride in STRIDES if stride not in by_stride]
    if missing:
        has = ", ".join(map(str, by_stride))
        needs = ", ".join(map(str, STRIDES))
        raise UsageError(f"{type(network).__name__} has feature maps of strides {has}, and detection needs {needs}")
    return tuple(by_stride[stride] for stride in STRIDES)


def _modules_up_to(network: nn.Module, name: str) -> list[nn.Module]:
    """The modules of `network` in order, up to the module `name` and its submodules."""
    found: list[nn.Module] = []
    is_reached = False
    for other, module in network.named_modules():
        is_within = other == name or other.startswith(f"{name}.")
        if is_reached and not is_within:
            break
        is_reached |= is_within
        found.append(module)
    return found
