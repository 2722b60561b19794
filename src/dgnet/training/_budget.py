"""Training to a budget of multiply-adds: what a forward executes, differentiable in the gates, and a loss that holds it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dgnet._cost import cost_model
from dgnet.errors import UsageError, check_choice, check_range
from dgnet.graph import DynamicGraph, find_stages

PER = ("batch", "sample")


class Budget:
    """Holds the multiply-adds of the nodes that run at `share` of the dense cost.

    `per`: the mean over a "batch" is held, or each "sample" by itself. The loss is `strength` · (executed - target)², where
    executed is a share of the dense cost, exact since gates are 0 or 1, and the target falls from 1 to `share` over the first
    `warmup` of training.

    Raises UsageError for a network without gates on blocks, and for a share outside (0, 1] or below what always runs.
    """

    def __init__(
        self,
        network: nn.Module,
        image_size: int | tuple[int, int],
        share: float,
        per: str = "batch",
        strength: float = 10.0,
        warmup: float = 0.3,
    ) -> None:
        check_choice("--budget-per", per, PER)
        check_range("--budget-strength", strength, 0)
        check_range("--budget-warmup", warmup, 0, 1)
        self.stages = find_stages(network)
        if not self.stages:
            raise UsageError(f"--budget {share} needs a network with dynamic stages, which {type(network).__name__} has not")
        if all(stage.node_gates is None for stage in self.stages):
            raise UsageError(f"--budget {share} needs gates on blocks: leave node_gate out, or set it to hard or gumbel")
        self.costs = cost_model(network, image_size)
        least = self.costs.least / self.costs.dense
        if not 0 < share <= 1:
            raise UsageError(f"--budget must be above 0 and at most 1, got {share}; what always runs costs {least:.3f}")
        if share < least:
            raise UsageError(f"--budget {share} is less than what always runs, {least:.3f} of the dense cost; use more")
        self.share, self.per, self.strength, self.warmup = share, per, strength, warmup
        self._ran: dict[int, Tensor] = {}

    @contextmanager
    def observe(self) -> Iterator[None]:
        """See which nodes run in a forward inside the `with` block."""
        self._ran = {}
        for stage in self.stages:
            stage._records = [*stage._records, self]
        try:
            yield
        finally:
            for stage in self.stages:
                stage._records = [other for other in stage._records if other is not self]

    def append(
        self,
        stage: DynamicGraph,
        alpha_rows: Sequence[Tensor],
        weight_rows: Sequence[Tensor],
        alive: Sequence[Tensor | None],
    ) -> None:
        """See `dgnet.graph._record.Observer`."""
        ones = torch.ones_like(weight_rows[0][:, 0], dtype=torch.float32)
        columns = [ones if column is None else column.float() for column in (*alive, None)]
        self._ran[self.stages.index(stage)] = torch.stack(columns, dim=1)

    def executed(self) -> Tensor:
        """Multiply-adds of the forward observed last, for each sample as a share of the dense cost, (B,)."""
        return self.costs.executed([self._ran[index] for index in range(len(self.stages))]) / self.costs.dense

    def penalty(self, executed: Tensor, progress: float = 1.0) -> Tensor:
        """The loss for what a batch executed, (B,); `progress`: the share of training that is done."""
        ramp = min(progress / self.warmup, 1.0) if self.warmup else 1.0
        target = 1 - ramp * (1 - self.share)
        distance = executed.mean() - target if self.per == "batch" else executed - target
        return self.strength * distance.square().mean()
