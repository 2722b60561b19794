"""Accuracy against cost over threshold offsets: one checkpoint, many operating points."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from dgnet._cost import cost_model
from dgnet.analysis._figures import COLOURS, save_figure
from dgnet.data import EvaluationLoader, ImageDataset
from dgnet.errors import UsageError
from dgnet.evaluation import EvaluationMeters, Variant, find_image_size, run_pass
from dgnet.files import write_table, writing
from dgnet.inference import (
    find_threshold_offset,
    fold_batch_norms,
    set_sparse,
    set_threshold_offset,
    time_alternating,
)

OFFSETS = tuple(round(-0.5 + 0.1 * step, 1) for step in range(11))
"""From gates that are all open to gates that are all closed."""


@dataclass(frozen=True)
class SweepPoint:
    """What a network does with one threshold offset; shares lie in 0 to 1."""

    threshold_offset: float
    top1: float  # percent
    top5: float  # percent
    loss: float
    executed_multiply_adds: float  # of an image, mean
    executed_share: float  # of the dense cost
    closed_edges: float
    skippable_nodes: float
    distinct_wirings: int
    milliseconds: float  # for an image in the sparse mode at the batch size of the sweep, normalisations folded


@torch.no_grad()
def sweep_thresholds(
    network: nn.Module,
    dataset: ImageDataset,
    offsets: Sequence[float] = OFFSETS,
    batch_size: int = 128,
    workers: int = 0,
    device: str = "cpu",
    executor: str = "recommended",
) -> list[SweepPoint]:
    """Evaluate `network` on `dataset`, whose transform is set, at each offset; every image is loaded once.

    The network runs in the sparse mode, with `executor` (see `set_sparse`), and keeps its own offset. Times are medians over
    five rounds on the first batch, in which the offsets take turns.

    Raises UsageError for a network in which nothing can close, for no offsets, and for a size or count that makes no sense.
    """
    loader = EvaluationLoader(dataset, batch_size, workers)
    if not offsets:
        raise UsageError("--offsets needs one number or more")
    network = set_sparse(network.to(device).eval(), executor)
    for offset in offsets:
        with at_offset(network, offset):  # an offset that makes no sense is refused before anything runs
            pass
    size = find_image_size(loader)
    costs = cost_model(network, size)  # the same at every offset
    meters = {offset: EvaluationMeters(network, dataset.class_names, costs) for offset in offsets}
    first = loader.peek()[0].to(device, memory_format=torch.channels_last)
    seconds = time_offsets(network, first, offsets, device, executor)
    variants = [Variant(list(meters[offset]), partial(at_offset, network, offset)) for offset in meters]
    run_pass(network, loader, variants=variants, device=device, desc="sweep thresholds")
    points = []
    for offset, own in meters.items():
        found = own.evaluation()
        shared = {f.name: getattr(found, f.name) for f in fields(SweepPoint) if hasattr(found, f.name)}
        points.append(
            SweepPoint(
                threshold_offset=offset,
                executed_share=found.executed_multiply_adds / found.dense_multiply_adds,
                milliseconds=1000 * statistics.median(seconds[offset]) / len(first),
                **shared,
            )
        )
    return points


def time_offsets(
    network: nn.Module, images: Tensor, offsets: Sequence[float], device: str, executor: str
) -> dict[float, list[float]]:
    """Seconds of the sparse mode on `images`, normalisations folded, at each offset; the offsets take turns."""
    folded = fold_batch_norms(network, (images.shape[2], images.shape[3]))
    folded = set_sparse(folded.to(device, memory_format=torch.channels_last), executor)  # type: ignore[call-overload]

    def run(offset: float) -> object:
        return set_threshold_offset(folded, offset)(images)

    seconds = time_alternating({str(offset): partial(run, offset) for offset in offsets}, device=device)
    return {offset: seconds[str(offset)] for offset in offsets}


@contextmanager
def at_offset(network: nn.Module, offset: float) -> Iterator[None]:
    """Inside the `with` block edges and gates close under another threshold offset."""
    own = find_threshold_offset(network)
    set_threshold_offset(network, offset)
    try:
        yield
    finally:
        set_threshold_offset(network, own)


def format_sweep(points: Sequence[SweepPoint]) -> str:
    """One line an offset."""
    lines = [f"{'offset':>8}{'top-1 %':>10}{'executed M':>12}{'of dense':>10}{'ms/image':>10}{'skipped':>10}{'wirings':>10}"]
    for point in points:
        lines.append(
            f"{point.threshold_offset:8.3f}{point.top1:10.2f}{point.executed_multiply_adds / 1e6:12.2f}"
            f"{point.executed_share:10.3f}{point.milliseconds:10.3f}{point.skippable_nodes:10.3f}{point.distinct_wirings:10}"
        )
    return "\n".join(lines)


def save_sweep(points: Sequence[SweepPoint], folder: Path) -> list[Path]:
    """Write `threshold_sweep.csv`, `.png` and `.svg` into `folder`. Raises UsageError where it cannot be written."""
    with writing(folder):
        write_table(folder / "threshold_sweep.csv", [asdict(point) for point in points])
        return [folder / "threshold_sweep.csv", *save_figure(draw_sweep(points), folder, "threshold_sweep")]


def draw_sweep(points: Sequence[SweepPoint]) -> Figure:
    """Top-1 against executed multiply-adds and against time, a point an offset."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    measures = (
        ("executed multiply-adds an image, M", [point.executed_multiply_adds / 1e6 for point in points]),
        ("sparse mode, ms an image", [point.milliseconds for point in points]),
    )
    ordered = sorted(range(len(points)), key=lambda index: points[index].threshold_offset)
    for axes, (label, values) in zip(panels, measures, strict=True):
        axes.plot([values[i] for i in ordered], [points[i].top1 for i in ordered], "o-", color=COLOURS[0], markersize=4)
        labelled: list[tuple[float, float]] = []
        width = (max(values) - min(values)) or 1.0
        for i in ordered:
            place = ((values[i] - min(values)) / width, points[i].top1 / 100)
            if all(abs(place[0] - x) > 0.09 or abs(place[1] - y) > 0.09 for x, y in labelled):  # no label over another
                text = f"{points[i].threshold_offset:+.3g}"
                axes.annotate(text, (values[i], points[i].top1), (4, 5), textcoords="offset points", fontsize=8)
                labelled.append(place)
        axes.margins(0.12)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("top-1, %")
    figure.suptitle("a point a threshold offset", fontsize=10)
    return figure
