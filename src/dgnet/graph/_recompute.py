"""Gradient checkpointing of a node: the backward pass computes it again instead of keeping what lies inside it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dgnet.graph._nodes import Further, StageNodes

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def compute_checkpointed(stage: StageNodes, node: int, *arguments: Any, further: Further) -> Tensor:
    """`stage.compute(node, *arguments, further=further)`; only the arguments are kept for the backward pass."""
    options: dict[str, Any] = {"use_reentrant": False}
    if not torch.compiler.is_compiling():  # the compiler does not support such contexts
        options["context_fn"] = lambda: _contexts(stage.nodes[node - 1 : node])
    feature: Tensor = checkpoint(stage.compute, node, *arguments, further=further, **options)
    return feature


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of the first computation and of the second."""
    return nullcontext(), KeepStatistics(module)


class KeepStatistics(AbstractContextManager[None]):
    """Inside the `with` block batch normalisations of `module` do not update their statistics: the first computation did.

    It is entered once for each backward pass.
    """

    def __init__(self, module: nn.Module) -> None:
        self.norms = [child for child in module.modules() if isinstance(child, _BATCH_NORMS)]
        self.before: list[tuple[float | None, Tensor | None]] = []

    def __enter__(self) -> None:
        self.before = [
            (norm.momentum, None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone())
            for norm in self.norms
        ]
        for norm in self.norms:
            norm.momentum = 0.0

    def __exit__(self, *error: object) -> None:
        for norm, (momentum, count) in zip(self.norms, self.before, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None and count is not None:
                norm.num_batches_tracked.copy_(count)
