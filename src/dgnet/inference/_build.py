"""The C++ extension of the sparse mode, `native.cpp`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from dgnet._extension import Extension


def _is_defined() -> bool:
    """Whether `torch.classes.dgnet` has the extension's classes."""
    try:
        return bool(torch.classes.dgnet.Walk)
    except RuntimeError:
        return False


_FOLDER = Path(__file__).parent

NATIVE = Extension(
    name="dgnet",
    what="sparse mode",
    duration="half a minute",
    sources=tuple(_FOLDER / name for name in ("native.cpp", "kernels.h", "program.h")),
    is_defined=_is_defined,
)


@cache
def load_native() -> Path:
    """Load the extension, which defines `torch.classes.dgnet`; returns the library's path. See `Extension.load`."""
    return NATIVE.load()
