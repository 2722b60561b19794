"""Training to a budget of multiply-adds: what a forward executes, differentiable in the gates, and a loss that holds it."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor, nn

from dgnet._cost import cost_model
from dgnet.errors import UsageError, check_choice, check_range
from dgnet.graph import Wiring, find_stages, observe

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

    def watch(self) -> AbstractContextManager[None]:
        """See which nodes run in a forward pass inside the `with` block."""
        self._ran = {}
        return observe(self.stages, self)

    def observe(self, index: int, wiring: Wiring) -> None:
        """Note which nodes of a stage ran; see `dgnet.graph.Observer`."""
        self._ran[index] = wiring.ran.float()

    def executed(self) -> Tensor:
        """Multiply-adds of the forward observed last, for each sample as a share of the dense cost, (B,)."""
        return self.costs.executed([self._ran[index] for index in range(len(self.stages))]) / self.costs.dense

    def penalty(self, executed: Tensor, progress: float = 1.0) -> Tensor:
        """The loss for what a batch executed, (B,); `progress`: the share of training that is done."""
        ramp = min(progress / self.warmup, 1.0) if self.warmup else 1.0
        target = 1 - ramp * (1 - self.share)
        distance = executed.mean() - target if self.per == "batch" else executed - target
        return self.strength * distance.square().mean()
