"""The processes of a run: which one writes, how they form a group, and how they end together."""

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
from dgnet.devices import find_device


def is_main_process(nodes: int = 1) -> bool:
    """Whether this process writes and prints. (Lightning runs the whole command again in each further process.)

    `nodes`: number of machines of the run; needed only before there is a trainer.
    """
    node = int(os.environ.get("NODE_RANK", 0)) if nodes > 1 and "RANK" not in os.environ else 0
    return rank_zero_only.rank == 0 and node == 0  # type: ignore[attr-defined]


@contextmanager
def join_processes(device: str) -> Iterator[str]:
    """Inside the `with` block, under torchrun: the processes form a group. Yields the device of this process.

    With `device` "cuda" each process has its own GPU. Without torchrun there is no group, and `device` stays as it is.
    """
    if not dist.is_torchelastic_launched():
        yield device
        return
    if device == "cuda":
        device = find_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def end_other_processes(trainer: L.Trainer, error: BaseException) -> bool:
    """After `error` in the first process, end the other processes that Lightning started.

    Otherwise they would wait for this one until their group times out, and each would print that error. Returns True if one of
    them found a mistake of the user. It has then printed its line and exited with status 2, and `error` only says that the
    connection to it broke.
    """
    others = take_processes(trainer)
    has_refused = isinstance(error, RuntimeError) and _has_refused(others)
    for process in others:
        process.kill()
    return has_refused


def _has_refused(processes: Sequence[subprocess.Popen[bytes]]) -> bool:
    """Whether one of the processes exits with status 2, a mistake of the user, within 3 seconds."""
    end = time.monotonic() + 3
    while processes and time.monotonic() < end and all(process.poll() is None for process in processes):
        time.sleep(0.05)
    return any(process.poll() == 2 for process in processes)
