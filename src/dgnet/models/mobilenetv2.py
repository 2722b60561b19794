"""DG-MobileNetV2: timm's MobileNetV2 with a graph for each of its seven stages. Each stage is given a projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.efficientnet import EfficientNet, mobilenetv2_100
from torch import Tensor, nn

from dgnet.models._connectivity import Connectivity
from dgnet.models._dynamic import BlockParts, DynamicFamily, take_modules
from dgnet.models._factory import build_model, imagenet_cfg
from dgnet.models._protocol import TimmNetwork


def split_block(block: Any) -> BlockParts:
    """Inverted bottleneck: no activation after the addition, and no shortcut if the block changes the shape."""
    is_separable = not hasattr(block, "conv_pwl")  # the block of stage 1, which has no expansion
    if is_separable:
        path: tuple[str, ...] = ("conv_dw", "bn1", "aa", "se", "conv_pw", "bn2")
        first, last = block.conv_dw, block.conv_pw
    else:
        path = ("conv_pw", "bn1", "conv_dw", "bn2", "aa", "se", "conv_pwl", "bn3")
        first, last = block.conv_pw, block.conv_pwl
    return BlockParts(
        take_modules(block, (*path, "drop_path") if block.has_skip else path),
        nn.Identity() if block.has_skip else None,
        nn.Identity(),
        first.in_channels,
        last.out_channels,
        block.conv_dw.stride[0],
    )


class DynamicMobileNetV2(DynamicFamily, EfficientNet):
    """MobileNetV2 whose stages are graphs. Takes the arguments of timm's `mobilenetv2_100` and those of `Connectivity`."""

    stage_names = tuple(f"blocks.{index}" for index in range(7))

    def __init__(self, **kwargs: Any) -> None:
        connectivity = Connectivity.take_from(kwargs)
        nn.Module.__init__(self)
        # timm's description of the stages is private: take modules and attributes from a network that timm has built.
        vars(self).update(vars(mobilenetv2_100(**kwargs)))
        self.build_stages(split_block, connectivity)

    def translate_static(self, state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """torchvision numbers stem, blocks and head as features.0, features.1, …."""
        if "features.0.0.weight" not in state_dict:
            return state_dict
        depths = {name: stage.topology.num_nodes - 2 for name, stage in zip(self.stage_names, self.stages, strict=True)}
        blocks = [f"{name}.nodes.{node}" for name, depth in depths.items() for node in range(depth)]
        head = f"features.{len(blocks) + 1}"
        modules = {"features.0.0": "conv_stem", "features.0.1": "bn1", f"{head}.0": "conv_head", f"{head}.1": "bn2"}
        modules["classifier.1"] = "classifier"
        separable = {"0.0": "conv_dw", "0.1": "bn1", "1": "conv_pw", "2": "bn2"}
        inverted = {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2", "2": "conv_pwl", "3": "bn3"}
        for index, block in enumerate(blocks, start=1):
            for theirs, ours in (separable if index == 1 else inverted).items():
                modules[f"features.{index}.conv.{theirs}"] = f"{block}.{ours}"
        translated = {}
        for name, tensor in state_dict.items():
            module, _, parameter = name.rpartition(".")
            translated[f"{modules.get(module, module)}.{parameter}"] = tensor
        return translated


default_cfgs = generate_default_cfgs({"dg_mobilenetv2_100": imagenet_cfg(first_conv="conv_stem", classifier="classifier")})


@register_model
def dg_mobilenetv2_100(pretrained: bool = False, **kwargs: Any) -> TimmNetwork:
    """DG-MobileNetV2 1.0, 3.59 M parameters, 313 M multiply-adds (Table 1)."""
    return build_model(
        DynamicMobileNetV2,
        "dg_mobilenetv2_100",
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3, 4), "flatten_sequential": True},
        **kwargs,
    )
