"""Loading images in batches: the order of an evaluation, and the processes that load."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from dgnet.errors import check_range


class EvaluationOrder(Sampler[list[tuple[int, int]]]):
    """One process's batches of (0, index): each image once over all `ranks`.

    `even`: all processes get equally many items, as processes need that take their steps together; index -1 fills up.
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
    """Batches of `items` in the order given, put together by `collate`; `workers`: processes that load."""
    return DataLoader(
        items,
        batch_sampler=order,
        collate_fn=collate,
        # A generator of its own: loading draws nothing from the one that training draws from.
        generator=torch.Generator(),
        persistent_workers=workers > 0,
        **worker_options(workers),
    )


class EvaluationLoader:
    """Each of `items` once over all `ranks`, in batches (indices, content), for `dgnet.evaluation.run_pass`.

    `indices`: where the items of the batch stand in `items`; `content`: what `collate` makes of them, (inputs, targets, …).

    Raises UsageError for a size or count that makes no sense.
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
        check_range("--workers", workers, 0)
        order = EvaluationOrder(len(items), batch_size, rank, ranks, even=False)  # type: ignore[arg-type]
        self._batches = build_loader(_Numbered(items), order, workers, partial(_collate_numbered, collate))
        self._peeked: tuple[Any, Iterator[Any]] | None = None

    def __len__(self) -> int:
        return len(self._batches)

    def peek(self) -> Any:
        """The content of the first batch, which the next iteration does not load again; None where there is none."""
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
    """Items by (epoch, index), each with its index."""

    def __init__(self, items: Dataset[Any]) -> None:
        self.items = items

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Any]:
        return key[1], self.items[key[1]]


def _collate_numbered(collate: Callable[[Any], Any], numbered: list[tuple[int, Any]]) -> tuple[list[int], Any]:
    indices, items = zip(*numbered, strict=True)
    return list(indices), collate(list(items))


def worker_options(workers: int) -> dict[str, Any]:
    """Options of a DataLoader with so many processes."""
    return {
        "num_workers": workers,
        "worker_init_fn": partial(heed_only, os.getpid()),
        "pin_memory": torch.cuda.is_available(),
    }


def heed_only(sender: int, worker: int) -> None:
    """In a process that loads images: only the process that it loads for, `sender`, ends it.

    Launchers signal a whole group; if the loaders died of it, a run could not take the step after which it saves.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != sender:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
