"""What happens to CPU memory that a step has freed."""

from __future__ import annotations

import ctypes

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 64 * 2**20


def keep_freed_memory() -> bool:
    """Keep CPU memory that tensors have freed for the next tensors, for the rest of the process. Returns whether it had effect.

    By default glibc returns every large block to the system. The next step then has a page fault for each 4 KiB that it writes,
    which takes longer than the arithmetic of an addition. After the call the process keeps the memory of its peak, and somewhat
    more because of fragmentation. Only glibc has this setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return all(mallopt(name, value) == 1 for name, value in settings)
