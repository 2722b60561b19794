"""One pass of a network over a loader; meters take from each batch what they count.

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
    """What a network made of a batch."""

    inputs: Any  # images, (B, C, H, W), or a list of (C, H, W)
    targets: Any  # labels, (B,), or what else the loader gives
    outputs: Any
    record: Record | None = None  # of this forward; None where no meter needs it, and for a static network
    indices: Sequence[int] = ()  # where the images stand in the data set, where the loader says it
    extras: Sequence[Any] = ()  # what the loader gives beside inputs and targets

    @cached_property
    def adjacency(self) -> list[Tensor]:
        """For each stage the weights as aggregated, (B, N, N), on the CPU; none for a static network."""
        return [] if self.record is None else [matrix.cpu() for matrix in self.record.adjacency]


class Meter(Protocol):
    """Accumulates figures over batches."""

    needs_connectivity: bool
    """Whether it reads a batch's record; a static network has none."""

    def update(self, batch: Batch) -> None:
        """Add a batch."""


@dataclass(frozen=True)
class Variant:
    """A further run of the network on each batch, inside a context of its own, with its own meters."""

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
    """Run `network` once and show every meter the batch; connectivity is recorded if a meter needs it.

    `run`: what calls the network, by default itself. The others: see `Batch`.
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
    """Run `network` on every batch of `loader`, each loaded once: first for `meters`, if there are any, then for each variant.

    A variant's context is entered for each batch, after the runs before it. The network is left on `device`, in evaluation
    mode; images and labels are moved there. Progress is shown on stderr under the name `desc`.
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
    """A tensor, or a list of tensors, on `device`; anything else as it is."""
    if isinstance(value, list):
        return [to_device(item, device) for item in value]
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def find_image_size(loader: EvaluationLoader) -> tuple[int, int]:
    """Height and width of the images that a loader gives, by its first batch. All processes must call it.

    Raises UsageError where there are no images.
    """
    content = loader.peek()
    sizes = gather(None if content is None else tuple(content[0].shape[2:]))
    for size in sizes:
        if size is not None:
            return size
    raise UsageError("the data set holds no images; name another with --data")
