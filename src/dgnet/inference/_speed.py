"""Images/s of a network's modes as it is deployed, compared in one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from dgnet.graph import find_stages
from dgnet.inference._compile import compile_for, without_gradients
from dgnet.inference._fold import fold_batch_norms
from dgnet.inference._native import lower_static_blocks, set_sparse
from dgnet.inference._sparse import set_mode
from dgnet.inference._timing import time_alternating


def measure_speed(
    network: nn.Module,
    images: Tensor,
    static: nn.Module | None = None,
    compile: bool = False,
    rounds: int = 5,
    executor: str = "recommended",
) -> dict[str, float]:
    """Images/s of `network` in "dense" and "sparse" mode, and of `static` as "static": medians over alternating rounds.

    A network without dynamic stages has only the "dense" mode. Normalisations are folded in all networks, images are
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

    Normalisations are folded. `mode`: "dense" or "sparse". `compile`: compile it; on a GPU the dense mode runs under
    CUDA graphs, and the sparse mode is compiled for batch size 1 only, because larger batches are faster uncompiled.
    `executor`: of a sparse mode that is not compiled, see `set_sparse`.
    """
    folded = fold_batch_norms(network, image_size).to(memory_format=torch.channels_last)
    if compile:
        return compile_for(folded, mode, batch_size)
    if mode == "sparse":
        return without_gradients(lower_static_blocks(set_sparse(folded, executor)))
    return without_gradients(set_mode(folded, mode))
