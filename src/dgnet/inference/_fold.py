"""Fold batch normalisations into the convolutions before them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dgnet.compat.torch import has_any_hooks
from dgnet.models import Call, find_channels, find_image_size, group_by_name, is_inside, trace_calls


@torch.no_grad()
def fold_batch_norms(model: nn.Module, image_size: int | tuple[int, int] = 64) -> nn.Module:
    """A copy of `model` in evaluation mode, with batch normalisations folded into the convolutions whose output they read.

    One forward pass on the meta device, with an image of `image_size` pixels, finds these pairs. A normalisation stays as it is
    where folding could change the function: if something else reads or changes the convolution's output, if one of the two is
    called more than once, is of an unknown class, or has hooks or parametrizations.

    Raises UsageError for a size that the network cannot take.
    """
    (calls,) = trace_calls(model, find_channels(model), find_image_size(model, image_size), "folded", trains=False)
    folded = deepcopy(model).eval()
    for conv_name, norm_name in _find_pairs(calls, dict(model.named_modules())).items():
        conv: Any = folded.get_submodule(conv_name)
        norm: Any = folded.get_submodule(norm_name)
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        # timm's normalisation may hold the activation that follows.
        rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        folded.set_submodule(norm_name, rest.eval())
    return folded


def _find_pairs(calls: Sequence[Call], modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Name of a convolution -> name of the normalisation that alone reads its output."""
    once = {name: each[0] for name, each in group_by_name(calls).items() if len(each) == 1}
    written = {id(call.output): call for name, call in once.items() if _is_plain_convolution(modules[name])}
    pairs = {}
    for name, call in once.items():
        conv = written.get(id(call.input))
        if conv is not None and _is_plain_norm(modules[name]):
            is_only_reader = all(is_inside(reader, name) for reader in conv.readers)
            if is_only_reader and call.versions == [conv.output_version]:
                pairs[conv.name] = name
    return pairs


def _is_plain_convolution(module: nn.Module) -> bool:
    """Whether a module convolves with its own weights, and does nothing else."""
    return type(module) in (nn.Conv2d, Conv2dSame) and _is_plain(module)


def _is_plain_norm(module: nn.Module) -> bool:
    """Whether a module normalises with its running statistics, in evaluation."""
    known = type(module) in (nn.BatchNorm2d, BatchNormAct2d)
    return known and _is_plain(module) and isinstance(module.running_mean, torch.Tensor)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is as its class says. A parametrized one is of another class; older ways replace the parameter."""
    return (
        "weight" in dict(module.named_parameters(recurse=False)) and "forward" not in vars(module) and not has_any_hooks(module)
    )
