"""The processes of a run: which of them writes, the group that they form, and their common end."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only

from dgnet.compat.lightning import take_processes


def is_main_process(nodes: int = 1) -> bool:
    """Whether this process writes and prints: Lightning starts the command again in each further process.

    `nodes`: on how many machines the run takes place, where there is no trainer yet, which knows.
    """
    node = int(os.environ.get("NODE_RANK", 0)) if nodes > 1 and "RANK" not in os.environ else 0
    return rank_zero_only.rank == 0 and node == 0  # type: ignore[attr-defined]


@contextmanager
def join_processes(device: str) -> Iterator[str]:
    """Under torchrun, the group of its processes inside the `with` block, each with a device of its own; gives the device."""
    if not dist.is_torchelastic_launched():
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def end_other_processes(trainer: L.Trainer, error: BaseException) -> bool:
    """After `error` in the first process, end those that Lightning started beside it.

    Otherwise they would wait for this one until a time-out of their group, and print that error once each. Returns True if one
    of them met a mistake of the user: it has printed its line and left with status 2, and `error` only says that the connection
    to it broke.
    """
    others = take_processes(trainer)
    has_refused = isinstance(error, RuntimeError) and _has_refused(others)
    for process in others:
        process.kill()
    return has_refused


def _has_refused(processes: Sequence[subprocess.Popen[bytes]]) -> bool:
    """Whether one of the processes met a mistake, printed its line and left: that breaks the connection to it."""
    end = time.monotonic() + 3
    while processes and time.monotonic() < end and all(process.poll() is None for process in processes):
        time.sleep(0.05)
    return any(process.poll() == 2 for process in processes)
