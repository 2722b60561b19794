"""Inference that runs a block only on the samples for which it is alive (§3.3): the modes, and the sparse walk.

Letters: B batch, n samples for which a node runs, N nodes of a stage, E in-edges of a node.
"""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from dgnet.compat.torch import is_compiled_for_all_sizes
from dgnet.errors import UsageError, check_choice, check_range
from dgnet.graph import (
    DenseWalk,
    StageNodes,
    Walk,
    aggregate_rows,
    find_alive,
    find_stages,
    require_stages,
    select_samples,
    split_ways,
    sum_in_groups,
)
from dgnet.inference._branching import BranchingWalk

MODES = ("dense", "sparse")


def set_mode(model: nn.Module, mode: str) -> nn.Module:
    """Set how the dynamic stages of `model` run in evaluation, in place; returns the model.

    "dense": every node runs on every sample, and a closed edge weighs 0. "sparse": a node runs only on the samples for which it
    is alive, and not at all if there are none. Its output is the same up to rounding; a backward pass through it raises
    UsageError. In both modes connectivity can be recorded (`record.ran`: which nodes ran) and imposed. Training is always
    dense.

    "sparse" is set to plain PyTorch; `set_sparse` chooses the recommended executor of the device.

    Raises UsageError for another mode, and for "sparse" if the model has no dynamic stages.
    """
    check_choice("mode", mode, MODES)
    for stage in require_stages(model) if mode == "sparse" else find_stages(model):
        stage.inference_walk = SparseWalk if mode == "sparse" else DenseWalk
    return model


def can_skip(model: nn.Module) -> bool:
    """Whether some block of `model` may be skipped: it has block gates, or edges that can close.

    Raises UsageError for a model without dynamic stages.
    """
    return any(_can_close(stage) for stage in require_stages(model))


def _can_close(stage: StageNodes) -> bool:
    return stage.has_gates or stage.weighting.can_close


def _follows_offset(stage: StageNodes) -> bool:
    return stage.has_gates or (stage.weighting.can_close and stage.weighting.reads_offset)


def set_threshold_offset(model: nn.Module, offset: float) -> nn.Module:
    """In evaluation, close edges below τ + `offset` and block gates below ½ + `offset`. In place; returns the model.

    Raises UsageError if the model has no edge or block that can close.
    """
    check_range("threshold offset", offset)
    if not any(_follows_offset(stage) for stage in require_stages(model)):
        raise UsageError(
            f"{type(model).__name__} has no edge or block that can close below a threshold, so an offset changes nothing"
        )
    for stage in find_stages(model):
        stage.threshold_offset = float(offset)
    return model


def find_threshold_offset(model: nn.Module) -> float:
    """The offset that `set_threshold_offset` or the model's options have set; 0 if nothing follows it."""
    return next((stage.threshold_offset for stage in find_stages(model) if _follows_offset(stage)), 0.0)


class SparseWalk(DenseWalk):
    """Each node runs on the samples for which it is alive. A feature holds those samples only, in ascending order.

    If all weights are known before the pass (imposed, learned or fixed), nodes without an open path to the output node are
    skipped too. If gates are decided early and no edge can close, the samples of every block are known before the first one
    runs, and the CPU waits for a GPU once instead of at each block. A backward pass through the output raises UsageError.
    """

    skips_nodes = True

    def __init__(self, stage: StageNodes, x: Tensor, gates: Tensor | None = None) -> None:
        super().__init__(stage, x, gates)
        # (B, N): each sample's row in each node's feature; any row if the node did not run for the sample.
        self.places = torch.arange(len(x), device=x.device)[:, None].repeat(1, self.topology.num_nodes)
        self.rows: list[Tensor | None] = [None]  # for each node, the samples for which it ran, (n,); None: all
        self.plan: list[Tensor | None] | None = None  # the same, if it is known before the blocks run

    @classmethod
    def in_graph(cls) -> type[Walk]:
        # With dynamic=True the compiler passes numbers such as ε of a normalisation into branches, and refuses them there.
        return DenseWalk if is_compiled_for_all_sizes() else BranchingWalk

    @torch.no_grad()
    def put(self, node: int, feature: Tensor | None) -> None:
        rows = self.rows[node]
        if rows is not None and feature is not None:
            self.places[:, node].zero_().index_copy_(0, rows, torch.arange(len(rows), device=rows.device))
        with select_samples(self.area, rows):
            super().put(node, feature)
        if node == 0 and self.needs.gates and not self.stage.weighting.can_close:
            gates = self._find_early_gates()
            self.plan = None if gates is None else self._plan(gates)

    def _find_early_gates(self) -> Tensor | None:
        """Which gates are open, (B, blocks), on the CPU; None if they are not known before the blocks run."""
        if self.gates is not None:
            return (self.gates > 0.5).cpu()
        own = self.stage.node_gates
        if own is None or not own.is_early:
            return None
        return own.find_open_gates(self.votes[0][:, list(self.topology.blocks)], self.stage.threshold_offset)

    def _plan(self, is_open: Tensor) -> list[Tensor | None]:
        """For each node but the output node the samples for which it runs. `is_open`: gates, (B, blocks), on the CPU."""
        alive = find_alive(self.topology, is_open)
        found = [alive[:, node].nonzero().flatten() for node in (0, *self.topology.blocks)]
        on_device = torch.cat(found).to(self.x.device).split([len(rows) for rows in found])  # one transfer
        return [None if len(rows) == len(alive) else rows for rows in on_device]

    @torch.no_grad()
    def run(self, node: int, weights: Tensor, is_open: Tensor | None, runs: Tensor | None) -> Tensor | None:
        if node == self.topology.output:
            return self._run_output(weights, is_open)
        rows = None
        if self.plan is not None:
            rows = self.plan[node]
        elif runs is not None:
            rows = runs.nonzero().flatten()  # here the CPU waits for the GPU: it needs the number of samples
            if len(rows) == len(self.x):
                rows = None
        self.rows.append(rows)
        if rows is not None and len(rows) == 0:
            return None
        some = None if is_open is None or rows is None else is_open[rows]
        raw_rows = None if rows is None else rows[None]

        def sum_raw(weights: Tensor) -> Tensor:
            own = weights if rows is None else weights[rows]
            return aggregate_rows([self.x], own, is_open if rows is None else some, raw_rows)

        with select_samples(self.area, rows):
            sum_senders = partial(self.sum, node, is_open=is_open, rows=rows)
            return self.stage.compute_from_sums(node, weights, sum_raw, sum_senders, self.further)

    def _run_output(self, weights: Tensor, is_open: Tensor | None) -> Tensor:
        output = self.topology.output
        if all(self.features[sender] is None for sender in self.topology.senders(output)):
            with select_samples(self.area, torch.empty(0, dtype=torch.long, device=self.x.device)):  # it runs an empty batch
                return self.stage.transform(output, self.stage.empty_sum(self.x, self.further))
        own = split_ways(weights, self.stage.weighting.two_way)[1]
        return self.stage.transform(output, self.sum(output, own, is_open, None))

    def sum(self, node: int, weights: Tensor, is_open: Tensor | None, rows: Tensor | None) -> Tensor:
        """x̂_j for the samples `rows`, (n,), None for all. `weights`, `is_open` (None: all open): (B, E)."""
        senders = self.topology.senders(node)
        present = [edge for edge, sender in enumerate(senders) if self.features[sender] is not None]
        features = [self.features[senders[edge]] for edge in present]
        if rows is None and len(present) == len(senders) and all(self.rows[sender] is None for sender in senders):
            return sum_in_groups(partial(aggregate_rows, is_open=is_open), features, weights, self.stage.layout)
        places = self.places[:, _span(senders)]
        if rows is not None:
            weights, is_open, places = weights[rows], None if is_open is None else is_open[rows], places[rows]
        opened = None if is_open is None else is_open[:, present]
        rows_of_samples = places[:, present].t().contiguous()
        sum_rows = partial(aggregate_rows, is_open=opened, rows=rows_of_samples)
        return sum_in_groups(sum_rows, features, weights[:, present], self.stage.layout)

    def finish(self) -> Tensor:
        return refuse_gradients(super().finish(), self.stage, self.x)

    # Predictions are tensors (sender, sample, receiver), 0 where the sender did not run for the sample.

    def new_predictions(self, numbers: int = 1) -> Tensor:
        nodes, dtype = self.topology.num_nodes, torch.promote_types(self.x.dtype, torch.float32)
        return self.x.new_zeros(nodes, len(self.x), nodes, *((numbers,) if numbers > 1 else ()), dtype=dtype)

    def keep(self, predictions: Tensor, node: int, receivers: tuple[int, ...], values: Tensor) -> None:
        span, rows = _span(receivers), self.rows[node]
        samples: Any = slice(None) if rows is None else rows if isinstance(span, slice) else rows[:, None]
        predictions[node][samples, span] = values.to(predictions.dtype)

    def row(self, predictions: Tensor, node: int, senders: tuple[int, ...]) -> Tensor:
        return predictions[_span(senders), :, node].transpose(0, 1)


class _RefuseGradients(torch.autograd.Function):
    """The output of a stage. A backward pass through it raises UsageError."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, wanted: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise UsageError("the sparse mode has no gradients; call set_mode(model, 'dense') before the forward pass")


def refuse_gradients(output: Tensor, stage: StageNodes, x: Tensor) -> Tensor:
    """`output` of a stage; a backward pass that would reach the stage's input `x` or parameters raises UsageError."""
    if not torch.is_grad_enabled():
        return output
    first = next((tensor for tensor in chain([x], stage.parameters()) if tensor.requires_grad), None)
    if first is None:
        return output
    refusing: Tensor = _RefuseGradients.apply(output, first)
    return refusing


def _span(nodes: tuple[int, ...]) -> slice | list[int]:
    """An index of ascending nodes: a slice, which copies nothing, if they are consecutive; otherwise a list."""
    if nodes and nodes[-1] - nodes[0] == len(nodes) - 1:
        return slice(nodes[0], nodes[-1] + 1)
    return list(nodes)
