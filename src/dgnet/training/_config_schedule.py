"""Options of the learning rate's course: warm-up, schedule, cool-down."""

from __future__ import annotations

from dataclasses import dataclass

from dgnet.errors import UsageError, check_choice
from dgnet.options import check_bounds, flag, option
from dgnet.training._config_optimizer import LARGEST_RATE

SCHEDULES = ("cosine", "step", "multistep", "poly", "tanh")
"""timm's names, of those that are a function of the step. `_USED_BY` says which options each of them reads."""

_USED_BY = {
    "min_lr": ("cosine", "poly", "tanh"),
    "cooldown_epochs": ("cosine", "poly", "tanh"),
    "decay_rate": ("step", "multistep", "poly"),
    "decay_epochs": ("step",),
    "decay_milestones": ("multistep",),
}

_BOUNDS: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(("warmup_lr", "min_lr"), (0, LARGEST_RATE)),
    "warmup_epochs": (0,),
    "cooldown_epochs": (0,),
    "decay_rate": (0, 100),
}


@dataclass(frozen=True)
class ScheduleOptions:
    """How the learning rate changes. All lengths are in epochs, and `--epochs` counts all of them."""

    sched: str = option("cosine", f"timm's schedule of the learning rate, by step: {', '.join(SCHEDULES)}")
    warmup_epochs: float = option(1.0, "epochs of linear warm-up; then --sched begins")
    warmup_lr: float | None = option(
        None, "learning rate of the first step of warm-up; by default --lr over the number of steps"
    )
    min_lr: float = option(0.0, "learning rate at the end of cosine, poly and tanh")
    cooldown_epochs: float = option(0.0, "last epochs, at --min-lr (cosine, poly, tanh)")
    decay_epochs: float | None = option(None, "step: epochs between two falls of the rate, counted from the start")
    decay_milestones: list[int] | None = option(None, "multistep: epochs after which the rate falls, as in [30, 60]")
    decay_rate: float | None = option(
        None, "step, multistep: factor of each fall, by default 0.1; poly: the power, by default 0.5"
    )

    def check(self) -> None:
        """Raises UsageError for a value that is not allowed, and for an option that the schedule does not read."""
        if self.sched == "plateau":
            raise UsageError(
                "--sched plateau cannot be continued exactly after an interruption, because timm stores no state of it;"
                f" use one of: {', '.join(SCHEDULES)}"
            )
        check_choice("--sched", self.sched, SCHEDULES)
        check_bounds(self, _BOUNDS)
        for name, schedules in _USED_BY.items():
            if getattr(self, name) and self.sched not in schedules:
                raise UsageError(f"{flag(name)} needs --sched {' or '.join(schedules)}, and it is {self.sched}; leave it out")
        for name in ("decay_epochs", "decay_milestones"):
            if self.sched in _USED_BY[name] and not getattr(self, name):
                raise UsageError(f"--sched {self.sched} needs {flag(name)}")

    def check_phases(self, epochs: int) -> None:
        """Raises UsageError for phases that do not fit into `epochs`."""
        if not 0 <= self.warmup_epochs <= epochs:
            raise UsageError(f"--warmup-epochs must be 0 to {epochs}, got {self.warmup_epochs}")
        if self.cooldown_epochs and self.warmup_epochs + self.cooldown_epochs >= epochs:
            raise UsageError(
                f"--warmup-epochs {self.warmup_epochs:g} and --cooldown-epochs {self.cooldown_epochs:g} leave nothing of"
                f" --epochs {epochs} for --sched {self.sched}; use fewer"
            )
        if self.decay_epochs is not None and not 0 < self.decay_epochs <= epochs:
            raise UsageError(f"--decay-epochs must be above 0 and at most {epochs}, got {self.decay_epochs:g}")
        found = self.decay_milestones or []
        if found != sorted({milestone for milestone in found if 0 < milestone < epochs}):
            raise UsageError(f"--decay-milestones must be increasing whole numbers from 1 to {epochs - 1}, got {found}")
