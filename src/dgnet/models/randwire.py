"""RandWire in the small regime (Xie et al., 2019): N = 32 blocks in a stage, C = 78; and DG-Net on the same blocks (Table 4).

A block is ReLU, 3×3 separable convolution, BN. If its only in-edge is from the input node, it is an entry node: it reads the
raw stage input, with stride 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from torch import nn

from dgnet.errors import check_range
from dgnet.graph import Topology
from dgnet.models._connectivity import Connectivity
from dgnet.models._dynamic import BlockParts, DynamicFamily, Transform, build_stage
from dgnet.models._factory import build_model, imagenet_cfg
from dgnet.models._protocol import TimmNetwork
from dgnet.models._staged import StagedNetwork


def build_node(in_channels: int, out_channels: int, stride: int, drop_path_rate: float = 0.0) -> Transform:
    """ReLU, 3×3 separable convolution, BN; in training its output is 0 for a sample with probability `drop_path_rate`."""
    node = Transform()
    node.add_module("act", nn.ReLU())
    node.add_module("conv_dw", nn.Conv2d(in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False))
    node.add_module("conv_pw", nn.Conv2d(in_channels, out_channels, 1, bias=False))
    node.add_module("bn", nn.BatchNorm2d(out_channels))
    if drop_path_rate:
        node.add_module("drop_path", DropPath(drop_path_rate))
    return node


def build_convolution(in_channels: int, out_channels: int, kernel_size: int, stride: int, act: bool = True) -> nn.Module:
    """(ReLU,) convolution, BN: the layers before and after the wired stages."""
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
    return nn.Sequential(*([nn.ReLU()] if act else []), convolution, nn.BatchNorm2d(out_channels))


class RandWire(DynamicFamily, StagedNetwork):
    """Two strided convolutions, three wired stages of C, 2C and 4C channels, a 1×1 convolution, pooling, classifier.

    `num_blocks`: blocks of each stage (N of Xie et al.). `channels`: C. `stem_stride`: stride of each of the two convolutions;
    use 1 for small images. `drop_path_rate`: of the last block, in training; the rates of the blocks rise to it from 0. Also
    takes the options of `Connectivity`.
    """

    stem_names = ("conv1", "conv2")
    stage_names = ("layer1", "layer2", "layer3")
    neck_names = ("conv3", "act3")

    def __init__(
        self,
        num_blocks: int = 32,
        channels: int = 78,
        num_classes: int = 1000,
        in_chans: int = 3,
        head_channels: int = 1280,
        stem_stride: int = 2,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        connectivity = Connectivity.take_from(options)
        if options:
            raise TypeError(f"__init__() got an unexpected keyword argument '{next(iter(options))}'")
        check_range("num_blocks", num_blocks, 1)
        check_range("channels", channels, 2)
        check_range("head_channels", head_channels, 1)
        check_range("stem_stride", stem_stride, 1, 2)
        check_range("drop_path_rate", drop_path_rate, 0, 1)
        self.in_chans = in_chans
        self.conv1 = build_convolution(in_chans, channels // 2, 3, stem_stride, act=False)
        self.conv2 = build_convolution(channels // 2, channels, 3, stem_stride)
        self.feature_info = [{"num_chs": channels, "reduction": stem_stride**2, "module": "conv2"}]
        self.connectivity_options = connectivity.plain_options()
        width = channels
        topologies = connectivity.build_topologies([num_blocks + 2] * len(self.stage_names))
        total = num_blocks * len(self.stage_names)
        rates = [drop_path_rate * block / max(total - 1, 1) for block in range(total)]
        for index, (name, topology) in enumerate(zip(self.stage_names, topologies, strict=True), start=1):
            planes = channels * 2 ** (index - 1)
            own_rates = rates[(index - 1) * num_blocks : index * num_blocks]
            self.add_module(name, build_wired_stage(topology, width, planes, connectivity, index, own_rates))
            width = planes
            self.feature_info.append({"num_chs": width, "reduction": stem_stride**2 * 2**index, "module": name})
        self.conv3 = build_convolution(width, head_channels, 1, stride=1)
        self.act3 = nn.ReLU()
        self.num_features = head_channels
        self.build_head(num_classes, global_pool, drop_rate)
        self.init_weights()


def build_wired_stage(
    topology: Topology,
    in_channels: int,
    channels: int,
    connectivity: Connectivity,
    stage: int,
    drop_path_rates: Sequence[float],
) -> nn.Module:
    """A stage whose entry nodes are all blocks whose only in-edge is from the input node. `drop_path_rates`: of its blocks."""
    blocks = range(1, topology.num_nodes - 1)
    entry = tuple(node for node in blocks if topology.senders(node) == (0,))
    parts = []
    for node, rate in zip(blocks, drop_path_rates, strict=True):
        in_width, stride = (in_channels, 2) if node in entry else (channels, 1)
        transform = build_node(in_width, channels, stride, rate)
        parts.append(BlockParts(transform, None, nn.Identity(), in_width, channels, stride))
    return build_stage(parts, replace(topology, entry=entry), connectivity, stage)


_NAMES = ("randwire_small_er", "randwire_small_ba", "randwire_small_ws", "dg_randwire_small")
default_cfgs = generate_default_cfgs({name: imagenet_cfg(first_conv="conv1.0", classifier="fc") for name in _NAMES})


def _create(name: str, pretrained: bool, **kwargs: Any) -> TimmNetwork:
    # As in Xie et al.: one weight for each edge, through a sigmoid.
    options = {"topology": name.rpartition("_")[2], "weighting": "learned", **kwargs}
    if options["weighting"] == "learned":
        options.setdefault("learned_activation", "sigmoid")
    return build_model(RandWire, name, pretrained, {"out_indices": (0, 1, 2, 3)}, **options)


@register_model
def randwire_small_er(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """RandWire-ER (P = 0.2), 584 ± 8 M multiply-adds over graphs (Table 4)."""
    return _create("randwire_small_er", pretrained, **kwargs)


@register_model
def randwire_small_ba(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """RandWire-BA (M = 5), 602 M multiply-adds (Table 4)."""
    return _create("randwire_small_ba", pretrained, **kwargs)


@register_model
def randwire_small_ws(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """RandWire-WS (K = 4, P = 0.75), 578 ± 8 M multiply-adds over graphs (Table 4)."""
    return _create("randwire_small_ws", pretrained, **kwargs)


@register_model
def dg_randwire_small(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """DG-Net on RandWire's blocks: the complete graph with routed weights, 612 M multiply-adds (Table 4)."""
    return build_model(RandWire, "dg_randwire_small", pretrained, {"out_indices": (0, 1, 2, 3)}, **kwargs)
