"""The learning rate as a function of the step."""

from __future__ import annotations

import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler

from dgnet.training._config import TrainConfig

_DECAY_RATES = {"poly": 0.5}
_DECAY_RATE = 0.1


def build_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int, epochs: int | None = None) -> Scheduler:
    """timm's schedule `config.sched`, by step. `steps`: of the whole run, warm-up and cool-down included;
    `epochs`: of the same, by default those of `config`.

    Cosine, poly and tanh begin after the warm-up. The falls of step and multistep are counted from the start of the run.
    """
    per_epoch = steps / (epochs or config.epochs)
    warmup = round(config.warmup_epochs * per_epoch)
    cooldown = round(config.cooldown_epochs * per_epoch)
    has_end = config.sched in ("cosine", "poly", "tanh")
    rate = config.decay_rate
    scheduler: Scheduler
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.sched,
        num_epochs=max(steps - warmup - cooldown, 1),
        decay_epochs=max(round((config.decay_epochs or 1) * per_epoch), 1),
        decay_milestones=[round(epoch * per_epoch) + 1 for epoch in config.decay_milestones or []],  # timm counts from 1
        decay_rate=_DECAY_RATES.get(config.sched, _DECAY_RATE) if rate is None else rate,
        cooldown_epochs=cooldown,
        min_lr=config.min_lr,
        warmup_epochs=warmup,
        warmup_lr=config.peak_lr / max(warmup, 1) if config.warmup_lr is None else config.warmup_lr,
        warmup_prefix=has_end,
        cycle_decay=1.0,
        step_on_epochs=False,  # the numbers above are steps
        updates_per_epoch=1,
    )
    return scheduler
