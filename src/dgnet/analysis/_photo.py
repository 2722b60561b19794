"""A network on one photo: prediction, path, executed cost, and time in the dense and the sparse mode."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dgnet._cost import cost_model
from dgnet.checkpoint import Checkpoint
from dgnet.data import decode, read_image
from dgnet.errors import BadImageError, reason
from dgnet.graph import find_stages, record_connectivity
from dgnet.inference import MODES, deploy, set_sparse, time_alternating

TOP = 5
"""Number of classes shown."""


@dataclass(frozen=True)
class PhotoReport:
    """The results of a network on one photo."""

    classes: list[tuple[str, float]]  # names and probabilities, the most probable first
    adjacency: list[Tensor]  # for each stage (N, N), 0 where an edge is closed
    ran: list[Tensor]  # for each stage whether each node ran, (N,) bool
    executed: int  # multiply-adds
    dense: int  # multiply-adds with every edge open
    milliseconds: dict[str, float]  # for the dense and the sparse mode at batch 1: median over alternating rounds


class PhotoInspector:
    """A checkpoint's network, ready for one photo at a time.

    Raises UsageError for a static network.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu") -> None:
        network = checkpoint.build_dynamic().to(device)
        self.checkpoint, self.device = checkpoint, device
        self.network = set_sparse(network)
        self.masks = [stage.topology.mask for stage in find_stages(network)]
        size = checkpoint.preprocessing.image_size
        self.costs = cost_model(network, size)
        self.runs = {mode: deploy(network, size, mode, batch_size=1, compile=False) for mode in MODES}
        self.transform = checkpoint.preprocessing.evaluation_transform()

    @torch.no_grad()
    def inspect(self, image: Image.Image) -> PhotoReport:
        """Run the network on an RGB image: once to record its path, then several times to measure its speed."""
        batch = self.transform(image)[None].to(self.device)
        with record_connectivity(self.network) as record:
            probabilities = self.network(batch)[0].float().softmax(0).cpu()
        top = probabilities.topk(min(TOP, len(probabilities)))
        names = self.checkpoint.class_names
        batch = batch.contiguous(memory_format=torch.channels_last)
        steps = {mode: partial(run, batch) for mode, run in self.runs.items()}
        seconds = time_alternating(steps, device=self.device)
        return PhotoReport(
            classes=[(names[index], value) for index, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)],
            adjacency=[matrix[0].cpu() for matrix in record.adjacency],
            ran=[ran[0].cpu() for ran in record.ran],
            executed=round(float(self.costs.executed_in(record)[0])),
            dense=self.costs.dense,
            milliseconds={mode: 1000 * statistics.median(times) for mode, times in seconds.items()},
        )


def open_photo(path: Path, max_megabytes: float) -> Image.Image:
    """Read an RGB image from a file.

    Raises BadImageError, with the file's name but not its folder, for a file that is larger than the limit, is not an image,
    or does not decode.
    """
    try:
        mebibytes = path.stat().st_size / 2**20
    except OSError as error:
        raise BadImageError(f"{path.name} cannot be read: {reason(error)}") from None
    if mebibytes > max_megabytes:
        raise BadImageError(f"{path.name} has {mebibytes:.1f} MiB, the limit is {max_megabytes:g} MiB; use a smaller file")
    return decode(read_image(path), path.name)
