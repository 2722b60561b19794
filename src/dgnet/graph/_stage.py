"""A stage as a graph: a loop over its nodes, which aggregate, transform, predict and distribute (§3.3, Fig. 1).

Letters: B batch, C channels, H and W height and width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from dgnet.errors import UsageError
from dgnet.graph._nodes import StageNodes
from dgnet.graph._walk import DenseWalk, Walk


class StartWalk(Protocol):
    """Starts walks: a class of walks, or an object that prepares walks through one stage."""

    def __call__(self, stage: StageNodes, x: Tensor) -> Walk:
        """Start a walk through `stage`. `x`: the raw stage input, (B, C_in, H_in, W_in)."""

    def in_graph(self) -> type[Walk]:
        """The class of walks to use in a compiled or exported graph."""


class DynamicGraph(StageNodes):
    """One stage: maps (B, C_in, H_in, W_in) to (B, C, H, W). See `StageNodes` for its parts.

    Each forward pass starts a walk, which decides how the nodes run: a dense walk in training, `inference_walk` in evaluation
    (see `dgnet.inference.set_mode`).
    """

    inference_walk: StartWalk = DenseWalk

    def forward(self, x: Tensor) -> Tensor:
        walk = self.start_walk(x)
        walk.put(0, self.input(x))  # distribute x_0, and predict its out-edges (Eq. 4)
        for node in walk.blocks:
            walk.put(node, walk.compute(node))  # close (Eq. 5), aggregate and transform (Eq. 3)
        return walk.finish()

    def start_walk(self, x: Tensor) -> Walk:
        """Start the walk of one forward pass. `x`: the raw stage input, (B, C_in, H_in, W_in)."""
        start: StartWalk = self.inference_walk
        if self.training or x.is_meta:  # without values no node is known to be dead
            start = DenseWalk
        if torch.compiler.is_compiling():
            start = start.in_graph()
        return start(self, x)


def find_stages(model: nn.Module) -> list[DynamicGraph]:
    """The model's dynamic stages, in order; none in a static network."""
    return [module for module in model.modules() if isinstance(module, DynamicGraph)]


def require_stages(model: nn.Module) -> list[DynamicGraph]:
    """As `find_stages`. Raises UsageError if there are none."""
    stages = find_stages(model)
    if not stages:
        raise UsageError(f"{type(model).__name__} has no dynamic stages; models that do: dgnet models")
    return stages
