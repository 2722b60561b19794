"""Networks compiled for inference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

_OPTIONS: dict[str, dict[str, bool]] = {
    "dense": {"freezing": True},
    # A branch and what passes it by must write in one memory format.
    "sparse": {"freezing": True, "layout_optimization": False},
}


def compile_network(network: nn.Module, mode: str = "dense") -> Callable[[Tensor], Tensor]:
    """`network`, in evaluation mode, compiled with its weights as constants: (B, C, H, W) -> (B, classes).

    `mode`: the mode that the network was set to; a network without dynamic stages is "dense". Compiled, the sparse mode is a
    branch a node, taken where the node is alive for some image: meant for one image at a time, where it skips what the eager
    form skips without that form's calls from Python. Larger batches are faster in the eager sparse mode. Sparse takes images in
    the contiguous memory format.
    """
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    compiled = torch.compile(network.eval(), fullgraph=True, dynamic=False, options=dict(_OPTIONS[mode]))

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():  # the compiler takes no constants under inference_mode
            logits: Tensor = compiled(images)
            return logits

    return run
