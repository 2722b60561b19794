"""All speeds that dgnet reports are measured here: steps alternate in one process, so that a busy machine slows all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Step = Callable[[], object]


def synchronize(device: str | torch.device) -> None:
    """Wait until a GPU has finished its queued work; on a CPU do nothing."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def time_step(step: Step, device: str | torch.device = "cpu", repeats: int = 1) -> float:
    """Seconds of one call: the mean of `repeats` calls in a row, with one synchronisation at their end."""
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    synchronize(device)
    return (time.perf_counter() - started) / repeats


def time_alternating(
    steps: Mapping[str, Step],
    rounds: int = 5,
    device: str | torch.device = "cpu",
    round_seconds: float = 0.1,
    after_round: Step = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of one call of each step, one figure for each round.

    Each step is first called twice to warm up. In a round each step has a turn, repeated calls that last about `round_seconds`.
    The order of the steps is reversed from round to round. `after_round` is called after each round and is not timed.
    """
    warm_up = {name: min(time_step(step, device), time_step(step, device)) for name, step in steps.items()}
    repeats = {name: max(1, round(round_seconds / max(seconds, 1e-6))) for name, seconds in warm_up.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name in list(steps) if number % 2 else list(steps)[::-1]:
            seconds[name].append(time_step(steps[name], device, repeats[name]))
        after_round()
    return seconds


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third quartile; for a single value, that value twice."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third
