"""DG-ResNet: timm's ResNet with a graph for each stage and without the stem's max-pool (Table 1's costs imply this form)."""

from __future__ import annotations

from typing import Any

from timm.layers import get_norm_layer
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet, downsample_conv
from torch import nn

from dgnet.errors import UsageError
from dgnet.models._connectivity import Connectivity
from dgnet.models._dynamic import BlockParts, DynamicFamily, take_modules
from dgnet.models._factory import build_model, imagenet_cfg
from dgnet.models._protocol import TimmNetwork
from dgnet.models._state import LoadsWrapped

_PLAIN: dict[str, Any] = {"aa_layer": None, "avg_down": False, "down_kernel_size": 1, "replace_stem_pool": False}

_PATHS = {
    BasicBlock: ("conv1", "bn1", "drop_block", "act1", "aa", "conv2", "bn2", "se", "drop_path"),
    Bottleneck: ("conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa", "conv3", "bn3", "se", "drop_path"),
}


def split_block(block: Any) -> BlockParts:
    """BasicBlock and Bottleneck: ReLU after the addition; a projection if the shape changes."""
    is_basic = isinstance(block, BasicBlock)
    strided, last = (block.conv1, block.conv2) if is_basic else (block.conv2, block.conv3)
    return BlockParts(
        take_modules(block, _PATHS[type(block)]),
        block.downsample if block.downsample is not None else nn.Identity(),
        block.act2 if is_basic else block.act3,
        block.conv1.in_channels,
        last.out_channels,
        strided.stride[0],
        "downsample",
    )


class StridedResNet(LoadsWrapped, ResNet):
    """DG-ResNet's static twin: timm's ResNet with stride 2 in the first block of stage 1 instead of the stem's max-pool.

    Raises UsageError for timm's ResNet-D options, which change how a block applies its stride.
    """

    def __init__(self, block: Any, layers: tuple[int, ...], zero_init_last: bool = True, **kwargs: Any) -> None:
        for name, plain in _PLAIN.items():
            if kwargs.get(name, plain) != plain:
                raise UsageError(f"{name}={kwargs[name]!r} is not possible with stride 2 in stage 1; leave it out")
        super().__init__(block, layers, zero_init_last=zero_init_last, **kwargs)
        self.set_submodule("maxpool", nn.Identity())
        stage: Any = self.layer1
        first = stage[0]
        strided = first.conv1 if isinstance(first, BasicBlock) else first.conv2
        strided.stride = (2, 2)
        if first.downsample is None:
            in_channels, out_channels = first.conv1.in_channels, first.conv2.out_channels
            norm_layer = get_norm_layer(kwargs.get("norm_layer", nn.BatchNorm2d))
            first.downsample = downsample_conv(in_channels, out_channels, kernel_size=1, stride=2, norm_layer=norm_layer)
            self.init_weights(zero_init_last=zero_init_last)
        else:
            first.downsample[0].stride = (2, 2)


class DynamicResNet(DynamicFamily, StridedResNet):
    """ResNet whose stages are graphs. Takes timm's ResNet arguments and those of `Connectivity`."""

    stage_names = ("layer1", "layer2", "layer3", "layer4")

    def __init__(self, block: Any, layers: tuple[int, ...], zero_init_last: bool = True, **kwargs: Any) -> None:
        connectivity = Connectivity.take_from(kwargs)
        super().__init__(block, layers, zero_init_last=zero_init_last, **kwargs)
        self.build_stages(split_block, connectivity)
        self.init_weights(zero_init_last=zero_init_last)

    def static_obstacle(self, weights_of: str) -> str:
        is_twin = weights_of.startswith("strided_")
        return "" if is_twin else "its stage 1 has stride 2 where a ResNet has a max-pool in its stem"


_NETWORKS: dict[str, dict[str, Any]] = {
    "resnet18": {"block": BasicBlock, "layers": (2, 2, 2, 2)},
    "resnet50": {"block": Bottleneck, "layers": (3, 4, 6, 3)},
    "resnet101": {"block": Bottleneck, "layers": (3, 4, 23, 3)},
    "resnext50_32x4d": {"block": Bottleneck, "layers": (3, 4, 6, 3), "cardinality": 32, "base_width": 4},
}
default_cfgs = generate_default_cfgs(
    {
        f"{prefix}_{name}": imagenet_cfg(first_conv="conv1", classifier="fc")
        for prefix in ("dg", "strided")
        for name in _NETWORKS
    }
)


def _create(cls: type[nn.Module], name: str, pretrained: bool, **kwargs: Any) -> TimmNetwork:
    return build_model(cls, name, pretrained, **_NETWORKS[name.partition("_")[2]], **kwargs)


@register_model
def dg_resnet18(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """DG-ResNet-18, 11.70 M parameters, 1826 M multiply-adds (Table 1)."""
    return _create(DynamicResNet, "dg_resnet18", pretrained, **kwargs)


@register_model
def dg_resnet50(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """DG-ResNet-50, 25.62 M parameters, 4126 M multiply-adds (Table 1)."""
    return _create(DynamicResNet, "dg_resnet50", pretrained, **kwargs)


@register_model
def dg_resnet101(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """DG-ResNet-101, 44.89 M parameters, 7838 M multiply-adds (Table 1)."""
    return _create(DynamicResNet, "dg_resnet101", pretrained, **kwargs)


@register_model
def dg_resnext50_32x4d(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """DG-ResNeXt-50-32x4d, 25.09 M parameters, 4306 M multiply-adds (Table 1)."""
    return _create(DynamicResNet, "dg_resnext50_32x4d", pretrained, **kwargs)


@register_model
def strided_resnet18(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """DG-ResNet-18's static twin: ResNet-18 with stride 2 in stage 1 instead of the stem's max-pool."""
    return _create(StridedResNet, "strided_resnet18", pretrained, **kwargs)


@register_model
def strided_resnet50(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """DG-ResNet-50's static twin: ResNet-50 with stride 2 in stage 1 instead of the stem's max-pool."""
    return _create(StridedResNet, "strided_resnet50", pretrained, **kwargs)


@register_model
def strided_resnet101(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """DG-ResNet-101's static twin: ResNet-101 with stride 2 in stage 1 instead of the stem's max-pool."""
    return _create(StridedResNet, "strided_resnet101", pretrained, **kwargs)


@register_model
def strided_resnext50_32x4d(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """DG-ResNeXt-50's static twin: ResNeXt-50 with stride 2 in stage 1 instead of the stem's max-pool."""
    return _create(StridedResNet, "strided_resnext50_32x4d", pretrained, **kwargs)
