"""Read adjacency matrices out of a running model, or impose them on it (§3.4).

Letters: B batch, N nodes of a stage, E in-edges of a node.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from dgnet.errors import UsageError
from dgnet.graph._stage import DynamicGraph
from dgnet.graph._topology import Topology


def find_stages(model: nn.Module) -> list[DynamicGraph]:
    """The model's dynamic stages, in order; none in a static network."""
    return [module for module in model.modules() if isinstance(module, DynamicGraph)]


def require_stages(model: nn.Module) -> list[DynamicGraph]:
    """As `find_stages`. Raises UsageError where there are none."""
    stages = find_stages(model)
    if not stages:
        raise UsageError(f"{type(model).__name__} has no dynamic stages; models that do: dgnet models")
    return stages


class Observer(Protocol):
    """What a stage calls at the end of a forward."""

    def append(
        self,
        stage: DynamicGraph,
        alpha_rows: Sequence[Tensor],
        weight_rows: Sequence[Tensor],
        alive: Sequence[Tensor | None],
    ) -> None:
        """`alpha_rows`, `weight_rows`: (B, E) for each node from node 1 on; `alive`: whether each node but the output node ran,
        (B,), bool, or 0 and 1 where gates train; None for all samples.
        """


class Record:
    """Adjacency matrices of the forwards run under `record_connectivity`, detached, appended along B.

    Row j of a matrix holds node j's in-edges (§3.4, Fig. 2).
    """

    def __init__(self, stages: Sequence[DynamicGraph]) -> None:
        self._stages = list(stages)
        self.clear()

    def clear(self) -> None:
        """Forget what was recorded."""
        self._alpha: list[list[Tensor]] = [[] for _ in self._stages]
        self._adjacency: list[list[Tensor]] = [[] for _ in self._stages]
        self._ran: list[list[Tensor]] = [[] for _ in self._stages]

    @property
    def adjacency(self) -> list[Tensor]:
        """For each stage the weights as aggregated, (B, N, N); 0 where an edge is closed."""
        return [self._join(chunks) for chunks in self._adjacency]

    @property
    def alpha(self) -> list[Tensor]:
        """For each stage the weights before gating, (B, N, N); imposed weights where a matrix was imposed."""
        return [self._join(chunks) for chunks in self._alpha]

    @property
    def ran(self) -> list[Tensor]:
        """For each stage the nodes that ran, (B, N) bool: in dense mode those that are alive."""
        return [self._join(chunks) for chunks in self._ran]

    @property
    def topology(self) -> list[Topology]:
        """For each stage which edges exist."""
        return [stage.topology for stage in self._stages]

    @property
    def threshold(self) -> list[Tensor | None]:
        """For each stage τ of each receiving node, (N,); None where the weighting has none."""
        return [None if s.weighting.threshold is None else s.weighting.threshold.detach() for s in self._stages]

    def append(
        self,
        stage: DynamicGraph,
        alpha_rows: Sequence[Tensor],
        weight_rows: Sequence[Tensor],
        alive: Sequence[Tensor | None],
    ) -> None:
        """See `Observer`."""
        # A checkpointed forward, run again by the backward pass, is not recorded again; the compiler cannot ask.
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return
        index = self._stages.index(stage)
        self._alpha[index].append(to_matrix(stage, alpha_rows))
        self._adjacency[index].append(to_matrix(stage, weight_rows))
        ones = torch.ones_like(weight_rows[0][:, 0], dtype=torch.bool)
        ran = [ones if column is None else column.detach() > 0 for column in (*alive, None)]  # the output node always runs
        self._ran[index].append(torch.stack(ran, dim=1))

    @staticmethod
    def _join(chunks: list[Tensor]) -> Tensor:
        if not chunks:
            raise UsageError("nothing was recorded: run the model inside `with dgnet.record_connectivity(model) as record:`")
        return torch.cat(chunks)


@torch.no_grad()
def to_matrix(stage: DynamicGraph, rows: Sequence[Tensor]) -> Tensor:
    """(B, N, N) from one (B, E) row of in-edges for each node from node 1 on."""
    num_nodes = stage.topology.num_nodes
    matrix = rows[0].new_zeros(len(rows[0]), num_nodes, num_nodes, dtype=torch.promote_types(rows[0].dtype, torch.float32))
    for node, row in enumerate(rows, start=1):
        matrix[:, node, list(stage.topology.senders(node))] = row.detach().to(matrix.dtype)
    return matrix


@contextmanager
def record_connectivity(model: nn.Module) -> Iterator[Record]:
    """Record the connectivity of every forward of `model` inside the `with` block.

    Raises UsageError where the model has no dynamic stages.
    """
    stages = require_stages(model)
    record = Record(stages)
    for stage in stages:
        stage._records = [*stage._records, record]
    try:
        yield record
    finally:
        for stage in stages:
            stage._records = [other for other in stage._records if other is not record]


@contextmanager
def use_connectivity(model: nn.Module, adjacency: Sequence[Tensor | None]) -> Iterator[None]:
    """Impose edge weights on `model` inside the `with` block; routers do not run, an edge that weighs 0 is closed.

    `adjacency`: for each stage (N, N) for all samples, (B, N, N) for each its own, or None to leave the stage as it is.
    `record.adjacency` of a forward gives that forward again.

    Raises UsageError where a matrix is missing, has the wrong size, or weighs an edge that the topology lacks.
    """
    stages = require_stages(model)
    if len(adjacency) != len(stages):
        raise UsageError(f"the model has {len(stages)} dynamic stages, got {len(adjacency)} adjacency matrices")
    imposed = [
        None if matrix is None else check_matrix(f"stage {index}", stage, matrix)
        for index, (stage, matrix) in enumerate(zip(stages, adjacency, strict=True), start=1)
    ]
    before = [stage._imposed for stage in stages]
    for stage, matrix in zip(stages, imposed, strict=True):
        stage._imposed = stage._imposed if matrix is None else matrix
    try:
        yield
    finally:
        for stage, matrix in zip(stages, before, strict=True):
            stage._imposed = matrix


def check_matrix(name: str, stage: DynamicGraph, matrix: Tensor) -> Tensor:
    """`matrix` as (B or 1, N, N); raises UsageError where it does not fit the stage."""
    num_nodes = stage.topology.num_nodes
    if matrix.ndim not in (2, 3) or matrix.shape[-2:] != (num_nodes, num_nodes):
        allowed = f"({num_nodes}, {num_nodes}) or (B, {num_nodes}, {num_nodes})"
        raise UsageError(f"{name}: an adjacency is {allowed}, got {tuple(matrix.shape)}")
    matrix = matrix if matrix.ndim == 3 else matrix[None]
    if matrix[:, ~stage.topology.mask.to(matrix.device)].any():
        raise UsageError(f"{name}: the adjacency weighs an edge that the topology lacks; row j holds node j's in-edges")
    return matrix
