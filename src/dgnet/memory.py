"""What becomes of memory on the host that a step has freed."""

from __future__ import annotations

import ctypes

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 64 * 2**20


def keep_freed_memory() -> bool:
    """Keep memory that tensors on the CPU have freed for the next ones, for the rest of the process.

    By default glibc gives every large block back to the system, and the next step pays a page fault for each 4 KiB that it
    writes: more than the arithmetic of an addition. The process then holds what its peak needed, and some more where blocks
    of different sizes do not fit into each other's place. Returns whether it took effect: another C library has no such
    setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return all(mallopt(name, value) == 1 for name, value in settings)
