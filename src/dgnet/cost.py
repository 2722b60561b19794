"""Parameters and multiply-adds of a network, in total and where they come from (Table 1)."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dgnet.errors import UsageError, reason
from dgnet.graph import DynamicGraph, Weighting


@dataclass(frozen=True)
class Cost:
    """Cost of one image with every edge open."""

    params: int  # all parameters, routers and thresholds included
    multiply_adds: int  # of convolutions outside routers: what Table 1 counts
    router_multiply_adds: int  # of the routers' fully-connected layers
    aggregation_multiply_adds: int  # one for each element of each edge's feature
    activations: int  # elements that convolutions write


def cost(model: nn.Module, image_size: int | tuple[int, int] = 224) -> Cost:
    """Count the cost of `model` on one image of `image_size` pixels (a side, or height and width), on the meta device.

    Raises UsageError for a size that the model cannot take.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1:
        raise UsageError(f"image size must be at least 1 pixel, got {height}×{width}")
    counted = deepcopy(model).to("meta").eval()
    counts = {"multiply_adds": 0, "router_multiply_adds": 0, "aggregation_multiply_adds": 0, "activations": 0}
    in_weightings = {id(child) for module in counted.modules() if isinstance(module, Weighting) for child in module.modules()}

    def count_convolution(module: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        multiply_adds = output[0].numel() * module.weight[0].numel()
        if id(module) in in_weightings:
            counts["router_multiply_adds"] += multiply_adds
        else:
            counts["multiply_adds"] += multiply_adds
            counts["activations"] += output[0].numel()

    def count_linear(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if id(module) in in_weightings:
            counts["router_multiply_adds"] += output[0].numel() * module.in_features

    def count_aggregation(module: DynamicGraph, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        entry_edges = len(module.topology.entry)
        counts["aggregation_multiply_adds"] += entry_edges * inputs[0][0].numel()
        counts["aggregation_multiply_adds"] += (module.topology.num_edges - entry_edges) * output[0].numel()

    hooks: dict[type[nn.Module], Callable[..., Any]] = {
        nn.Conv2d: count_convolution,
        nn.Linear: count_linear,
        DynamicGraph: count_aggregation,
    }
    for module in counted.modules():
        for kind, hook in hooks.items():
            if isinstance(module, kind):
                module.register_forward_hook(hook)
    in_chans = getattr(model, "in_chans", 3)
    try:
        with torch.no_grad():
            counted(torch.empty(1, in_chans, height, width, device="meta"))
    except Exception as error:  # whatever a layer makes of a size that it cannot take
        raise UsageError(f"{type(model).__name__} cannot take an image of {height}×{width}: {reason(error)}") from error
    return Cost(params=sum(parameter.numel() for parameter in model.parameters()), **counts)
