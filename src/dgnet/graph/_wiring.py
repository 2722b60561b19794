"""What a forward pass through a stage reports to observers, and the weights that are imposed on it.

Both apply to one thread or task: forward passes of the same model in other threads are not observed and not changed.

Letters: B batch, N nodes of a stage, E in-edges of a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from dgnet.graph._context import ContextStack
from dgnet.graph._edge_weights import mean_of_edge
from dgnet.graph._topology import Topology


class Wiring:
    """How one forward pass wired a stage.

    `alpha_rows`, `weight_rows`: α and the weights after closing, (B, E) or (B, E, g) for each node from node 1 on. `ran`: for
    each node except the output node, whether it ran, (B,): bool, or 0 and 1 as floats while gates train; None: for all samples.
    """

    def __init__(
        self,
        topology: Topology,
        alpha_rows: Sequence[Tensor],
        weight_rows: Sequence[Tensor],
        ran: Sequence[Tensor | None],
    ) -> None:
        self.topology, self.alpha_rows, self.weight_rows, self._ran = topology, alpha_rows, weight_rows, ran

    @property
    def alpha(self) -> Tensor:
        """α of every edge, (B, N, N), detached; the imposed weights if a matrix was imposed. With groups their mean."""
        return to_matrix(self.topology, [mean_of_edge(row) for row in self.alpha_rows])

    @property
    def adjacency(self) -> Tensor:
        """The weights used in the aggregation, (B, N, N), detached; 0 where an edge is closed. With groups their mean."""
        return to_matrix(self.topology, [mean_of_edge(row) for row in self.weight_rows])

    @property
    def edge_weights(self) -> Tensor:
        """As `adjacency`, for each group of channels, (B, N, N, g); (B, N, N) if the weighting has none."""
        return to_matrix(self.topology, self.weight_rows)

    @property
    def ran(self) -> Tensor:
        """Whether each node ran, (B, N): bool, or 0 and 1 with gradients while gates train. Dense mode: whether it is alive."""
        given = [column for column in self._ran if column is not None]
        like = given[0] if given else self.weight_rows[0][:, 0].bool()
        ones = torch.ones_like(like)
        return torch.stack([ones if column is None else column for column in (*self._ran, None)], dim=1)  # output node: always


@torch.no_grad()
def to_matrix(topology: Topology, rows: Sequence[Tensor]) -> Tensor:
    """(B, N, N), or with groups (B, N, N, g), from one row of in-edges, (B, E) or (B, E, g), for each node from node 1 on."""
    num_nodes, groups = topology.num_nodes, max((row.shape[2:] for row in rows), key=len)
    dtype = torch.promote_types(rows[0].dtype, torch.float32)
    matrix = rows[0].new_zeros(len(rows[0]), num_nodes, num_nodes, *groups, dtype=dtype)
    for node, row in enumerate(rows, start=1):
        row = row.detach().to(matrix.dtype)
        row = row if row.ndim == matrix.ndim - 1 else row[..., None]  # pinned edges have one weight for all groups
        matrix[:, node, list(topology.senders(node))] = row
    return matrix


class Observer(Protocol):
    """Receives the wiring of each forward pass of the stages that it observes."""

    def observe(self, index: int, wiring: Wiring) -> None:
        """Called at the end of each forward pass of a stage; `index`: its place among the observed stages, from 0."""


_OBSERVED: ContextStack[tuple[list[nn.Module], Observer]] = ContextStack("observed")
_IMPOSED: ContextStack[list[tuple[nn.Module, Tensor]]] = ContextStack("imposed")


def observe(stages: Sequence[nn.Module], observer: Observer) -> AbstractContextManager[None]:
    """Report the wiring of each forward pass of `stages` inside the `with` block to `observer`."""
    return _OBSERVED.hold((list(stages), observer))


def observers_of(stage: nn.Module) -> list[tuple[int, Observer]]:
    """The observers of `stage`, each with the stage's index among the stages that it observes."""
    return [
        (index, observer)
        for stages, observer in _OBSERVED.values()
        for index, observed in enumerate(stages)
        if observed is stage
    ]


def impose(matrices: Sequence[tuple[nn.Module, Tensor]]) -> AbstractContextManager[None]:
    """Impose edge weights inside the `with` block. `matrices`: pairs of a stage and its weights, (1 or B, N, N[, g])."""
    return _IMPOSED.hold(list(matrices))


def imposed_on(stage: nn.Module) -> Tensor | None:
    """The matrix that was last imposed on `stage`, (1 or B, N, N[, g]), or None."""
    found = None
    for matrices in _IMPOSED.values():
        for changed, matrix in matrices:
            if changed is stage:
                found = matrix
    return found
