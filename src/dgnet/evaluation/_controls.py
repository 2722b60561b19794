"""What connectivity that follows the image is worth: each image with the weights of another one."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from dgnet.evaluation._pass import Batch
from dgnet.graph import use_connectivity


class OtherAdjacency:
    """Holds for each image of a batch the weights of the image before it; `impose` gives them to the network.

    The image before a batch is the last of the batch before; before the first batch it is the last of that batch.
    """

    needs_connectivity = True

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.before: list[Tensor] = []  # for each stage (1, N, N), of the image before the next batch
        self.shifted: list[Tensor] = []  # for each stage (B, N, N)

    def update(self, batch: Batch) -> None:
        """Take in a batch that ran with its own weights."""
        assert batch.record is not None
        adjacency = batch.record.adjacency
        last = [matrix[-1:] for matrix in adjacency]
        self.shifted = [torch.cat([first, matrix[:-1]]) for first, matrix in zip(self.before or last, adjacency, strict=True)]
        self.before = last

    def impose(self) -> AbstractContextManager[None]:
        """The batch that was taken in last runs with the weights of other images inside the `with` block."""
        return use_connectivity(self.network, self.shifted)
