"""What the clock says of a network's modes, side by side in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from dgnet.graph import find_stages
from dgnet.inference._compile import compile_network, without_gradients
from dgnet.inference._fold import fold_batch_norms
from dgnet.inference._native import set_sparse
from dgnet.inference._sparse import set_mode


def time_alternating(steps: Mapping[str, Callable[[], object]], rounds: int = 5, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each step, a figure a round; they take turns, in an order that turns round, after two calls to warm up."""

    def timed(step: Callable[[], object]) -> float:
        started = time.perf_counter()
        step()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    repeats = {name: max(1, round(0.1 / max(min(timed(step), timed(step)), 1e-6))) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name in list(steps) if number % 2 else list(steps)[::-1]:
            seconds[name].append(statistics.fmean(timed(steps[name]) for _ in range(repeats[name])))
    return seconds


def measure_speed(
    network: nn.Module,
    images: Tensor,
    static: nn.Module | None = None,
    compile: bool = False,
    rounds: int = 5,
    executor: str = "recommended",
) -> dict[str, float]:
    """Images/s of `network` in its "dense" and "sparse" mode and of a "static" network, medians over alternating rounds.

    A network without dynamic stages has its "dense" mode only. Normalisations are folded on all sides, images are
    channels_last. `compile`, `executor`: see `deploy`.
    """
    device = str(images.device)
    size = (images.shape[2], images.shape[3])
    steps: dict[str, Callable[[], object]] = {}
    sides = {} if static is None else {"static": static}
    sides |= dict.fromkeys(("dense", "sparse") if find_stages(network) else ("dense",), network)
    for name, side in sides.items():
        mode = "sparse" if name == "sparse" else "dense"
        run = deploy(side.to(images.device), size, mode, len(images), compile, executor)
        steps[name] = partial(run, images.contiguous(memory_format=torch.channels_last))
    seconds = time_alternating(steps, rounds, device)
    return {name: len(images) / statistics.median(times) for name, times in seconds.items()}


def deploy(
    network: nn.Module,
    image_size: tuple[int, int],
    mode: str,
    batch_size: int,
    compile: bool,
    executor: str = "recommended",
) -> Callable[[Tensor], Tensor]:
    """A copy of `network` as it is deployed for one batch size and images in channels_last, (B, C, H, W) -> (B, classes).

    Normalisations are folded. `mode`: "dense" or "sparse"; `compile`: with `compile_network`, the sparse mode on the CPU and
    elsewhere at batch 1 only: larger batches are faster as they are. `executor`: of the sparse mode where it
    is not compiled, see `set_sparse`.
    """
    folded = fold_batch_norms(network, image_size).to(memory_format=torch.channels_last)
    is_cpu = next(folded.parameters()).is_cpu
    if compile and (mode != "sparse" or is_cpu or batch_size == 1):
        return compile_network(folded, mode)
    return without_gradients(set_sparse(folded, executor) if mode == "sparse" else set_mode(folded, mode))
