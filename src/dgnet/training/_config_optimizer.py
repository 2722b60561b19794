"""Options of the optimiser: learning rates, weight decay, clipping of gradients."""

from __future__ import annotations

from dataclasses import dataclass

from dgnet.errors import UsageError, check_choice, reason
from dgnet.options import check_bounds, flag, option

ROUTING_DECAY = ("weights", "all", "none")
LARGEST_RATE = 1_000_000
"""A larger number is a slip of the keyboard; a much larger one does not fit into the format of the weights."""

_BOUNDS: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(("lr", "threshold_lr", "router_lr", "weight_decay"), (0, LARGEST_RATE)),
    "lr_batch_size": (1,),
    "momentum": (0, 1),
    "opt_eps": (0, 1),
    "clip_grad": (0, 1e30),
}


@dataclass(frozen=True)
class OptimizerOptions:
    """Which optimiser changes which parameter by how much."""

    optimizer: str = option("sgd", "timm optimiser name; sgd has Nesterov momentum, momentum is SGD without it")
    opt_betas: list[float] | None = option(None, "betas of the optimiser, as in [0.9, 0.999]; by default its own")
    opt_eps: float | None = option(None, "epsilon of the optimiser; by default its own")
    lr: float = option(0.1, "peak learning rate")
    lr_batch_size: int | None = option(
        None, "batch size for which --lr is meant; another --batch-size scales the rate in proportion; by default no scaling"
    )
    router_lr: float = option(1.0, "learning rate of routers, gates and static weights, as a share of --lr")
    router_optimizer: str = option(
        "same",
        "optimiser of routers, gates, thresholds and static weights: same (as --optimizer), adamw, sgd; its rate is --lr times"
        " --router-lr, and --opt-betas and --opt-eps do not change it. Muon's steps are equally long for every matrix, so that"
        " a router that starts at 0 moves far at once",
        ("same", "adamw", "sgd"),
    )
    threshold_lr: float = option(1.0, "learning rate of the thresholds τ, as a share of --lr")
    momentum: float = option(0.9, "momentum of SGD")
    weight_decay: float = option(5e-4, "weight decay; never on learned edge weights")
    norm_decay: bool = option(False, "apply weight decay to normalisation and biases too")
    routing_decay: str = option(
        "weights", "weight decay of routers: weights, all (biases and thresholds too), or none", ROUTING_DECAY
    )
    clip_grad: float | None = option(None, "clip gradients at this value, as --clip-mode says; by default no clipping")
    clip_mode: str = option(
        "norm",
        "norm: the norm of all gradients together; value: each number; agc: the norm of each filter's gradient, as a share of"
        " the filter's norm (not of the classifier)",
        ("norm", "value", "agc"),
    )

    def check(self) -> None:
        """Raises UsageError for a value that is not allowed, and for one that the optimiser does not take."""
        from timm.optim import get_optimizer_class, get_optimizer_info, list_optimizers

        check_choice("--optimizer", self.optimizer, map(str, list_optimizers()))
        about = get_optimizer_info(self.optimizer)
        if about.second_order:
            raise UsageError(
                f"--optimizer {self.optimizer} needs second derivatives, which training does not compute; use another"
            )
        try:
            get_optimizer_class(self.optimizer)
        except (AssertionError, ImportError) as error:
            raise UsageError(f"--optimizer {self.optimizer} cannot be used here: {reason(error)}") from None
        check_bounds(self, _BOUNDS)
        for name in ("lr", "clip_grad"):
            if getattr(self, name) == 0:
                raise UsageError(f"{flag(name)} must be above 0, got 0")
        if self.clip_mode != "norm" and self.clip_grad is None:
            raise UsageError(f"--clip-mode {self.clip_mode} needs a value to clip at; add --clip-grad, such as 0.01 for agc")
        if self.opt_eps is not None and not about.has_eps:
            raise UsageError(f"--optimizer {self.optimizer} has no epsilon; leave out --opt-eps")
        if self.opt_betas is None:
            return
        if not about.has_betas:
            raise UsageError(f"--optimizer {self.optimizer} has no betas; leave out --opt-betas")
        if len(self.opt_betas) != about.num_betas or not all(0 <= beta < 1 for beta in self.opt_betas):
            raise UsageError(
                f"--opt-betas must be {about.num_betas} numbers from 0 to below 1 for {self.optimizer}, got {self.opt_betas}"
            )
