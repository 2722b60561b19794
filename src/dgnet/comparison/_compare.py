"""Accuracy, executed multiply-adds and time of several networks on the same images, measured in one process."""

from __future__ import annotations

import itertools
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dgnet.bench import describe_hardware, versions
from dgnet.checkpoint import Described
from dgnet.comparison._sides import IMAGES, Figures, Side, find_forms, load_side
from dgnet.errors import UsageError, check_range
from dgnet.evaluation import announce
from dgnet.graph import find_stages
from dgnet.inference import time_alternating, time_step
from dgnet.paths import find_kind


@dataclass(frozen=True)
class Timing:
    """The speed of a network at one batch size, in its fastest form."""

    batch_size: int
    form: str  # "dense" or "sparse"
    images_per_second: float  # median over rounds
    images_per_second_range: tuple[float, float]
    ratio: float  # to the first network, in the same round: median; above 1 this one is faster
    ratio_range: tuple[float, float]
    p50_ms: float  # of single calls
    p95_ms: float


@dataclass(frozen=True)
class Compared:
    """The figures of one network."""

    name: str
    model: str
    kind: str  # "static" or "dynamic"
    image_size: tuple[int, int]
    parameters: int
    top1: float | None  # percent; None for a detector, as top5
    top5: float | None
    images: int
    dense_multiply_adds: int
    executed_multiply_adds: float  # mean over the images
    executed_percentiles: dict[str, float]
    timings: list[Timing]
    ap: float | None = None  # percent, averaged over IoU 0.50 to 0.95; None for a classifier, as ap50
    ap50: float | None = None

    @property
    def accuracy(self) -> float:
        """Top-1 of a classifier, AP of a detector: percent."""
        found = self.ap if self.top1 is None else self.top1
        assert found is not None
        return found


@dataclass(frozen=True)
class Comparison:
    """All figures, and under which conditions they were measured."""

    rows: list[Compared]
    failed: dict[str, str]  # name -> why it could not be loaded
    data: str
    device: str
    compile: bool
    rounds: int
    threads: int
    hardware: str
    versions: dict[str, str] = field(default_factory=dict)
    task: str = "classify"  # or "detect"


def compare(
    runs: Sequence[str | Path],
    data: str | None = None,
    batch_sizes: Sequence[int] = (1, 8, 64),
    rounds: int = 7,
    device: str = "cpu",
    compile: bool = True,
    allow_mixed_sizes: bool = False,
    data_root: str | None = None,
    images: str | None = None,
    evaluation_batch_size: int = 128,
    workers: int = 0,
) -> Comparison:
    """Compare networks, each in the form in which one would deploy it.

    `runs`: run folders, checkpoints, or names of published networks, each as "LABEL=RUN" if it is to have another name. The
    first is what the others' speed is a ratio of. `data`: images; by default those that the first run was evaluated on.

    Detectors are compared by average precision; `data` is an annotation file, and `images` the folder of its images. They are
    neither folded nor compiled, and multiply-adds are those of backbone and pyramid.

    Accuracy and multiply-adds come from one pass over all images. Normalisations are folded, and with `compile` networks are
    compiled. A network that can skip blocks is timed in its dense and in its sparse mode, and the faster one counts. All are
    timed in alternating rounds, so that a busy machine slows all alike.

    A run that cannot be loaded is left out and named in the result. Raises UsageError if none is left, if they have different
    classes or, unless `allow_mixed_sizes`, image sizes, and if there are fewer images than a batch needs.
    """
    check_range("--rounds", rounds, 1)
    for batch_size in batch_sizes:
        check_range("--batch-sizes", batch_size, 1)
    if not batch_sizes:
        raise UsageError("--batch-sizes is empty; give at least one, such as 1 8 64")
    sides, failed = _load(runs)
    _check_alike(sides, allow_mixed_sizes)
    source = data or sides[0].default_data()
    if images is not None and sides[0].task != "detect":
        raise UsageError("--images is for detectors; classifiers are compared on --data")
    root = images if sides[0].task == "detect" else data_root
    datasets = [side.open_data(source, root) for side in sides]
    if max(batch_sizes) > len(datasets[0]):
        raise UsageError(f"--batch-sizes {max(batch_sizes)} is more than the {len(datasets[0]):,} images; use smaller batches")
    announce(datasets[0])
    evaluations = []
    for side, dataset in zip(sides, datasets, strict=True):
        print(f"evaluating {side.name}", file=sys.stderr)
        evaluations.append(side.evaluate(dataset, evaluation_batch_size, workers, device))
    timings = _time(sides, datasets, batch_sizes, rounds, device, compile)
    rows = [_row(side, found, timings[side.name]) for side, found in zip(sides, evaluations, strict=True)]
    about = describe_hardware(device), versions(device)
    task = sides[0].task
    is_compiled = compile and task == "classify"
    return Comparison(rows, failed, source, device, is_compiled, rounds, torch.get_num_threads(), *about, task)


def _load(runs: Sequence[str | Path]) -> tuple[list[Side], dict[str, str]]:
    """The networks that can be loaded, under different names, and why the others cannot."""
    sides: list[Side] = []
    failed: dict[str, str] = {}
    for run in runs:
        try:
            label, place = _split_label(str(run))
            side = load_side(label, place)
        except UsageError as error:
            failed[str(run)] = str(error)
            continue
        trade_off = find_trade_off(side.checkpoint)
        name = str(place) if Path(place).name == place and "." in place else side.checkpoint.model
        sides.append(side.named(label or (name if not trade_off or name == place else f"{name}, {trade_off}")))
    if not sides:
        raise UsageError(f"no network is left to compare: {next(iter(failed.values()), 'name some runs')}")
    counts, seen = Counter(side.name for side in sides), Counter[str]()
    for index, side in enumerate(sides):
        seen[side.name] += 1
        if counts[side.name] > 1:
            sides[index] = side.named(f"{side.name} ({seen[side.name]})")
    return sides, failed


def _split_label(run: str) -> tuple[str, str]:
    """Label, "" for none, and place of "LABEL=RUN" or "RUN". Both may have "=" in them: the longest existing place counts."""
    for start in [0, *(index + 1 for index, letter in enumerate(run) if letter == "=")]:
        if run[start:] and find_kind(run[start:]) is not None:
            return run[: max(start - 1, 0)], run[start:]
    label, _, place = run.rpartition("=")  # a published network
    return label, place


def find_trade_off(checkpoint: Described) -> str:
    """What a run was trained to, in words; "" if that is accuracy alone."""
    config = checkpoint.config
    if config.get("search_epochs"):
        return f"latency target {config['latency_target']:g}"
    return "" if config.get("budget") is None else f"budget {config['budget']}"


def _check_alike(sides: Sequence[Side], allow_mixed_sizes: bool) -> None:
    first = sides[0]
    for side in sides[1:]:
        if side.task != first.task:
            detector, classifier = (side, first) if side.task == "detect" else (first, side)
            raise UsageError(
                f"{detector.name} is a detector and {classifier.name} a classifier; compare networks that do the same task"
            )
        if side.checkpoint.class_names != first.checkpoint.class_names:
            raise UsageError(
                f"{side.name} and {first.name} were trained for different classes ({len(side.checkpoint.class_names)} and"
                f" {len(first.checkpoint.class_names)}); compare networks of the same ones"
            )
        if side.size != first.size and not allow_mixed_sizes:
            sizes = " and ".join("×".join(map(str, size)) for size in (side.size, first.size))
            raise UsageError(
                f"{side.name} and {first.name} take images of different sizes ({sizes}); compare them with --allow-mixed-sizes"
            )


def _time(
    sides: Sequence[Side],
    datasets: Sequence[Any],
    batch_sizes: Sequence[int],
    rounds: int,
    device: str,
    compile: bool,
) -> dict[str, list[Timing]]:
    """For each side its timings, one for each batch size."""
    found: dict[str, list[Timing]] = {side.name: [] for side in sides}
    count = IMAGES[sides[0].task]
    images = [
        side.read_images(dataset, max(count, *batch_sizes), device) for side, dataset in zip(sides, datasets, strict=True)
    ]
    for batch_size in tqdm(batch_sizes, desc="batch sizes", file=sys.stderr):
        steps: dict[str, Callable[[], object]] = {}
        keys: dict[str, dict[str, str]] = {side.name: {} for side in sides}  # name -> form -> key of its step
        for side, own in zip(sides, images, strict=True):
            batches = side.split(own, batch_size)
            for form in find_forms(side):
                call, turn = side.deploy(form, batch_size, compile, device), itertools.cycle(batches)
                key = keys[side.name][form] = f"{side.name}, {form}"
                steps[key] = lambda call=call, turn=turn: call(next(turn))  # type: ignore[misc]
        seconds = time_alternating(steps, rounds, device)
        medians = {key: statistics.median(times) for key, times in seconds.items()}
        fastest = {name: min(forms, key=lambda form, forms=forms: medians[forms[form]]) for name, forms in keys.items()}  # type: ignore[misc]
        calls: dict[str, list[float]] = {side.name: [] for side in sides}
        for _ in range(max(count // batch_size, 1)):
            for name, form in fastest.items():
                calls[name].append(1000 * time_step(steps[keys[name][form]], device))
        first = seconds[keys[sides[0].name][fastest[sides[0].name]]]
        for name, form in fastest.items():
            times = seconds[keys[name][form]]
            ratios = [one / other for one, other in zip(first, times, strict=True)]
            p50, p95 = (float(value) for value in np.percentile(calls[name], (50, 95)))
            found[name].append(
                Timing(
                    batch_size,
                    form,
                    batch_size / statistics.median(times),
                    (batch_size / max(times), batch_size / min(times)),
                    statistics.median(ratios),
                    (min(ratios), max(ratios)),
                    p50,
                    p95,
                )
            )
    return found


def _row(side: Side, found: Figures, timings: list[Timing]) -> Compared:
    return Compared(
        name=side.name,
        model=side.checkpoint.model,
        kind="dynamic" if find_stages(side.network) else "static",
        image_size=side.size,
        parameters=sum(parameter.numel() for parameter in side.network.parameters()),
        timings=timings,
        **asdict(found),
    )
