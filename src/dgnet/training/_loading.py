"""The order of images in training and evaluation, and loaders that go on where a run was interrupted."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dgnet.data import ShardStream, mix_seed


class TrainingOrder(Sampler[list[tuple[int, int]]]):
    """One process's batches of (epoch, index) in an epoch: a new order each epoch, a function of (`seed`, epoch).

    `batch_size`: images in a step, over `ranks` processes and `accumulate` batches of each. No image comes twice; those left
    out are fewer than a step's, and others in the next epoch. `epoch` and `start`, in steps: where iteration begins.
    """

    def __init__(self, images: int, batch_size: int, seed: int, rank: int = 0, ranks: int = 1, accumulate: int = 1) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.rank, self.ranks, self.accumulate = rank, ranks, accumulate
        self.steps = images // batch_size
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def indices(self) -> Tensor:
        """The indices of each batch from `start` on, (batches, images of a batch)."""
        order = self.shuffle(torch.Generator().manual_seed(mix_seed(self.seed, self.epoch)))
        by_rank = order.view(self.steps, self.accumulate, self.ranks, -1)[self.start :, :, self.rank]
        return by_rank.reshape(-1, by_rank.shape[-1])

    def shuffle(self, generator: torch.Generator) -> Tensor:
        """The indices of an epoch step by step, (steps × `batch_size`,)."""
        return torch.randperm(self.images, generator=generator)[: self.steps * self.batch_size]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.indices():
            yield [(self.epoch, index) for index in batch.tolist()]


class EndlessOrder(Sampler[list[tuple[int, int]]]):
    """The batches of `order` pass after pass, in epochs of `steps` steps, which begin and end within passes.

    As `TrainingOrder`: `epoch` and `start`, in steps, say where iteration begins; it has no end.
    """

    def __init__(self, order: TrainingOrder, steps: int) -> None:
        self.order, self.steps = order, steps
        self.seed, self.accumulate = order.seed, order.accumulate
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        self.order.epoch, self.order.start = divmod(self.epoch * self.steps + self.start, self.order.steps)
        while True:
            yield from self.order
            self.order.epoch, self.order.start = self.order.epoch + 1, 0


class EvaluationOrder(Sampler[list[tuple[int, int]]]):
    """One process's batches of (0, index): each image once over all `ranks`; index -1 evens the processes out."""

    def __init__(self, images: int, batch_size: int, rank: int = 0, ranks: int = 1) -> None:
        self.images, self.batch_size, self.rank, self.ranks = images, batch_size, rank, ranks
        self.share = -(-images // ranks)

    def __len__(self) -> int:
        return -(-self.share // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        own = list(range(self.rank, self.images, self.ranks))
        own += [-1] * (self.share - len(own))
        for start in range(0, self.share, self.batch_size):
            yield [(0, index) for index in own[start : start + self.batch_size]]


class TrainingLoader:
    """A loader that begins an epoch where `step`, the number of steps taken so far, says; it knows how long it was waited for.

    `batches`: a loader in the order of `order`, which is set before each iteration.
    """

    def __init__(self, batches: Iterable[Any], order: TrainingOrder | EndlessOrder, step: Callable[[], int]) -> None:
        self.batches, self.order, self.step = batches, order, step
        self.waited = 0.0  # seconds
        self._stream: Iterator[Any] | None = None

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Any]:
        # A generator: it begins with the first batch, and Lightning makes iterators before it knows where a run goes on.
        self.order.epoch, self.order.start = divmod(self.step(), self.order.steps)
        stream = getattr(self.batches, "dataset", None)
        if self._stream is None and (isinstance(stream, ShardStream) or isinstance(self.order, EndlessOrder)):
            if isinstance(stream, ShardStream):  # a run that goes on reads other images first than the run did at its start
                stream.seed = mix_seed(self.order.seed, self.step())
            self._stream = iter(self.batches)
        iterator = iter(self.batches) if self._stream is None else self._stream
        for _ in range(len(self.order) - self.order.start * self.order.accumulate):
            start = time.perf_counter()
            batch = next(iterator)
            self.waited += time.perf_counter() - start
            yield batch


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
