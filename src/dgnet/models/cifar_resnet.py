"""The CIFAR forms of ResNet (He et al., 2016a, §4.2), ResNetV2 and DG-ResNet: 6n + 2 layers, three stages of n basic blocks.

Shortcuts are option B of that paper: a 1×1 convolution and BN if the shape changes, otherwise the identity. ResNetV2 is the
pre-activation form (He et al., 2016b): no activation after an addition, as on the edges of DG-ResNet.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, downsample_conv
from torch import Tensor, nn

from dgnet.models._connectivity import Connectivity
from dgnet.models._dynamic import DynamicFamily
from dgnet.models._factory import build_model
from dgnet.models._protocol import TimmNetwork
from dgnet.models._published import packaged_cfgs
from dgnet.models._staged import StagedNetwork, read_sizes
from dgnet.models.resnet import split_block


class CifarResNet(StagedNetwork):
    """A 3×3 convolution as stem, three stages of basic blocks with strides 1, 2, 2, pooling, classifier.

    `layers`: blocks of each stage; `channels`: C of each stage. Each block's last γ starts at 1, as in He et al. (2016). If it
    starts at 0, as in timm's ResNet, a run of few epochs learns more slowly.
    """

    stem_names: tuple[str, ...] = ("conv1", "bn1", "act1")
    stage_names: tuple[str, ...] = ("layer1", "layer2", "layer3")
    block: type[BasicBlock] = BasicBlock
    block_kwargs: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        layers: tuple[int, int, int],
        num_classes: int = 10,
        in_chans: int = 3,
        channels: tuple[int, int, int] = (16, 32, 64),
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = False,
    ) -> None:
        super().__init__()
        three = tuple[int, int, int]
        depths, widths = read_sizes("layers", layers, three), read_sizes("channels", channels, three)
        self.in_chans = in_chans
        width = widths[0]
        self.build_stem(in_chans, width)
        self.feature_info = [{"num_chs": width, "reduction": 1, "module": self.stem_names[-1]}]
        drop_paths = iter(drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths)))
        reduction = 1
        for name, depth, planes, stage_stride in zip(self.stage_names, depths, widths, (1, 2, 2), strict=True):
            blocks = []
            for stride in (stage_stride, *[1] * (depth - 1)):
                blocks.append(self.build_block(width, planes, stride, next(drop_paths)))
                width = planes
            self.add_module(name, nn.Sequential(*blocks))
            reduction *= stage_stride
            self.feature_info.append({"num_chs": planes, "reduction": reduction, "module": name})
        self.num_features = width
        self.build_neck()
        self.build_head(num_classes, global_pool, drop_rate)
        self.init_weights(zero_init_last=zero_init_last)

    def build_stem(self, in_chans: int, channels: int) -> None:
        """The layers before the first stage, under the names `stem_names`."""
        self.conv1 = nn.Conv2d(in_chans, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU(inplace=True)

    def build_block(self, in_channels: int, channels: int, stride: int, drop_path: float) -> nn.Module:
        """A residual block. `drop_path`: the rate at which it is left out in training."""
        keeps_shape = stride == 1 and in_channels == channels
        projection = None if keeps_shape else downsample_conv(in_channels, channels, 1, stride, norm_layer=nn.BatchNorm2d)
        drop = DropPath(drop_path) if drop_path else None
        return self.block(in_channels, channels, stride, projection, drop_path=drop, **self.block_kwargs)

    def build_neck(self) -> None:
        """The layers after the last stage, under the names `neck_names`, for `num_features` channels. Here there are none."""

    def init_weights(self, zero_init_last: bool = False) -> None:
        super().init_weights()
        module: Any
        for module in self.modules():
            if zero_init_last and hasattr(module, "zero_init_last"):
                module.zero_init_last()


class PreActivationBlock(nn.Module):
    """x + conv(act(BN(conv(act(BN(x)))))) (He et al., 2016b, Fig. 4e). A changed shape is projected after the first act."""

    def __init__(self, in_channels: int, channels: int, stride: int, drop_path: nn.Module) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.act1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.drop_path = drop_path
        keeps_shape = stride == 1 and in_channels == channels
        self.downsample = None if keeps_shape else nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(y)
        out: Tensor = shortcut + self.drop_path(self.conv2(self.act2(self.bn2(self.conv1(y)))))
        return out


class CifarResNetV2(CifarResNet):
    """CifarResNet with pre-activation blocks (He et al., 2016b). The stem is a convolution; BN, ReLU follow the last stage."""

    stem_names = ("conv1",)
    neck_names = ("norm", "act")

    def build_block(self, in_channels: int, channels: int, stride: int, drop_path: float) -> nn.Module:
        return PreActivationBlock(in_channels, channels, stride, DropPath(drop_path) if drop_path else nn.Identity())

    def build_stem(self, in_chans: int, channels: int) -> None:
        self.conv1 = nn.Conv2d(in_chans, channels, 3, padding=1, bias=False)

    def build_neck(self) -> None:
        self.norm, self.act = nn.BatchNorm2d(self.num_features), nn.ReLU(inplace=True)


class DynamicCifarResNet(DynamicFamily, CifarResNet):
    """CifarResNet whose stages are graphs. Takes its arguments and those of `Connectivity`."""

    def __init__(self, layers: tuple[int, int, int], zero_init_last: bool = False, **kwargs: Any) -> None:
        connectivity = Connectivity.take_from(kwargs)
        super().__init__(layers, zero_init_last=zero_init_last, **kwargs)
        self.build_stages(split_block, connectivity)
        self.init_weights(zero_init_last=zero_init_last)


def cifar_cfg() -> dict[str, Any]:
    """A default config for timm: CIFAR-10 at 32 pixels."""
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "apache-2.0",
    }


_NAMES = (*(f"{prefix}{depth}" for prefix in ("resnet", "resnetv2_", "dg_resnet") for depth in (20, 32, 56, 110)), "resnet44")
default_cfgs = generate_default_cfgs({**{name: cifar_cfg() for name in _NAMES}, **packaged_cfgs(*_NAMES)})


def create_cifar(cls: type[CifarResNet], name: str, depth: int, pretrained: bool, **kwargs: Any) -> TimmNetwork:
    """A network of 6n + 2 = `depth` layers; each registered function calls it."""
    blocks = (depth - 2) // 6
    return build_model(cls, name, pretrained, {"out_indices": (0, 1, 2, 3)}, layers=(blocks, blocks, blocks), **kwargs)


@register_model
def resnet20(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """ResNet-20 for 32×32 images, the static baseline."""
    return create_cifar(CifarResNet, "resnet20", 20, pretrained, **kwargs)


@register_model
def resnet32(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """ResNet-32 for 32×32 images, the static baseline."""
    return create_cifar(CifarResNet, "resnet32", 32, pretrained, **kwargs)


@register_model
def resnet44(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """ResNet-44 for 32×32 images, the static baseline."""
    return create_cifar(CifarResNet, "resnet44", 44, pretrained, **kwargs)


@register_model
def resnet56(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """ResNet-56 for 32×32 images, the static baseline."""
    return create_cifar(CifarResNet, "resnet56", 56, pretrained, **kwargs)


@register_model
def resnet110(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """ResNet-110 for 32×32 images, the static baseline."""
    return create_cifar(CifarResNet, "resnet110", 110, pretrained, **kwargs)


@register_model
def resnetv2_20(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """ResNetV2-20 for 32×32 images, pre-activation."""
    return create_cifar(CifarResNetV2, "resnetv2_20", 20, pretrained, **kwargs)


@register_model
def resnetv2_32(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """ResNetV2-32 for 32×32 images, pre-activation."""
    return create_cifar(CifarResNetV2, "resnetv2_32", 32, pretrained, **kwargs)


@register_model
def resnetv2_56(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """ResNetV2-56 for 32×32 images, pre-activation."""
    return create_cifar(CifarResNetV2, "resnetv2_56", 56, pretrained, **kwargs)


@register_model
def resnetv2_110(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """ResNetV2-110 for 32×32 images, pre-activation."""
    return create_cifar(CifarResNetV2, "resnetv2_110", 110, pretrained, **kwargs)


@register_model
def dg_resnet20(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """DG-ResNet-20 for 32×32 images."""
    return create_cifar(DynamicCifarResNet, "dg_resnet20", 20, pretrained, **kwargs)


@register_model
def dg_resnet32(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """DG-ResNet-32 for 32×32 images."""
    return create_cifar(DynamicCifarResNet, "dg_resnet32", 32, pretrained, **kwargs)


@register_model
def dg_resnet56(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """DG-ResNet-56 for 32×32 images."""
    return create_cifar(DynamicCifarResNet, "dg_resnet56", 56, pretrained, **kwargs)


@register_model
def dg_resnet110(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """DG-ResNet-110 for 32×32 images."""
    return create_cifar(DynamicCifarResNet, "dg_resnet110", 110, pretrained, **kwargs)
