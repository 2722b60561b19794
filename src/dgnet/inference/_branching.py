"""The sparse mode as one compiled or exported graph, in which Python cannot read values.

Letters: B batch, n samples for which a node runs, E in-edges of a node.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dgnet.graph import DenseWalk


class BranchingWalk(DenseWalk):
    """A node is a branch that runs if the node is alive for some sample. A feature holds all samples.

    Compiled: the branch runs on the whole batch, so that a node is skipped only if no image of the batch needs it. Exported:
    instead of a branch, the node runs on the gathered samples for which it is alive; there may be none. But a node with batch
    normalisations, which `export_network` folds, runs on all samples: torch cannot export them for a number of samples that
    may be 0. A feature's values are not read for samples for which its node is dead.
    """

    skips_nodes = True

    def run(self, node: int, weights: Tensor, is_open: Tensor | None, runs: Tensor | None) -> Any:
        is_exporting = torch.compiler.is_exporting()
        if runs is None or node == self.topology.output or (is_exporting and has_batch_norms(self.stage.nodes[node - 1])):
            return super().run(node, weights, is_open, runs)
        opened = weights.new_ones(weights.shape[:2], dtype=torch.bool) if is_open is None else is_open
        if is_exporting:
            return self._gather(node, weights, opened, runs)
        return self._branch(node, weights, opened, runs)

    def _gather(self, node: int, weights: Tensor, opened: Tensor, runs: Tensor) -> Tensor:
        rows = runs.nonzero().squeeze(1)
        sources = [source.index_select(0, rows) for source in self.sources(node)]
        feature = self.stage.compute(node, weights[rows], opened[rows], *sources, further=self.further)
        return feature.new_zeros(self.x.shape[0], *feature.shape[1:]).index_copy(0, rows, feature)

    def _branch(self, node: int, weights: Tensor, opened: Tensor, runs: Tensor) -> Tensor:
        stage, sources, further = self.stage, self.sources(node), self.further
        # Output shape: that of the senders. An entry node's senders include the raw stage input.
        like = stage.find_empty_feature(self.x, further) if node in self.topology.entry else sources[0]
        shape, dtype = (self.x.shape[0], *like.shape[1:]), like.dtype

        # Both branches write one memory format. For maps it is channels last, in which convolutions are fastest.
        format = torch.channels_last if stage.layout == "NCHW" else torch.contiguous_format

        def compute(weights: Tensor, opened: Tensor, *sources: Tensor) -> Tensor:
            return stage.compute(node, weights, opened, *sources, further=further).to(dtype).clone(memory_format=format)

        def skip(weights: Tensor, opened: Tensor, *sources: Tensor) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=weights.device).clone(memory_format=format)

        feature: Tensor = torch.cond(runs.any(), compute, skip, (weights, opened, *sources))
        return feature


def has_batch_norms(module: nn.Module) -> bool:
    """Whether a part of `module` is a batch normalisation of maps."""
    return any(isinstance(part, nn.BatchNorm2d | nn.SyncBatchNorm) for part in module.modules())
