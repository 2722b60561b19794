from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from dgnet.errors import UsageError
from dgnet.training import TrainConfig
from dgnet.training._schedule import build_schedule

STEPS = 100  # in 10 epochs


def rates(**options: object) -> list[float]:
    """The rate of each step."""
    config = TrainConfig(**{"epochs": 10, "lr": 1.0, "warmup_epochs": 0, **options})
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.peak_lr)
    scheduler = build_schedule(optimizer, config, STEPS)
    found = []
    for step in range(STEPS):
        scheduler.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_the_default_is_a_warm_up_and_a_half_period_of_a_cosine():
    expected = [0.05 + step * 0.95 / 20 for step in range(20)]
    expected += [(1 + math.cos(math.pi * step / 80)) / 2 for step in range(80)]
    assert rates(warmup_epochs=2) == pytest.approx(expected)


def test_a_cool_down_stays_at_the_least_rate():
    found = rates(warmup_epochs=1, warmup_lr=0.2, min_lr=0.01, cooldown_epochs=3)
    assert found[:10] == pytest.approx([0.2 + step * 0.08 for step in range(10)])
    assert found[10:70] == pytest.approx([0.01 + 0.99 * (1 + math.cos(math.pi * step / 60)) / 2 for step in range(60)])
    assert found[70:] == pytest.approx([0.01] * 30)


def test_the_rate_falls_at_the_epochs_that_are_named():
    found = rates(sched="multistep", decay_milestones=[3, 5], decay_rate=0.5)
    assert found == pytest.approx([1.0] * 30 + [0.5] * 20 + [0.25] * 50)
    assert rates(sched="step", decay_epochs=4) == pytest.approx([1.0] * 40 + [0.1] * 40 + [0.01] * 20)


def test_poly_and_tanh_fall_from_the_peak_to_the_least_rate():
    assert rates(sched="poly", decay_rate=2) == pytest.approx([(1 - step / 100) ** 2 for step in range(100)])
    found = rates(sched="tanh", warmup_epochs=1, min_lr=0.1)
    assert found[10] > 0.98
    assert found[-1] == pytest.approx(0.1, abs=0.02)
    assert all(later <= earlier for earlier, later in pairwise(found[10:]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sched": "plateau"}, "--sched plateau cannot be continued exactly"),
        ({"sched": "cosin"}, "unknown --sched 'cosin'; did you mean 'cosine'"),
        ({"sched": "step"}, "--sched step needs --decay-epochs"),
        ({"decay_rate": 0.1}, "--decay-rate needs --sched step or multistep or poly, and it is cosine"),
        ({"sched": "multistep", "decay_milestones": [5, 3]}, "--decay-milestones must be increasing"),
        ({"warmup_epochs": 5, "cooldown_epochs": 5}, "leave nothing of --epochs 10"),
        ({"warmup_epochs": 11}, "--warmup-epochs must be 0 to 10, got 11"),
        ({"sched": "multistep", "decay_milestones": [5], "min_lr": 0.1}, "--min-lr needs --sched cosine or poly or tanh"),
    ],
)
def test_bad_options_of_the_schedule_are_one_line(options, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(epochs=10, **options)
