"""Compile networks for inference."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dgnet.compat.torch import allow_many_graphs, freeze_weights
from dgnet.errors import UsageError, check_choice
from dgnet.graph import find_aggregation, find_stages
from dgnet.inference._native import lower_static_blocks, use_native
from dgnet.inference._partial_sums import use_partial_sums
from dgnet.inference._sparse import MODES, can_skip, set_mode
from dgnet.inference._timing import time_alternating

_SPARSE_OPTIONS: dict[str, Any] = {"layout_optimization": False}
"""Of the compiler: both branches of a node must write in the same memory format."""


def compile_network(network: nn.Module, mode: str = "dense", images: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """A copy of `network` in evaluation mode, compiled with its weights as constants: (B, C, H, W) -> (B, classes).

    `mode`: "dense", "sparse" or "auto"; only "dense" and "auto" for a network without dynamic stages. On the CPU the sparse
    mode takes any batch size: the operations between the convolutions run in a compiled extension (`dgnet.inference._native`).
    On other devices it is one graph with a branch for each block, which runs if the block is alive for some image: meant for
    one image at a time.

    "auto" times both modes on `images`, (B, C, H, W), as they will be used: real ones, in batches of the size to come. It takes
    the faster one, and says so in a line on stderr. On a GPU the dense mode then runs under CUDA graphs, and the sparse mode
    is compiled for single images only.

    Raises UsageError if the extension cannot be built, or `mode` is not possible.
    """
    check_choice("mode", mode, (*MODES, "auto"))
    if mode == "auto":
        return _find_fastest(network, images)
    if images is not None:
        raise UsageError(f"images are for mode 'auto', which times the network on them; leave them out for mode {mode!r}")
    network = deepcopy(network).eval()
    is_on_cpu = any(parameter.is_cpu for parameter in network.parameters())
    if mode == "sparse" and is_on_cpu:
        return without_gradients(lower_static_blocks(use_native(network)))
    set_mode(network, mode)
    if mode == "dense" and is_on_cpu and use_partial_sums(network):
        find_aggregation("cpu")  # loads its kernels
    return compile_graph(network, mode)


def compile_for(network: nn.Module, mode: str, batch_size: int) -> Callable[[Tensor], Tensor]:
    """`network` as `compile_network` deploys a mode for batches of one size: in the form of it that is known to be fastest."""
    device = next(network.parameters()).device.type
    if mode == "sparse" and device != "cpu" and batch_size > 1:  # faster than a branch for each block
        return without_gradients(set_mode(deepcopy(network).eval(), "sparse"))
    compiled = compile_network(network, mode)
    return CudaGraphs(compiled) if device == "cuda" and mode == "dense" else compiled


def _find_fastest(network: nn.Module, images: Tensor | None) -> Callable[[Tensor], Tensor]:
    if images is None or images.ndim != 4 or len(images) == 0:
        raise UsageError("mode 'auto' times the network: give a batch of images, (B, C, H, W), as compile_network(…, images=…)")
    dense = compile_for(network, "dense", len(images))
    if not find_stages(network) or not can_skip(network):
        print("mode dense: the network has no block that can be skipped", file=sys.stderr)
        return dense
    forms = {"dense": dense, "sparse": compile_for(network, "sparse", len(images))}
    seconds = time_alternating({name: partial(form, images) for name, form in forms.items()}, device=images.device)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    fastest = min(medians, key=lambda name: medians[name])
    ratio = medians["dense"] / medians["sparse"]
    print(
        f"mode {fastest}: on batches of {len(images)} the sparse mode is {ratio:.2f} times as fast as the dense one",
        file=sys.stderr,
    )
    return forms[fastest]


def compile_graph(network: nn.Module, mode: str) -> Callable[[Tensor], Tensor]:
    """`network` as one compiled graph; its parameters no longer require gradients. `mode`: the mode that it is set to."""
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    compiled = torch.compile(network, fullgraph=True, dynamic=False, options=_SPARSE_OPTIONS if mode == "sparse" else {})
    seen: set[Any] = set()  # for which a graph is compiled

    def run(images: Tensor) -> Tensor:
        is_mixed = torch.is_autocast_enabled(images.device.type)
        key = (images.shape, images.stride(), images.dtype, images.device, is_mixed, torch.get_num_threads())
        is_new = key not in seen
        with ExitStack() as contexts:
            # In inference mode the compiler would not treat weights as constants, and compile again for calls outside of it.
            contexts.enter_context(torch.inference_mode(False))
            contexts.enter_context(torch.no_grad())
            images = images.clone() if images.is_inference() else images
            if is_new:
                contexts.enter_context(allow_many_graphs())
                contexts.enter_context(freeze_weights())
            logits: Tensor = compiled(images)
        seen.add(key)
        return logits

    return run


class CudaGraphs:
    """Calls `run`, (B, C, H, W) -> (B, classes), by replaying a CUDA graph, one for each shape of images.

    The host then launches one graph instead of each kernel. `run` must not wait for the GPU: a dense network.
    """

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        self.run = run
        self.graphs: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        kind = images.device.type
        mixed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = (images.shape, images.dtype, images.device, mixed)
        # A graph is captured and replayed on the current device. Its buffers are used in and outside of inference mode.
        with torch.cuda.device(images.device), torch.inference_mode(False):
            if key not in self.graphs:
                self.graphs[key] = self._capture(images)
            graph, inputs, outputs = self.graphs[key]
            inputs.copy_(images)
            graph.replay()
            return outputs.clone()  # the next replay overwrites them

    def _capture(self, images: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        inputs = torch.empty_like(images).copy_(images)
        stream = torch.cuda.Stream(images.device)
        stream.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(stream):  # as torch asks before a capture: compiles, and chooses kernels
            for _ in range(3):
                self.run(inputs)
        torch.cuda.current_stream(images.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outputs = self.run(inputs)
        return graph, inputs, outputs


def without_gradients(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function that calls `network` under `torch.inference_mode`."""

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = network(images)
            return logits

    return run
