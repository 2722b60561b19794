"""The order of images in training, and a loader that continues where a run was interrupted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from dgnet.data import ShardStream, mix_seed


class TrainingOrder(Sampler[list[tuple[int, ...]]]):
    """One process's batches of (epoch, index) in an epoch. The order is new in each epoch: a function of (`seed`, epoch).

    In an epoch no image appears twice. Fewer images than a step has are left out, different ones in each epoch.

    With `repeats` above 1, as in timm's `RepeatAugSampler`: an epoch has as many steps, of fewer images, each of them `repeats`
    times. Its copies follow each other and go to different processes. The items are (epoch, index, copy).

    `batch_size`: images in a step, over `ranks` processes and `accumulate` batches of each. `epoch` and `start`, in steps:
    where iteration begins.
    """

    def __init__(
        self, images: int, batch_size: int, seed: int, rank: int = 0, ranks: int = 1, accumulate: int = 1, repeats: int = 1
    ) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.rank, self.ranks, self.accumulate, self.repeats = rank, ranks, accumulate, repeats
        self.steps = images // batch_size
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def indices(self) -> Tensor:
        """The indices of each batch from step `start` on, (batches, images of a batch)."""
        return self._divide(self.shuffle(torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))))

    def copies(self) -> Tensor:
        """For each of `indices` the number of the copy, from 0 on."""
        return self._divide(torch.arange(self.steps * self.batch_size) % self.repeats)

    def _divide(self, order: Tensor) -> Tensor:
        """This process's part of an epoch from step `start` on: (steps × `batch_size`,) -> (batches, images of a batch)."""
        if self.repeats == 1:
            own = order.view(self.steps, self.accumulate, self.ranks, -1)[self.start :, :, self.rank]
        else:
            own = order.view(self.steps, self.accumulate, -1, self.ranks)[self.start :, ..., self.rank]
        return own.reshape(-1, own.shape[-1])

    def shuffle(self, generator: torch.Generator) -> Tensor:
        """The indices of an epoch step by step, (steps × `batch_size`,)."""
        order = torch.randperm(self.images, generator=generator)
        return order.repeat_interleave(self.repeats)[: self.steps * self.batch_size]

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        if self.repeats == 1:
            for batch in self.indices():
                yield [(self.epoch, index) for index in batch.tolist()]
            return
        for batch, copies in zip(self.indices(), self.copies(), strict=True):
            yield [(self.epoch, *item) for item in zip(batch.tolist(), copies.tolist(), strict=True)]


class EndlessOrder(Sampler[list[tuple[int, ...]]]):
    """The batches of `order`, pass after pass without end, in epochs of `steps` steps. An epoch may begin or end inside a pass.

    `epoch` and `start`, in steps: where iteration begins, as in `TrainingOrder`.
    """

    def __init__(self, order: TrainingOrder, steps: int) -> None:
        self.order, self.steps = order, steps
        self.seed, self.accumulate = order.seed, order.accumulate
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        self.order.epoch, self.order.start = divmod(self.epoch * self.steps + self.start, self.order.steps)
        while True:
            yield from self.order
            self.order.epoch, self.order.start = self.order.epoch + 1, 0


class TrainingLoader:
    """A loader that begins after `step()` steps, in the middle of an epoch too, and measures the time spent waiting for data.

    `batches`: a loader that follows `order`, whose position is set before each iteration. `step`: returns the number of steps
    taken so far. `waited`: seconds spent waiting for batches.
    """

    def __init__(self, batches: Iterable[Any], order: TrainingOrder | EndlessOrder, step: Callable[[], int]) -> None:
        self.batches, self.order, self.step = batches, order, step
        self.waited = 0.0  # seconds
        self._stream: Iterator[Any] | None = None

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Any]:
        # This is a generator, so this line runs with the first batch. Lightning makes iterators before it restores the step.
        self.order.epoch, self.order.start = divmod(self.step(), self.order.steps)
        stream = getattr(self.batches, "dataset", None)
        if self._stream is None and (isinstance(stream, ShardStream) or isinstance(self.order, EndlessOrder)):
            if isinstance(stream, ShardStream):  # a resumed run does not read the images of the run's start again
                stream.seed = mix_seed(self.order.seed, self.step())
            self._stream = iter(self.batches)
        iterator = iter(self.batches) if self._stream is None else self._stream
        for _ in range(len(self.order) - self.order.start * self.order.accumulate):
            start = time.perf_counter()
            batch = next(iterator)
            self.waited += time.perf_counter() - start
            yield batch
