"""Networks compiled for inference."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

from dgnet.inference._native import use_native
from dgnet.inference._sparse import set_mode

_OPTIONS: dict[str, dict[str, bool]] = {
    "dense": {"freezing": True},
    # A branch and what passes it by must write in one memory format.
    "sparse": {"freezing": True, "layout_optimization": False},
}


def compile_network(network: nn.Module, mode: str = "dense") -> Callable[[Tensor], Tensor]:
    """A copy of `network` in evaluation, compiled with its weights as constants: (B, C, H, W) -> (B, classes).

    `mode`: "sparse", or "dense", as which a network without dynamic stages counts. The sparse mode on the CPU takes any batch:
    what lies between the convolutions is a compiled extension (`dgnet.inference._native`). Elsewhere it is one graph with a
    branch a block, taken where the block is alive for some image: meant for one image at a time.

    Raises UsageError where the sparse mode's extension cannot be built.
    """
    network = deepcopy(network).eval()
    if mode == "sparse" and next(network.parameters()).is_cpu:
        return without_gradients(use_native(network))
    set_mode(network, mode)
    return compile_graph(network, mode)


def compile_graph(network: nn.Module, mode: str) -> Callable[[Tensor], Tensor]:
    """`network`, whose parameters then take no gradients, as one graph; `mode`: the mode that it is in."""
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    compiled = torch.compile(network, fullgraph=True, dynamic=False, options=dict(_OPTIONS[mode]))

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():  # the compiler takes no constants under inference_mode
            logits: Tensor = compiled(images)
            return logits

    return run


def without_gradients(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """`network` called under `torch.inference_mode`."""

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = network(images)
            return logits

    return run
