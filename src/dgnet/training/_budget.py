"""Training to a budget: the multiply-adds that a forward pass executes, differentiable in the gates, and a loss on them."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from dgnet._cost import StageCost, cost_model
from dgnet.errors import UsageError, check_choice, check_range
from dgnet.graph import DynamicGraph, Wiring, find_stages, observe

PER = ("batch", "sample")
RULES = ("penalty", "exact")

_SETTLES = 0.05
"""Share of training within which the multiplier of the rule "exact" settles, if nothing else changes."""


class Budget:
    """A loss that keeps the multiply-adds of the nodes that run at `share` of the dense cost.

    The loss is `strength` · (executed - target)². `executed` is a share of the dense cost. It is exact, because gates are 0 or
    1. `target` falls linearly from 1 to `share` over the first `warmup` of training, a share of all steps.

    `per`: the loss is on the mean of a "batch", or on each "sample".

    `rule`: the loss alone ("penalty") settles where it balances the loss of the task, which is a little above the share. With
    "exact" the loss has a second term, `multiplier` · (executed - target). The multiplier grows while too much is executed and
    falls while too little is (the method of multipliers), from the end of `warmup` on.

    Raises UsageError for a network without block gates, and for a `share` outside (0, 1] or below the cost of what always runs.
    """

    def __init__(
        self,
        network: nn.Module,
        image_size: int | tuple[int, int],
        share: float,
        per: str = "batch",
        strength: float = 10.0,
        warmup: float = 0.3,
        rule: str = "penalty",
    ) -> None:
        check_choice("--budget-per", per, PER)
        check_choice("--budget-rule", rule, RULES)
        check_range("--budget-strength", strength, 0)
        check_range("--budget-warmup", warmup, 0, 1)
        self.stages = find_stages(network)
        if not self.stages:
            raise UsageError(f"--budget {share} needs a network with dynamic stages; {type(network).__name__} has none")
        if all(stage.node_gates is None for stage in self.stages):
            raise UsageError(f"--budget {share} needs gates on blocks: leave node_gate out, or set it to hard or gumbel")
        self.costs = cost_model(network, image_size)
        closed = sum(map(_least_in_training, self.costs.stages, self.stages))
        least = (self.costs.fixed + closed) / self.costs.dense
        if not 0 < share <= 1:
            raise UsageError(f"--budget must be above 0 and at most 1, got {share}; what always runs costs {least:.3f}")
        if share < least:
            raise UsageError(f"--budget {share} is less than what always runs, {least:.3f} of the dense cost; use more")
        self.share, self.per, self.strength, self.warmup, self.rule = share, per, strength, warmup, rule
        self.multiplier = torch.zeros((), device="cpu")
        self._ran: dict[int, Tensor] = {}

    def watch(self) -> AbstractContextManager[None]:
        """Inside the `with` block: observe which nodes a forward pass runs."""
        self._ran = {}
        return observe(self.stages, self)

    def observe(self, index: int, wiring: Wiring) -> None:
        """Keep which nodes of a stage ran; see `dgnet.graph.Observer`."""
        self._ran[index] = wiring.ran.float()

    def executed(self) -> Tensor:
        """Multiply-adds of the last observed forward pass: for each sample a share of the dense cost, (B,)."""
        return self.costs.executed([self._ran[index] for index in range(len(self.stages))]) / self.costs.dense

    def penalty(self, executed: Tensor, progress: float = 1.0) -> Tensor:
        """The loss; 0 without samples. `executed`: for each a share of the dense cost, (B,); `progress`: the share of training
        that is done.
        """
        if len(executed) == 0:
            return executed.sum()
        target = self.target(progress)
        distance = executed.mean() - target if self.per == "batch" else executed - target
        penalty = self.strength * distance.square().mean()
        return penalty if self.rule == "penalty" else penalty + self.multiplier.to(executed.device) * distance.mean()

    def target(self, progress: float) -> float:
        """The share of the dense cost to be executed now. `progress`: the share of training done."""
        ramp = min(progress / self.warmup, 1.0) if self.warmup else 1.0
        return 1 - ramp * (1 - self.share)

    def adapt(self, executed: Tensor, progress: float, steps: int) -> None:
        """Change the multiplier after a batch. `executed`: the mean of its images, NaN without any; `steps`: how often the
        whole training calls this.
        """
        if self.rule == "exact" and progress >= self.warmup:
            rate = 2 * self.strength / max(_SETTLES * steps, 1)
            self.multiplier = self.multiplier.to(executed.device) + rate * (executed.detach() - self.share).nan_to_num(0.0)


def _least_in_training(cost: StageCost, stage: DynamicGraph) -> int:
    """The multiply-adds of a stage with as many blocks closed as can be. In training only gates close blocks."""
    if stage.node_gates is None:
        return cost.dense
    if stage.topology.find_cut() is None:
        return cost.least
    return cost.nodes[0] + cost.routers[0]  # a run of an older version, whose gates could remove the image from the network
