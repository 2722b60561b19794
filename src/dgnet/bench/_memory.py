"""The peak memory of a step."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from dgnet.compat.torch import list_allocations
from dgnet.inference import Step, synchronize


def measure_peak(step: Step, device: torch.device, persistent: Sequence[Tensor], allocated: int) -> int | None:
    """Peak memory of a step in bytes, temporary and persistent tensors together. None if the system does not report it.

    `persistent`: tensors that exist before and after the step; on a CPU their size is added. `allocated`: bytes on the GPU that
    belong to something else; they are subtracted.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - allocated
    if device.type != "cpu" or not _reset_peak():
        return None
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before + sum(tensor.nbytes for tensor in persistent)


def measure_tensors(step: Step, device: torch.device, persistent: Sequence[Tensor], peak: int | None) -> int | None:
    """The most bytes that tensors occupy at once in a step: its peak without what an allocator holds between them.

    `peak`: that of `measure_peak`, which on a GPU is this figure. None on other devices than GPUs and CPUs, and if torch
    cannot tell.
    """
    if device.type != "cpu":
        return peak
    allocations = list_allocations(step)
    return None if allocations is None else max(accumulate(allocations), default=0) + sum(one.nbytes for one in persistent)


def _reset_peak() -> bool:
    """Reset the peak of this process to what is resident now. Returns whether the system can; only Linux with glibc can."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # return free pages to the system, so that their reuse counts
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return min(_resident("VmRSS"), _resident("VmHWM")) > 0
    except (AttributeError, OSError, StopIteration, TypeError):
        return False


def allocated_bytes(device: torch.device) -> int:
    """Bytes that tensors occupy on a GPU; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _resident(field_name: str) -> int:
    """A memory field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field_name)) * 1024
