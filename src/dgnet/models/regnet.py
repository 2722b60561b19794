"""DG-RegNet: timm's RegNetX and RegNetY with a graph for each stage. DG-Net-A and -B of Table 5."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.regnet import RegNet, model_cfgs
from torch import Tensor

from dgnet.models._connectivity import Connectivity
from dgnet.models._dynamic import BlockParts, DynamicFamily, take_modules
from dgnet.models._factory import build_model, imagenet_cfg
from dgnet.models._protocol import TimmNetwork

# torchvision's names of the modules of stem, block and head -> timm's.
_TORCHVISION = {
    "stem.0": "stem.conv",
    "stem.1": "stem.bn",
    "proj.0": "downsample.conv",
    "proj.1": "downsample.bn",
    "f.a.0": "conv1.conv",
    "f.a.1": "conv1.bn",
    "f.b.0": "conv2.conv",
    "f.b.1": "conv2.bn",
    "f.se.fc1": "se.fc1",
    "f.se.fc2": "se.fc2",
    "f.c.0": "conv3.conv",
    "f.c.1": "conv3.bn",
    "fc": "head.fc",
}


def split_block(block: Any) -> BlockParts:
    """RegNet's bottleneck: ReLU after the addition; a projection if the shape changes."""
    return BlockParts(
        take_modules(block, ("conv1", "conv2", "se", "conv3", "drop_path")),
        block.downsample,
        block.act3,
        block.conv1.conv.in_channels,
        block.conv3.conv.out_channels,
        block.conv2.conv.stride[0],
        "downsample",
    )


class DynamicRegNet(DynamicFamily, RegNet):
    """RegNet whose stages are graphs. Takes the arguments of timm's RegNet and those of `Connectivity`."""

    stage_names = ("s1", "s2", "s3", "s4")

    def __init__(self, cfg: Any, **kwargs: Any) -> None:
        connectivity = Connectivity.take_from(kwargs)
        super().__init__(cfg, **kwargs)
        self.build_stages(split_block, connectivity)

    def translate_static(self, state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """torchvision numbers stages and blocks as trunk_output.block1.block1-0, and uses other names for their modules."""
        if "stem.0.weight" not in state_dict:
            return state_dict
        translated = {}
        for name, tensor in state_dict.items():
            module, _, parameter = name.rpartition(".")
            block = re.fullmatch(r"trunk_output\.block(\d+)\.block\d+-(\d+)\.(.+)", module)
            stage, module = (f"s{block[1]}.b{int(block[2]) + 1}.", block[3]) if block else ("", module)
            translated[f"{stage}{_TORCHVISION.get(module, module)}.{parameter}"] = tensor
        return translated


_NAMES = ("regnetx_006", "regnetx_016", "regnety_006")
default_cfgs = generate_default_cfgs(
    {f"dg_{name}": imagenet_cfg(first_conv="stem.conv", classifier="head.fc") for name in _NAMES}
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> TimmNetwork:
    return build_model(DynamicRegNet, f"dg_{name}", pretrained, cfg=model_cfgs[name], **kwargs)


@register_model
def dg_regnetx_006(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """DG-RegNetX-600M, 6.22 M parameters, 600 M multiply-adds (Table 1); DG-Net-A of Table 5."""
    return _create("regnetx_006", pretrained, **kwargs)


@register_model
def dg_regnetx_016(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """DG-RegNetX-1600M, 9.23 M parameters, 1602 M multiply-adds (Table 1)."""
    return _create("regnetx_016", pretrained, **kwargs)


@register_model
def dg_regnety_006(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """DG-RegNetY-600M with squeeze-and-excitation, 6.08 M parameters, 601 M multiply-adds; DG-Net-B of Table 5."""
    return _create("regnety_006", pretrained, **kwargs)
