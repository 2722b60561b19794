"""Compare a converted network with the static one over a data set."""

from __future__ import annotations

import torch
from torch import nn

from dgnet.data import EvaluationLoader, ImageDataset
from dgnet.evaluation._pass import Batch, run_pass
from dgnet.models import Agreement, Comparison


class _Compared:
    """A meter: what the static network predicts for each batch, beside the outputs of the converted one."""

    needs_connectivity = False

    def __init__(self, static: nn.Module) -> None:
        self.static = static
        self.comparison = Comparison()

    def update(self, batch: Batch) -> None:
        self.comparison.add(self.static(batch.inputs), batch.outputs, batch.targets)


@torch.no_grad()
def compare_networks(
    static: nn.Module,
    converted: nn.Module,
    dataset: ImageDataset,
    batch_size: int = 128,
    workers: int = 0,
    device: str = "cpu",
) -> Agreement:
    """Run both networks on the images of `dataset`, whose transform is set. They stay on `device`, in evaluation mode.

    stderr shows the progress. Raises UsageError for an empty data set.
    """
    compared = _Compared(static.to(device).eval())
    loader = EvaluationLoader(dataset, batch_size, workers)
    run_pass(converted, loader, [compared], device=device, desc="compare with the static network")
    return compared.comparison.result()
