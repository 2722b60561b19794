"""Speed and memory of two networks, as ratios measured in one process."""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import dgnet
from dgnet._bench_config import BenchConfig as BenchConfig
from dgnet.errors import UsageError, reason
from dgnet.inference import fold_batch_norms
from dgnet.memory import keep_freed_memory

_CLASSES, _OBJECTS = 80, 8  # of a detector, and of each of its images
_SHORT_SIDE, _LONG_SIDE = 800, 1333  # pixels, of a detector's images (§6.3)
_ROUND_SECONDS = 0.5  # a round repeats short steps until it lasts this long


@dataclass(frozen=True)
class Measured:
    """One side's figures."""

    seconds: float  # of a step or forward pass, median over rounds
    quartiles: tuple[float, float]
    images_per_second: float
    peak_memory: int | None  # bytes, with parameters and optimiser state; None where the system does not tell
    first_call_seconds: float  # compilation included


@dataclass(frozen=True)
class BenchResult:
    """Both sides' figures. `ratio`: median over rounds of model / against in the same round; below 1 the model is faster."""

    task: str
    model: str
    against: str
    ratio: float
    ratio_quartiles: tuple[float, float]
    model_seconds: float
    against_seconds: float
    peak_memory_ratio: float | None
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


def bench(config: BenchConfig, show_progress: bool = True) -> BenchResult:
    """Measure two networks in alternating rounds. Raises UsageError where one cannot be built or run."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.allocator == "keep":
        keep_freed_memory()
    against = config.against or config.model.removeprefix("dg_")
    torch.manual_seed(config.seed)
    networks = dgnet.create_model(config.model, **config.model_kwargs), dgnet.create_model(against)
    own_size = _SHORT_SIDE if config.is_detection else int(networks[0].pretrained_cfg["input_size"][-1])  # type: ignore[index]
    image_size = config.image_size or own_size
    with tqdm(total=2 + config.rounds, disable=not show_progress, file=sys.stderr, unit="round", mininterval=1) as bar:
        bar.set_description(f"{config.model}: first call")
        ours = _Side(config, config.model, networks[0], image_size)
        bar.update()
        bar.set_description(f"{against}: first call")
        theirs = _Side(config, against, networks[1], image_size)
        bar.update()
        bar.set_description("alternating rounds")
        for number in range(config.rounds):
            for side in (ours, theirs) if number % 2 else (theirs, ours):
                side.run_round()
            bar.update()
    ratios = [one / other for one, other in zip(ours.seconds, theirs.seconds, strict=True)]
    model_side, against_side = ours.measured(), theirs.measured()
    known = model_side.peak_memory is not None and against_side.peak_memory is not None
    return BenchResult(
        task=config.task,
        model=config.model,
        against=against,
        ratio=statistics.median(ratios),
        ratio_quartiles=_quartiles(ratios),
        model_seconds=model_side.seconds,
        against_seconds=against_side.seconds,
        peak_memory_ratio=model_side.peak_memory / against_side.peak_memory if known else None,  # type: ignore[operator]
        batch_size=config.batch_size,
        image_size=image_size,
        device=config.device,
        dtype=config.dtype,
        compile=config.compile,
        cuda_graphs=config.cuda_graphs,
        channels_last=config.channels_last,
        rounds=config.rounds,
        threads=torch.get_num_threads(),
        allocator=config.allocator,
        model_kwargs=config.model_kwargs,
        model_side=model_side,
        against_side=against_side,
        hardware=describe_hardware(config.device),
        versions=versions(config.device),
    )


def format_bench(result: BenchResult) -> str:
    """The result as a table with hardware and versions."""
    form = f"compiled{' with CUDA graphs' if result.cuda_graphs else ''}" if result.compile else "eager"
    layout = "channels_last" if result.channels_last else "contiguous"
    size = f"{result.image_size}×{_width(result.task, result.image_size)}"
    lines = [
        f"{result.task}, batch {result.batch_size}, {size} pixels, {result.dtype}, {form},"
        f" {layout}, {result.rounds} alternating rounds",
        f"{'':24}{'ms':>10}{'quartiles':>20}{'images/s':>12}{'peak MiB':>12}{'first call s':>14}",
    ]
    for name, side in ((result.model, result.model_side), (result.against, result.against_side)):
        low, high = (1000 * value for value in side.quartiles)
        peak = "–" if side.peak_memory is None else f"{side.peak_memory / 2**20:,.0f}"
        lines.append(
            f"{name:24}{1000 * side.seconds:10.2f}{f'{low:.2f} … {high:.2f}':>20}{side.images_per_second:12.1f}{peak:>12}"
            f"{side.first_call_seconds:14.1f}"
        )
    low, high = result.ratio_quartiles
    memory = "" if result.peak_memory_ratio is None else f"; peak memory {result.peak_memory_ratio:.3f}"
    lines.append(f"{result.model} / {result.against}: time {result.ratio:.3f} (quartiles {low:.3f} … {high:.3f}){memory}")
    packages = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    lines.append(f"{result.hardware}; {packages}")
    return "\n".join(lines)


def _width(task: str, height: int) -> int:
    """Pixels of an image's width."""
    return round(height * _LONG_SIDE / _SHORT_SIDE) if task.startswith("detect") else height


class _Side:
    """A network with everything that a step of it needs, warmed up."""

    def __init__(self, config: BenchConfig, name: str, network: nn.Module, image_size: int) -> None:
        self.config = config
        self.device = torch.device(config.device)
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.image_size = image_size
        self.seconds: list[float] = []
        allocated = self._allocated()
        try:
            step = self._prepare(network)
            started = time.perf_counter()
            self._wait(step)
        except UsageError:
            raise
        except Exception as error:  # whatever a layer, the device or the compiler makes of it
            raise UsageError(f"{name} cannot run {config.task} here: {reason(error)}") from error
        self.first_call_seconds = time.perf_counter() - started
        self.step = step
        for _ in range(2):
            self._wait(step)
        started = time.perf_counter()
        self._wait(step)
        self.steps = max(1, round(_ROUND_SECONDS / (time.perf_counter() - started)))
        self.peak_memory = self._measure_peak(allocated)

    def _prepare(self, network: nn.Module) -> Callable[[], object]:
        if not self.config.is_training:
            network = fold_batch_norms(network, self.image_size)
        model, forward, loss = self._build_detector(network) if self.config.is_detection else self._build_classifier(network)
        self.lasting += [*model.parameters(), *model.buffers()]
        if not self.config.is_training:

            def infer() -> None:
                with torch.inference_mode():
                    forward()

            return infer
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
        self.lasting += list(model.parameters())  # SGD's momentum is as large as the parameters

        def train() -> None:
            with self._autocast():
                value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad()

        return train

    def _autocast(self) -> torch.autocast:
        dtype: torch.dtype = getattr(torch, self.config.dtype)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def _build_classifier(self, network: nn.Module) -> tuple[nn.Module, Callable[[], object], Callable[[], Tensor]]:
        """The network, a forward pass, and the loss of one."""
        config = self.config
        dtype = torch.float32 if config.is_training else getattr(torch, config.dtype)
        network = network.to(dtype).to(self.device).to(memory_format=self.memory_format).train(config.is_training)
        images = torch.randn(config.batch_size, 3, self.image_size, self.image_size, device=self.device, dtype=dtype)
        images = images.to(memory_format=self.memory_format)
        labels = torch.randint(int(network.num_classes), (config.batch_size,), device=self.device)  # type: ignore[arg-type]
        mode = "reduce-overhead" if config.cuda_graphs else None
        run: Callable[[Tensor], Tensor] = torch.compile(network, fullgraph=True, mode=mode) if config.compile else network
        self.lasting = [images]
        return network, lambda: run(images), lambda: F.cross_entropy(run(images).float(), labels)

    def _build_detector(self, network: nn.Module) -> tuple[nn.Module, Callable[[], object], Callable[[], Tensor]]:
        """As `_build_classifier`; weights stay float32."""
        from dgnet.detection import Detector

        config = self.config
        height, width = self.image_size, _width(config.task, self.image_size)
        network.to(memory_format=self.memory_format)
        detector = Detector(network, _CLASSES, short_side=height, long_side=width).to(self.device).train(config.is_training)
        images = [torch.rand(3, height, width, device=self.device) for _ in range(config.batch_size)]
        corners = torch.rand(_OBJECTS, 2) * torch.tensor([width, height]) / 2
        boxes = torch.cat([corners, corners + torch.tensor([width, height]) / 4], dim=1).to(self.device)
        labels = torch.randint(1, _CLASSES + 1, (_OBJECTS,), device=self.device)
        targets = [{"boxes": boxes, "labels": labels} for _ in images]
        self.lasting = [*images]

        def forward() -> object:
            with self._autocast():
                return detector(images)

        def loss() -> Tensor:
            return torch.stack([value.float() for value in detector(images, targets).values()]).sum()

        return detector, forward, loss

    def run_round(self) -> None:
        """Time a round of steps and keep the mean."""
        started = time.perf_counter()
        for _ in range(self.steps):
            self.step()
        self._synchronize()
        self.seconds.append((time.perf_counter() - started) / self.steps)

    def measured(self) -> Measured:
        """The figures of all rounds."""
        median = statistics.median(self.seconds)
        return Measured(
            seconds=median,
            quartiles=_quartiles(self.seconds),
            images_per_second=self.config.batch_size / median,
            peak_memory=self.peak_memory,
            first_call_seconds=self.first_call_seconds,
        )

    def _wait(self, step: Callable[[], object]) -> None:
        step()
        self._synchronize()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _measure_peak(self, allocated: int) -> int | None:
        """Bytes at the peak of a step: what it needs for a while, and what lasts."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._wait(self.step)
            return torch.cuda.max_memory_allocated(self.device) - allocated
        if self.device.type != "cpu" or not Path("/proc/self/clear_refs").exists():
            return None
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # free pages go back, so that using them again is seen
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
        before = _resident("VmRSS")
        self.step()
        return _resident("VmHWM") - before + sum(tensor.nbytes for tensor in self.lasting)


def _resident(field_name: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field_name)) * 1024


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def describe_hardware(device: str) -> str:
    """The processor or GPU that runs, in words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    flags = ""
    if cpuinfo.exists():
        lines = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        lines = {key.strip(): value.strip() for key, value in lines.items()}
        name = lines.get("model name", name)
        wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
        flags = ", ".join(flag.upper() for flag in wanted if flag in lines.get("flags", "").split())
    return f"{name}, {torch.get_num_threads()} threads" + (f", {flags}" if flags else "")


def versions(device: str) -> dict[str, str]:
    """Versions of what decides the speed."""
    import timm
    import torchvision

    found = {"dgnet": dgnet.__version__, "python": platform.python_version(), "torch": torch.__version__}
    found |= {"torchvision": torchvision.__version__, "timm": timm.__version__}
    return found | ({"cuda": torch.version.cuda} if device.startswith("cuda") and torch.version.cuda else {})
