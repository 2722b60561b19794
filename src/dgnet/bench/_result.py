"""The figures of a measurement, and a table of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dgnet.bench._config import image_width


@dataclass(frozen=True)
class Measured:
    """The figures of one network."""

    seconds: float  # of a step or forward pass, median over rounds
    quartiles: tuple[float, float]
    images_per_second: float
    peak_memory: int | None  # bytes, with parameters and optimiser state; None if the system does not report it
    peak_tensors: int | None  # the part of it that tensors occupy; None if the device does not report it
    first_call_seconds: float  # compilation included


@dataclass(frozen=True)
class BenchResult:
    """The figures of both networks. `ratio`: median over rounds of model time / other time; below 1 the model is faster."""

    task: str
    model: str
    against: str
    ratio: float
    ratio_quartiles: tuple[float, float]
    model_seconds: float
    against_seconds: float
    peak_memory_ratio: float | None
    peak_tensors_ratio: float | None
    batch_size: int
    image_size: int
    device: str
    dtype: str
    compile: bool
    cuda_graphs: bool
    channels_last: bool
    rounds: int
    threads: int
    allocator: str
    model_kwargs: dict[str, Any]
    model_side: Measured
    against_side: Measured
    hardware: str
    versions: dict[str, str]


def format_bench(result: BenchResult) -> str:
    """The result as a text table, with hardware and versions."""
    form = f"compiled{' with CUDA graphs' if result.cuda_graphs else ''}" if result.compile else "eager"
    layout = "channels_last" if result.channels_last else "contiguous"
    size = f"{result.image_size}×{image_width(result.task, result.image_size)}"
    model = f"{result.model} (dynamic)" if result.model_kwargs.get("dynamic") else result.model
    width = max(24, len(model) + 2, len(result.against) + 2)
    lines = [
        f"{result.task}, batch {result.batch_size}, {size} pixels, {result.dtype}, {form},"
        f" {layout}, {result.rounds} alternating rounds",
        f"{'':{width}}{'ms':>10}{'quartiles':>20}{'images/s':>12}{'peak MiB':>12}{'tensors MiB':>13}{'first call s':>14}",
    ]
    for name, side in ((model, result.model_side), (result.against, result.against_side)):
        low, high = (1000 * value for value in side.quartiles)
        peak, tensors = ("–" if value is None else f"{value / 2**20:,.0f}" for value in (side.peak_memory, side.peak_tensors))
        lines.append(
            f"{name:{width}}{1000 * side.seconds:10.2f}{f'{low:.2f} … {high:.2f}':>20}{side.images_per_second:12.1f}{peak:>12}"
            f"{tensors:>13}{side.first_call_seconds:14.1f}"
        )
    low, high = result.ratio_quartiles
    memory = "" if result.peak_memory_ratio is None else f"; peak memory {result.peak_memory_ratio:.3f}"
    memory += "" if result.peak_tensors_ratio is None else f", of tensors {result.peak_tensors_ratio:.3f}"
    lines.append(f"{model} / {result.against}: time {result.ratio:.3f} (quartiles {low:.3f} … {high:.3f}){memory}")
    packages = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    lines.append(f"{result.hardware}; {packages}")
    return "\n".join(lines)
