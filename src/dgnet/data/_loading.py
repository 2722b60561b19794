"""Loaders of batches: the order of images in an evaluation, and the worker processes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from dgnet.errors import UsageError, check_range
from dgnet.options import MOST_WORKERS

_OPEN_FILES = 4096
"""The limit to ask for, which large batches of many tensors need."""


class EvaluationOrder(Sampler[list[tuple[int, int]]]):
    """One process's batches of (0, index). Over all `ranks` processes each image appears once.

    `even`: give every process the same number of items, filled up with index -1. Processes that synchronise at each step need
    this.
    """

    def __init__(self, images: int, batch_size: int, rank: int = 0, ranks: int = 1, even: bool = True) -> None:
        self.images, self.batch_size, self.rank, self.ranks = images, batch_size, rank, ranks
        self.share = -(-images // ranks) if even else len(range(rank, images, ranks))

    def __len__(self) -> int:
        return -(-self.share // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        own = list(range(self.rank, self.images, self.ranks))
        own += [-1] * (self.share - len(own))
        for start in range(0, self.share, self.batch_size):
            yield [(0, index) for index in own[start : start + self.batch_size]]


def build_loader(
    items: Dataset[Any], order: Sampler[Any], workers: int, collate: Callable[[Any], Any] | None = None
) -> DataLoader[Any]:
    """A DataLoader of `items` with the batches of `order`. `collate`: from a list of items to a batch; `workers`: processes."""
    return DataLoader(
        items,
        batch_sampler=order,
        collate_fn=collate,
        # Its own generator, so that loading does not change the random numbers of training.
        generator=torch.Generator(),
        persistent_workers=workers > 0,
        **worker_options(workers),
    )


class EvaluationLoader:
    """Batches (indices, content) for `dgnet.evaluation.run_pass`. Over all `ranks` processes each item appears once.

    `indices`: the positions of the batch in `items`. `content`: the result of `collate`, (inputs, targets, …).

    Raises UsageError for a batch size below 1 or a negative number of workers.
    """

    def __init__(
        self,
        items: Dataset[Any],
        batch_size: int,
        workers: int = 0,
        collate: Callable[[Any], Any] = default_collate,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        check_range("--batch-size", batch_size, 1)
        check_range("--workers", workers, 0, MOST_WORKERS)
        order = EvaluationOrder(len(items), batch_size, rank, ranks, even=False)  # type: ignore[arg-type]
        self._batches = build_loader(_Numbered(items), order, workers, partial(_collate_numbered, collate))
        self._peeked: tuple[Any, Iterator[Any]] | None = None

    def __len__(self) -> int:
        return len(self._batches)

    def peek(self) -> Any:
        """The content of the first batch, None if there is no batch. The next iteration does not load it again."""
        if self._peeked is None:
            iterator = iter(self._batches)
            self._peeked = next(iterator, (None, None)), iterator
        return self._peeked[0][1]

    def __iter__(self) -> Iterator[tuple[list[int], Any]]:
        if self._peeked is None:
            yield from self._batches
            return
        (first, rest), self._peeked = self._peeked, None
        if first[0] is not None:
            yield first
        yield from rest


class _Numbered(Dataset[tuple[int, Any]]):
    """Pairs (index, item), looked up by (epoch, index)."""

    def __init__(self, items: Dataset[Any]) -> None:
        self.items = items

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Any]:
        return key[1], self.items[key[1]]


def _collate_numbered(collate: Callable[[Any], Any], numbered: list[tuple[int, Any]]) -> tuple[list[int], Any]:
    indices, items = zip(*numbered, strict=True)
    return list(indices), collate(list(items))


def worker_options(workers: int) -> dict[str, Any]:
    """Options of a DataLoader with `workers` processes. Raises UsageError if this process may not open files for so many."""
    if workers:
        allow_open_files(workers)
    return {
        "num_workers": workers,
        "worker_init_fn": partial(ignore_signals_except_from, os.getpid()),
        "pin_memory": torch.cuda.is_available(),
    }


def allow_open_files(workers: int) -> None:
    """Raise this process's own limit of open files as far as is allowed: each tensor from a worker takes one.

    Raises UsageError if the limit is too low: a worker that cannot open a file waits for ever, and so does who reads from it.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return

    needed = 32 + 10 * workers  # of a run with two loaders
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(_OPEN_FILES, needed)
    if most != resource.RLIM_INFINITY:
        wanted = min(wanted, most)
    if limit != resource.RLIM_INFINITY and limit < wanted:
        with suppress(OSError, ValueError):  # macOS allows less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
            limit = wanted
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise UsageError(
            f"--workers {workers} may need {needed} open files, and the limit is {limit}; raise it with `ulimit -n {needed}`,"
            " or lower --workers"
        )


def ignore_signals_except_from(parent: int, worker: int) -> None:
    """Make a worker process ignore SIGINT, SIGHUP, and SIGTERM except from `parent`, the process for which it loads images.

    Launchers send signals to a whole process group. If they ended the workers, the run could not finish its step and save.

    macOS cannot tell who sent a signal. There the worker leaves the process group instead. Windows has no such signals.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if not (hasattr(signal, "sigwaitinfo") and hasattr(signal, "pthread_sigmask")):
        if hasattr(os, "setpgid"):
            os.setpgid(0, 0)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
