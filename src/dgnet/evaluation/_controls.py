"""A control for instance-aware connectivity: each image runs with the edge weights of another image.

Letters: B batch, N nodes of a stage.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from dgnet.evaluation._pass import Batch
from dgnet.graph import use_connectivity


class OtherAdjacency:
    """Keeps for each image of a batch the edge weights of the previous image; `impose` makes the network use them.

    The first image of a batch gets the weights of the last image of the previous batch. In the first batch it gets those of the
    last image of the same batch.
    """

    needs_connectivity = True

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.before: list[Tensor] = []  # for each stage (1, N, N): of the last image so far
        self.shifted: list[Tensor] = []  # for each stage (B, N, N)

    def update(self, batch: Batch) -> None:
        """Keep the weights of a batch that ran with its own weights."""
        assert batch.record is not None
        adjacency = batch.record.adjacency
        last = [matrix[-1:] for matrix in adjacency]
        self.shifted = [torch.cat([first, matrix[:-1]]) for first, matrix in zip(self.before or last, adjacency, strict=True)]
        self.before = last

    def impose(self) -> AbstractContextManager[None]:
        """Inside the `with` block: the last batch runs with the weights of other images."""
        return use_connectivity(self.network, self.shifted)
