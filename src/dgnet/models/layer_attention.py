"""Static baselines: ResNets for small images with attention over channels (SE) or over layers (MRLA-light).

SE: Hu et al., Squeeze-and-Excitation Networks, CVPR 2018, with timm's module. MRLA-light: Fang et al., Cross-Layer
Retrospective Retrieving via Layer Attention, ICLR 2023, Eq. (6).

Letters: B batch, C channels, H and W height and width.
"""

from __future__ import annotations

from math import log2
from types import MappingProxyType
from typing import Any

import torch
from timm.layers import get_attn
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from dgnet.errors import UsageError
from dgnet.models._protocol import TimmNetwork
from dgnet.models.cifar_resnet import CifarResNet, cifar_cfg, create_cifar

_HEAD_CHANNELS = 32
"""Channels of a head of MRLA; fewer if the map has fewer."""


class LayerAttention(nn.Module):
    """o_t = σ(q·k) · v + λ o_(t-1) of MRLA-light, (B, C, H, W), where q·k is one number for each head.

    q and k: 1D convolutions over the channels of the pooled x_t; v: a depthwise 3×3 convolution of x_t. As in the authors'
    code, the identity path of the block stands for o_(t-1).

    Raises UsageError if the channels are no whole number of heads.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head_channels = min(_HEAD_CHANNELS, channels)
        if channels % self.head_channels:
            raise UsageError(
                f"channels must be at most {_HEAD_CHANNELS} or a multiple of {_HEAD_CHANNELS}, the channels of a head of MRLA,"
                f" got {channels}"
            )
        size = int(abs((log2(channels) + 1) / 2))
        size += 1 - size % 2
        self.query, self.key = (nn.Conv1d(1, 1, size, padding=size // 2, bias=False) for _ in range(2))
        self.value = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.scale = nn.Parameter(torch.randn(channels, 1, 1))  # λ

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        pooled = x.mean((2, 3))[:, None]
        product = (self.query(pooled) * self.key(pooled)).unflatten(2, (-1, self.head_channels)).sum(3)
        heads = (product * self.head_channels**-0.5).sigmoid()  # (B, 1, heads)
        weights = heads[:, 0].repeat_interleave(self.head_channels, dim=1)
        attended: Tensor = self.value(x) * weights[..., None, None] + self.scale * before
        return attended


class LayerAttentionBlock(BasicBlock):
    """A residual block, y, then y + BN(o) with o of `LayerAttention`. As in the authors' code, drop path drops only BN(o)."""

    def __init__(self, *args: Any, drop_path: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        channels = self.conv2.out_channels
        self.attention, self.attention_norm = LayerAttention(channels), nn.BatchNorm2d(channels)
        self.attention_drop = drop_path or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        before = x if self.downsample is None else self.downsample(x)
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.act2(self.bn2(self.conv2(y)) + before)
        out: Tensor = y + self.attention_drop(self.attention_norm(self.attention(y, before)))
        return out


class SEResNet(CifarResNet):
    """CifarResNet with squeeze-and-excitation in each block."""

    block_kwargs = MappingProxyType({"attn_layer": get_attn("se")})


class MrlaResNet(CifarResNet):
    """CifarResNet with MRLA-light after each block."""

    block = LayerAttentionBlock


_NAMES = ("seresnet20", "seresnet32", "mrla_resnet20", "mrla_resnet32")
default_cfgs = generate_default_cfgs({name: cifar_cfg() for name in _NAMES})


@register_model
def seresnet20(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """ResNet-20 for 32×32 images with squeeze-and-excitation."""
    return create_cifar(SEResNet, "seresnet20", 20, pretrained, **kwargs)


@register_model
def seresnet32(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """ResNet-32 for 32×32 images with squeeze-and-excitation."""
    return create_cifar(SEResNet, "seresnet32", 32, pretrained, **kwargs)


@register_model
def mrla_resnet20(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """ResNet-20 for 32×32 images with MRLA-light."""
    return create_cifar(MrlaResNet, "mrla_resnet20", 20, pretrained, **kwargs)


@register_model
def mrla_resnet32(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """ResNet-32 for 32×32 images with MRLA-light."""
    return create_cifar(MrlaResNet, "mrla_resnet32", 32, pretrained, **kwargs)
