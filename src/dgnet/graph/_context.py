"""Values that are set inside a `with` block, for one thread or task only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

import torch

from dgnet.compat.torch import DYNAMO_READS_CONTEXT_VARS

T = TypeVar("T")


class ContextValue(Generic[T]):
    """A `ContextVar` that code under `torch.compile` can read too.

    Older versions of torch cannot trace `ContextVar.get`. With them, `get` in compiled code returns the value that was set last
    in the process.
    """

    def __init__(self, name: str, default: T) -> None:
        self._value: ContextVar[T] = ContextVar(name, default=default)
        self._last = default

    def get(self) -> T:
        """The value of the innermost `with` block that is open in this context."""
        if not DYNAMO_READS_CONTEXT_VARS and torch.compiler.is_compiling():
            return self._last
        return self._value.get()

    @contextmanager
    def set(self, value: T) -> Iterator[None]:
        """Set the value inside the `with` block."""
        token, before = self._value.set(value), self._last
        self._last = value
        try:
            yield
        finally:
            self._value.reset(token)
            self._last = before
