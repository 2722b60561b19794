"""The optimiser of a run: timm's, and if asked another one for routers and gates that steps together with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch.optim import Optimizer

from dgnet.training._config import RunConfig

IS_ROUTING = "is_routing"
"""The key of a parameter group that has the optimiser of `--router-optimizer`."""


def build_optimizer(groups: Sequence[dict[str, Any]], config: RunConfig) -> Optimizer:
    """The optimiser for parameter groups of `build_parameter_groups`, which may be marked with `IS_ROUTING`."""
    plain = [group for group in groups if IS_ROUTING not in group]
    routing = [{name: value for name, value in group.items() if name != IS_ROUTING} for group in groups if IS_ROUTING in group]
    common: dict[str, Any] = {"lr": config.peak_lr, "weight_decay": config.weight_decay, "momentum": config.momentum}
    given: dict[str, Any] = {"betas": config.opt_betas and tuple(config.opt_betas), "eps": config.opt_eps}
    given = {name: value for name, value in given.items() if value is not None}
    if not routing:
        return create_optimizer_v2(plain, opt=config.optimizer, **common, **given)
    second = create_optimizer_v2(routing, opt=config.router_optimizer, **common)
    return JointOptimizer(create_optimizer_v2(plain, opt=config.optimizer, **common, **given), second) if plain else second


class JointOptimizer(Optimizer):
    """Optimisers of different parameters that step together. To schedulers and Lightning it is one with all groups."""

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([{"params": group["params"]} for part in parts for group in part.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        # The parts' own dicts, so that a schedule's learning rates reach them.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parts. `closure` computes loss and gradients, once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state of each part, in order."""
        return {"state": {}, "param_groups": [], "parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()
