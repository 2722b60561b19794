"""Fold batch normalisations into the convolutions before them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dgnet.models import find_channels


def fold_batch_norms(model: nn.Module, image_size: int | tuple[int, int] = 64) -> nn.Module:
    """A copy of `model` in evaluation mode, with each batch normalisation folded into the convolution whose output it reads.

    One forward pass on the meta device, with an image of `image_size` pixels, finds these pairs.
    """
    folded = deepcopy(model).eval()
    for conv_name, norm_name in _find_pairs(model, image_size).items():
        conv: Any = folded.get_submodule(conv_name)
        norm: Any = folded.get_submodule(norm_name)
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        # timm's normalisation may hold the activation that follows.
        rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        folded.set_submodule(norm_name, rest)
    return folded


@torch.no_grad()
def _find_pairs(model: nn.Module, image_size: int | tuple[int, int]) -> dict[str, str]:
    """Name of a convolution -> name of the normalisation that reads its output."""
    traced = deepcopy(model).to("meta", torch.float32).eval()
    written: dict[int, tuple[str, Tensor]] = {}  # keeps the tensors: Python may reuse the id of a freed one
    pairs: dict[str, str] = {}
    for name, module in traced.named_modules():
        if isinstance(module, nn.Conv2d):

            def write(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                written[id(output)] = (name, output)

            module.register_forward_hook(write)
        elif isinstance(module, nn.BatchNorm2d):

            def read(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                if id(inputs[0]) in written:
                    pairs[written[id(inputs[0])][0]] = name

            module.register_forward_pre_hook(read)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    traced(torch.empty(2, find_channels(model), height, width, device="meta"))
    return pairs
