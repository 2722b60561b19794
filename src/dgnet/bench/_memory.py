"""Memory at the peak of a step."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dgnet.inference._timing import Step, synchronize


def measure_peak(step: Step, device: torch.device, lasting: Sequence[Tensor], allocated: int) -> int | None:
    """Bytes at the peak of a step: what it holds for a while, and what lasts. None where the system does not tell.

    `lasting`: tensors that outlive a step, which the figure of a CPU adds. `allocated`: bytes on the GPU that belong to
    something else, which its figure leaves out.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - allocated
    if device.type != "cpu" or not Path("/proc/self/clear_refs").exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # free pages go back, so that using them again is seen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before + sum(tensor.nbytes for tensor in lasting)


def allocated_bytes(device: torch.device) -> int:
    """Bytes that tensors take on a GPU; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _resident(field_name: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field_name)) * 1024
