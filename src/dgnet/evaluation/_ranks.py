"""The processes that share an evaluation."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether this process is one of a group."""
    return dist.is_available() and dist.is_initialized()


def find_ranks() -> tuple[int, int]:
    """The rank of this process, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def gather(value: T) -> list[T]:
    """The values of all processes, by rank. All processes must call it."""
    if not is_distributed():
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
