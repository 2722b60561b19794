"""Values that are set inside a `with` block, for one thread or task only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Generic, TypeVar

import torch

from dgnet.compat.torch import DYNAMO_READS_CONTEXT_VARS

T = TypeVar("T")


class _Block(Generic[T]):
    """A `with` block and its value."""

    def __init__(self, value: T) -> None:
        self.value = value
        self.is_open = True


class ContextStack(Generic[T]):
    """The values of the `with` blocks that are open in this thread or task, which compiled code can read too.

    Blocks may be left in any order, and from another thread than they were entered in, as a generator that keeps a block open
    may be. Older versions of torch cannot trace `ContextVar.get`. With them, compiled code sees the open blocks of all threads.
    """

    def __init__(self, name: str) -> None:
        self._here: ContextVar[tuple[_Block[T], ...]] = ContextVar(name, default=())
        self._everywhere: tuple[_Block[T], ...] = ()
        self._lock = Lock()

    def values(self) -> list[T]:
        """The values of the open blocks, the innermost last."""
        is_blind = not DYNAMO_READS_CONTEXT_VARS and torch.compiler.is_compiling()
        blocks = self._everywhere if is_blind else self._here.get()
        return [block.value for block in blocks if block.is_open]

    @contextmanager
    def hold(self, value: T) -> Iterator[None]:
        """Add a value inside the `with` block."""
        block = _Block(value)
        self._here.set((*self._here.get(), block))
        with self._lock:
            self._everywhere = (*self._everywhere, block)
        try:
            yield
        finally:
            block.is_open = False  # also where this context is not the one that the block was entered in
            self._here.set(tuple(other for other in self._here.get() if other is not block))
            with self._lock:
                self._everywhere = tuple(other for other in self._everywhere if other is not block)
