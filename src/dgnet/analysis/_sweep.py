"""Accuracy against cost over threshold offsets: several operating points of one checkpoint."""

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
"""-0.5 (all gates open) to +0.5 (all gates closed) in steps of 0.1."""


@dataclass(frozen=True)
class SweepPoint:
    """The results of a network at one threshold offset; shares are in [0, 1]."""

    threshold_offset: float
    top1: float  # percent
    top5: float  # percent
    loss: float
    executed_multiply_adds: float  # mean per image
    executed_share: float  # of the dense cost
    closed_edges: float
    skippable_nodes: float
    distinct_wirings: int
    milliseconds: float  # per image, in the sparse mode with normalisations folded, at the sweep's batch size


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
    """Evaluate `network` on `dataset`, whose transform is set, at each offset. Every image is loaded once.

    The network runs in the sparse mode with `executor` (see `set_sparse`); its own offset is restored at the end. Times are
    medians over five rounds on the first batch; in each round all offsets are measured.

    Raises UsageError for a network in which nothing can close, for an empty list of offsets, and for invalid sizes or counts.
    """
    loader = EvaluationLoader(dataset, batch_size, workers)
    if not offsets:
        raise UsageError("--offsets needs one number or more")
    network = set_sparse(network.to(device).eval(), executor)
    for offset in offsets:
        with at_offset(network, offset):  # raises UsageError for an invalid offset before anything runs
            pass
    size = find_image_size(loader)
    costs = cost_model(network, size)  # does not depend on the offset
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
    """Seconds of the sparse mode on `images`, with normalisations folded: one value per round for each offset."""
    folded = fold_batch_norms(network, (images.shape[2], images.shape[3]))
    folded = set_sparse(folded.to(device, memory_format=torch.channels_last), executor)  # type: ignore[call-overload]

    def run(offset: float) -> object:
        return set_threshold_offset(folded, offset)(images)

    seconds = time_alternating({str(offset): partial(run, offset) for offset in offsets}, device=device)
    return {offset: seconds[str(offset)] for offset in offsets}


@contextmanager
def at_offset(network: nn.Module, offset: float) -> Iterator[None]:
    """Inside the `with` block, edges and gates use another threshold offset. Raises UsageError if nothing can close."""
    own = find_threshold_offset(network)
    set_threshold_offset(network, offset)
    try:
        yield
    finally:
        set_threshold_offset(network, own)


def format_sweep(points: Sequence[SweepPoint]) -> str:
    """A table with one line for each offset."""
    lines = [f"{'offset':>8}{'top-1 %':>10}{'executed M':>12}{'of dense':>10}{'ms/image':>10}{'skipped':>10}{'wirings':>10}"]
    for point in points:
        lines.append(
            f"{point.threshold_offset:8.3f}{point.top1:10.2f}{point.executed_multiply_adds / 1e6:12.2f}"
            f"{point.executed_share:10.3f}{point.milliseconds:10.3f}{point.skippable_nodes:10.3f}{point.distinct_wirings:10}"
        )
    return "\n".join(lines)


def save_sweep(points: Sequence[SweepPoint], folder: Path) -> list[Path]:
    """Write `threshold_sweep.csv`, `.png` and `.svg` into `folder`. Raises UsageError if it cannot be written."""
    with writing(folder):
        write_table(folder / "threshold_sweep.csv", [asdict(point) for point in points])
        return [folder / "threshold_sweep.csv", *save_figure(draw_sweep(points), folder, "threshold_sweep")]


def draw_sweep(points: Sequence[SweepPoint]) -> Figure:
    """Top-1 against executed multiply-adds and against time, one point for each offset."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    measures = (
        ("executed multiply-adds per image, M", [point.executed_multiply_adds / 1e6 for point in points]),
        ("sparse mode, ms per image", [point.milliseconds for point in points]),
    )
    ordered = sorted(range(len(points)), key=lambda index: points[index].threshold_offset)
    for axes, (label, values) in zip(panels, measures, strict=True):
        axes.plot([values[i] for i in ordered], [points[i].top1 for i in ordered], "o-", color=COLOURS[0], markersize=4)
        labelled: list[tuple[float, float]] = []
        width = (max(values) - min(values)) or 1.0
        for i in ordered:
            place = ((values[i] - min(values)) / width, points[i].top1 / 100)
            if all(abs(place[0] - x) > 0.09 or abs(place[1] - y) > 0.09 for x, y in labelled):  # labels must not overlap
                text = f"{points[i].threshold_offset:+.3g}"
                axes.annotate(text, (values[i], points[i].top1), (4, 5), textcoords="offset points", fontsize=8)
                labelled.append(place)
        axes.margins(0.12)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("top-1, %")
    figure.suptitle("one point for each threshold offset", fontsize=10)
    return figure
