"""A stage as a graph: a loop over its nodes, which aggregate, transform, predict and distribute (§3.3, Fig. 1).

Letters: B batch, C channels, H and W height and width.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from dgnet.compat.torch import is_transformed
from dgnet.errors import UsageError, shorten
from dgnet.graph._nodes import NOTHING, Further, StageNodes
from dgnet.graph._walk import DenseWalk, Walk


class StartWalk(Protocol):
    """Starts walks: a class of walks, or an object that prepares walks through one stage."""

    def __call__(self, stage: StageNodes, x: Tensor, gates: Tensor | None = None) -> Walk:
        """Start a walk through `stage`. `x`: the raw stage input, (B, C_in, H_in, W_in). `gates`: see `Walk`."""

    def in_graph(self) -> type[Walk]:
        """The class of walks to use in a compiled or exported graph."""


class DynamicGraph(StageNodes):
    """One stage: maps (B, C_in, H_in, W_in) to (B, C, H, W). See `StageNodes` for its parts.

    Each forward pass starts a walk, which decides how the nodes run: a dense walk in training, `inference_walk` in evaluation
    (see `dgnet.inference.set_mode`).
    """

    inference_walk: StartWalk = DenseWalk

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        """The stage's output, (B, C, H, W). `gates`: which blocks run, (B, N - 2), for a stage that `takes_gates`."""
        if isinstance(x, Proxy):
            return self._trace(x, NOTHING if gates is None else Further((gates,), {}))
        return self._follow(self.start_walk(x, gates))

    def _follow(self, walk: Walk) -> Tensor:
        """The stage's output, (B, C, H, W), from a walk that starts."""
        walk.put(0, self.input(walk.x))  # distribute x_0, and predict its out-edges (Eq. 4)
        for node in walk.blocks:
            walk.put(node, walk.compute(node))  # close (Eq. 5), aggregate and transform (Eq. 3)
        return walk.finish()

    def start_walk(self, x: Tensor, gates: Tensor | None = None) -> Walk:
        """Start the walk of one forward pass. `x`: the raw stage input, (B, C_in, H_in, W_in). `gates`: see `Walk`."""
        start: StartWalk = self.inference_walk
        is_compiling = torch.compiler.is_compiling()
        # Where Python cannot read values, no node is known to be dead.
        if self.training or x.is_meta or (not is_compiling and is_transformed(x)):
            start = DenseWalk
        if is_compiling:
            start = start.in_graph()
        return start(self, x, gates)

    def _trace(self, x: Proxy, further: Further) -> Any:
        """One call of this module in a graph of `torch.fx`. Raises UsageError if the stage is traced alone."""
        tracer: Any = x.tracer
        path = tracer.path_of_module(self)
        if not path:
            raise UsageError(
                "torch.fx cannot trace a stage itself: how it runs depends on its input; trace the network that holds it,"
                " or use torch.export"
            )
        return tracer.create_proxy("call_module", path, (x, *further.values), further.named)

    def __prepare_scriptable__(self) -> Any:
        """torch.jit.script calls this. Raises UsageError: TorchScript has no type for a walk."""
        raise UsageError(
            "torch.jit.script cannot compile a dynamic stage; use torch.jit.trace(model.eval(), images), which takes any batch"
            " size, or torch.export, or: dgnet export"
        )


def find_stages(model: nn.Module) -> list[DynamicGraph]:
    """The model's dynamic stages, in order; none in a static network. Raises UsageError for what is no network."""
    if not isinstance(model, nn.Module):
        raise UsageError(f"a network is an nn.Module, got {shorten(repr(model))}")
    return [module for module in model.modules() if isinstance(module, DynamicGraph)]


def compile_options(network: nn.Module, device_type: str = "cpu") -> dict[str, Any]:
    """Options of `torch.compile` with which a network with dynamic stages trains in less memory; none for other networks.

    Several sums read each feature. By default the backward pass writes the feature, normalised again, for all of them, and
    holds many of them at once. With these options each sum normalises what it reads, which the backward pass keeps anyway.
    None for a GPU either, where they were not timed.
    """
    # A normalised feature has five operands: its input, mean, variance, γ and β. By default more than four are written.
    return {"realize_reads_threshold": 8} if device_type == "cpu" and find_stages(network) else {}


def require_stages(model: nn.Module) -> list[DynamicGraph]:
    """As `find_stages`. Raises UsageError if there are none."""
    stages = find_stages(model)
    if not stages:
        raise UsageError(f"{type(model).__name__} has no dynamic stages; models that do: dgnet models")
    return stages
