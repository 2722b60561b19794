"""Read adjacency matrices out of a running model, or impose them on it (§3.4).

Letters: B batch, N nodes of a stage, E in-edges of a node.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dgnet.compat.torch import is_in_backward
from dgnet.errors import UsageError
from dgnet.graph._stage import DynamicGraph, require_stages
from dgnet.graph._topology import Topology
from dgnet.graph._wiring import Wiring, impose, observe


class Record:
    """Adjacency matrices of the forward passes under `record_connectivity`, detached, concatenated along B.

    Row j of a matrix holds node j's in-edges (§3.4, Fig. 2).
    """

    def __init__(self, stages: Sequence[DynamicGraph]) -> None:
        self._stages = list(stages)
        self.clear()

    def clear(self) -> None:
        """Delete what was recorded."""
        self._alpha: list[list[Tensor]] = [[] for _ in self._stages]
        self._adjacency: list[list[Tensor]] = [[] for _ in self._stages]
        self._ran: list[list[Tensor]] = [[] for _ in self._stages]
        self._edge_weights: list[list[Tensor]] = [[] for _ in self._stages]

    @property
    def adjacency(self) -> list[Tensor]:
        """For each stage the weights used in the aggregation, (B, N, N); 0 where an edge is closed.

        With weights for each group of channels this is their mean; `edge_weights` has all.
        """
        return [self._join(chunks) for chunks in self._adjacency]

    @property
    def edge_weights(self) -> list[Tensor]:
        """As `adjacency`, for each group of channels, (B, N, N, g); (B, N, N) for a stage whose weighting has none."""
        return [self._join(chunks) for chunks in self._edge_weights]

    @property
    def alpha(self) -> list[Tensor]:
        """For each stage α, before closing, (B, N, N); the imposed weights if a matrix was imposed."""
        return [self._join(chunks) for chunks in self._alpha]

    @property
    def ran(self) -> list[Tensor]:
        """For each stage the nodes that ran, (B, N) bool; in dense mode the nodes that are alive."""
        return [self._join(chunks) for chunks in self._ran]

    @property
    def topology(self) -> list[Topology]:
        """The topology of each stage."""
        return [stage.topology for stage in self._stages]

    @property
    def threshold(self) -> list[Tensor | None]:
        """For each stage τ of each receiving node, (N,); None if the weighting has none."""
        return [None if s.weighting.threshold is None else s.weighting.threshold.detach() for s in self._stages]

    def observe(self, index: int, wiring: Wiring) -> None:
        """Append what a stage reports; see `Observer`."""
        # With gradient checkpointing a backward pass may repeat a forward pass: it is recorded once. The compiler cannot trace
        # this test.
        if not torch.compiler.is_compiling() and is_in_backward():
            return
        self._alpha[index].append(wiring.alpha)
        self._adjacency[index].append(wiring.adjacency)
        self._edge_weights[index].append(
            wiring.edge_weights if self._stages[index].weighting.edge_weights > 1 else wiring.adjacency
        )
        self._ran[index].append(wiring.ran.detach() > 0)

    @staticmethod
    def _join(chunks: list[Tensor]) -> Tensor:
        if not chunks:
            raise UsageError("nothing was recorded: run the model inside `with dgnet.record_connectivity(model) as record:`")
        return torch.cat(chunks)


@contextmanager
def record_connectivity(model: nn.Module) -> Iterator[Record]:
    """Record the connectivity of every forward pass of `model` inside the `with` block, in this thread or task.

    Raises UsageError if the model has no dynamic stages, or runs as copies in other threads.
    """
    stages = _stages_of(model)
    record = Record(stages)
    with observe(stages, record):
        yield record


@contextmanager
def use_connectivity(model: nn.Module, adjacency: Sequence[Tensor | None]) -> Iterator[None]:
    """Impose edge weights on `model` inside the `with` block, in this thread or task.

    Routers do not run, and an edge that weighs 0 is closed. Copies of the model are not affected.

    `adjacency`: for each stage (N, N) for all samples, (B, N, N) with one for each sample, (B, N, N, g) with weights for each
    group of channels, or None to leave the stage as it is. Imposing the `record.adjacency` of a forward pass (with groups its
    `record.edge_weights`) gives the same output again.

    Raises UsageError if a matrix is missing, has the wrong size, or weighs an edge that the topology lacks, and if the model
    runs as copies in other threads.
    """
    stages = _stages_of(model)
    if not isinstance(adjacency, Sequence | Tensor):
        raise UsageError(f"adjacency is a list with one matrix for each dynamic stage, got {type(adjacency).__name__}")
    if len(adjacency) != len(stages):
        raise UsageError(f"the model has {len(stages)} dynamic stages, got {len(adjacency)} adjacency matrices")
    matrices = [
        (stage, check_matrix(f"stage {index}", stage, matrix))
        for index, (stage, matrix) in enumerate(zip(stages, adjacency, strict=True), start=1)
        if matrix is not None
    ]
    with impose(matrices):
        yield


def _stages_of(model: nn.Module) -> list[DynamicGraph]:
    """As `require_stages`. Raises UsageError also for a model that runs as copies in other threads."""
    if any(isinstance(part, nn.DataParallel) and len(part.device_ids) > 1 for part in model.modules()):
        raise UsageError(
            "nn.DataParallel runs copies of the model in other threads, which are neither recorded nor changed; use its .module"
        )
    return require_stages(model)


def check_matrix(name: str, stage: DynamicGraph, matrix: Tensor) -> Tensor:
    """`matrix` as (1 or B, N, N[, g]). Raises UsageError if it does not fit the topology, or g the weights of each edge."""
    topology, groups = stage.topology, stage.weighting.edge_weights
    num_nodes = topology.num_nodes
    square = (num_nodes, num_nodes)
    fitting = {2: square, 3: square, 4: (*square, groups)}  # the sizes without B
    sizes = tuple(matrix.shape) if isinstance(matrix, Tensor) else ()
    if not isinstance(matrix, Tensor) or (sizes[1:] if len(sizes) > 2 else sizes) != fitting.get(len(sizes)):
        allowed = f"({num_nodes}, {num_nodes}) or (B, {num_nodes}, {num_nodes})"
        if groups > 1:
            allowed += f" or, with weights for each group of channels, (B, {num_nodes}, {num_nodes}, {groups})"
        found = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
        raise UsageError(f"{name}: an adjacency is {allowed}, got {found}")
    if matrix.layout != torch.strided or matrix.is_meta:
        raise UsageError(f"{name}: an adjacency is a dense tensor with values, got {matrix.layout} on {matrix.device.type}")
    if matrix.is_complex() or not torch.isfinite(matrix).all():
        raise UsageError(f"{name}: the weights of an adjacency must be finite real numbers")
    matrix = matrix[None] if matrix.ndim == 2 else matrix
    if matrix[:, ~topology.mask.to(matrix.device)].any():
        raise UsageError(f"{name}: the adjacency weighs an edge that the topology lacks; row j holds node j's in-edges")
    return matrix
