"""One pass of a network over a loader, with meters that receive each batch.

Letters: B batch, N nodes of a stage.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dgnet.data import EvaluationLoader
from dgnet.errors import UsageError
from dgnet.evaluation._ranks import find_ranks, gather
from dgnet.graph import Record, find_stages, record_connectivity


@dataclass(frozen=True)
class Batch:
    """A batch, and the network's outputs for it."""

    inputs: Any  # images, (B, C, H, W), or a list of (C, H, W)
    targets: Any  # labels, (B,), or other targets of the loader
    outputs: Any  # what the network returned
    record: Record | None = None  # of this forward pass; None if no meter needs it, and for a static network
    indices: Sequence[int] = ()  # positions of the images in the data set; empty if the loader does not give them
    extras: Sequence[Any] = ()  # further items of the loader, after inputs and targets

    @cached_property
    def adjacency(self) -> list[Tensor]:
        """For each stage the weights as aggregated, (B, N, N), on the CPU; an empty list without a record."""
        return [] if self.record is None else [matrix.cpu() for matrix in self.record.adjacency]


class Meter(Protocol):
    """Accumulates figures over batches."""

    needs_connectivity: bool
    """Whether it reads the record of a batch. (For a static network the record is None.)"""

    def update(self, batch: Batch) -> None:
        """Add a batch."""


@dataclass(frozen=True)
class Variant:
    """A further run of the network on each batch, with its own meters, inside a `with` block of `context()`."""

    meters: Sequence[Meter]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def observe_batch(
    network: nn.Module,
    inputs: Any,
    targets: Any,
    meters: Sequence[Meter],
    *,
    run: Callable[[Any], Any] | None = None,
    indices: Sequence[int] = (),
    extras: Sequence[Any] = (),
) -> None:
    """Run `network` on one batch and update every meter. Connectivity is recorded if a meter needs it.

    `run`: called with `inputs` instead of `network`, if it is given. `targets`, `indices`, `extras`: see `Batch`.
    """
    is_recorded = any(meter.needs_connectivity for meter in meters) and bool(find_stages(network))
    with record_connectivity(network) if is_recorded else nullcontext() as record:
        outputs = (run or network)(inputs)
    batch = Batch(inputs, targets, outputs, record, indices, extras)
    for meter in meters:
        meter.update(batch)


@torch.no_grad()
def run_pass(
    network: nn.Module,
    loader: EvaluationLoader,
    meters: Sequence[Meter] = (),
    *,
    device: str = "cpu",
    desc: str = "evaluate",
    variants: Sequence[Variant] = (),
) -> None:
    """Run `network` on every batch of `loader`: first for `meters`, if there are any, then for each of `variants`.

    Each batch is loaded once. A variant's context is entered for each batch, after the runs before it. Images and targets are
    moved to `device`; the network stays there, in evaluation mode. stderr shows the progress, labelled `desc`.
    """
    network = network.to(device).eval()
    runs = [Variant(meters), *variants] if meters else variants
    is_silent = find_ranks()[0] > 0
    for indices, content in tqdm(loader, desc=desc, unit="batch", file=sys.stderr, disable=is_silent):
        inputs, targets, *extras = content
        inputs, targets = to_device(inputs, device), to_device(targets, device)
        for variant in runs:
            with variant.context():
                observe_batch(network, inputs, targets, variant.meters, indices=indices, extras=extras)


def to_device(value: Any, device: str) -> Any:
    """Move a tensor, or the tensors in a list, to `device`; anything else is returned as it is."""
    if isinstance(value, list):
        return [to_device(item, device) for item in value]
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def find_image_size(loader: EvaluationLoader) -> tuple[int, int]:
    """Height and width of the images in the first batch of any process. All processes must call it.

    Raises UsageError if there are no images.
    """
    content = loader.peek()
    sizes = gather(None if content is None else tuple(content[0].shape[2:]))
    for size in sizes:
        if size is not None:
            return size
    raise UsageError("the data set holds no images; name another with --data")
