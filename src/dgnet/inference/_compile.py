"""Compile networks for inference."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy

import torch
from torch import Tensor, nn

from dgnet.compat.torch import allow_many_graphs
from dgnet.inference._native import lower_static_blocks, use_native
from dgnet.inference._sparse import set_mode

_OPTIONS: dict[str, dict[str, bool]] = {
    "dense": {"freezing": True},
    # Both branches of a node must write in the same memory format.
    "sparse": {"freezing": True, "layout_optimization": False},
}


def compile_network(network: nn.Module, mode: str = "dense") -> Callable[[Tensor], Tensor]:
    """A copy of `network` in evaluation mode, compiled with its weights as constants: (B, C, H, W) -> (B, classes).

    `mode`: "dense" or "sparse"; only "dense" for a network without dynamic stages. On the CPU the sparse mode takes any batch
    size: the operations between the convolutions run in a compiled extension (`dgnet.inference._native`). On other devices it
    is one graph with a branch for each block, which runs if the block is alive for some image: meant for one image at a time.

    Raises UsageError if the extension cannot be built, or `mode` is not possible.
    """
    network = deepcopy(network).eval()
    if mode == "sparse" and next(network.parameters()).is_cpu:
        return without_gradients(lower_static_blocks(use_native(network)))
    set_mode(network, mode)
    return compile_graph(network, mode)


def compile_graph(network: nn.Module, mode: str) -> Callable[[Tensor], Tensor]:
    """`network` as one compiled graph; its parameters no longer require gradients. `mode`: the mode that it is set to."""
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    compiled = torch.compile(network, fullgraph=True, dynamic=False, options=dict(_OPTIONS[mode]))
    sizes: set[torch.Size] = set()

    def run(images: Tensor) -> Tensor:
        is_new = images.shape not in sizes
        sizes.add(images.shape)
        # under inference_mode the compiler would not treat weights as constants
        with torch.no_grad(), allow_many_graphs() if is_new else nullcontext():
            logits: Tensor = compiled(images)
            return logits

    return run


class CudaGraphs:
    """Calls `run`, (B, C, H, W) -> (B, classes), by replaying a CUDA graph, one for each shape of images.

    The host then launches one graph instead of each kernel. `run` must not wait for the GPU: a dense network.
    """

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        self.run = run
        self.graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def __call__(self, images: Tensor) -> Tensor:
        if images.shape not in self.graphs:
            self.graphs[images.shape] = self._capture(images)
        graph, inputs, outputs = self.graphs[images.shape]
        inputs.copy_(images)
        graph.replay()
        return outputs.clone()  # the next replay overwrites them

    def _capture(self, images: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        inputs = images.clone()
        stream = torch.cuda.Stream(images.device)
        stream.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(stream):  # as torch asks before a capture: compiles, and chooses kernels
            for _ in range(3):
                self.run(inputs)
        torch.cuda.current_stream(images.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.run(inputs)
        return graph, inputs, outputs


def without_gradients(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function that calls `network` under `torch.inference_mode`."""

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = network(images)
            return logits

    return run
