"""Measure two networks in alternating rounds."""

from __future__ import annotations

import statistics
import sys

import torch
from torch import nn
from tqdm import tqdm

import dgnet
from dgnet.bench._config import SHORT_SIDE, BenchConfig
from dgnet.bench._machine import describe_hardware, versions
from dgnet.bench._memory import allocated_bytes, measure_peak, measure_tensors
from dgnet.bench._result import BenchResult, Measured
from dgnet.bench._steps import prepare_step
from dgnet.errors import UsageError, reason
from dgnet.inference import quartiles, time_alternating, time_step
from dgnet.memory import keep_freed_memory

_ROUND_SECONDS = 0.5  # in each round a network's steps take about this long
_WARM_UP = 3  # steps between the first call and the measurement of memory


def bench(config: BenchConfig, show_progress: bool = True) -> BenchResult:
    """Measure two networks in alternating rounds. Raises UsageError if one cannot be built or run."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.allocator == "keep":
        keep_freed_memory()
    against = config.against or config.model.removeprefix("dg_")
    torch.manual_seed(config.seed)
    kwargs = {**config.model_kwargs, **({"dynamic": True} if config.dynamic else {})}
    networks = dgnet.create_model(config.model, **kwargs), dgnet.create_model(against)
    own_size = SHORT_SIDE if config.is_detection else int(networks[0].pretrained_cfg["input_size"][-1])
    image_size = config.image_size or own_size
    with tqdm(total=2 + config.rounds, disable=not show_progress, file=sys.stderr, unit="round", mininterval=1) as bar:
        sides = []
        for name, network in zip((config.model, against), networks, strict=True):
            bar.set_description(f"{name}: first call")
            sides.append(_Side(config, name, network, image_size))
            bar.update()
        bar.set_description("alternating rounds")
        steps = {"model": sides[0].step, "against": sides[1].step}
        seconds = time_alternating(steps, config.rounds, config.device, _ROUND_SECONDS, after_round=bar.update)
    ratios = [one / other for one, other in zip(seconds["model"], seconds["against"], strict=True)]
    model_side, against_side = (side.measured(times) for side, times in zip(sides, seconds.values(), strict=True))
    return BenchResult(
        task=config.task,
        model=config.model,
        against=against,
        ratio=statistics.median(ratios),
        ratio_quartiles=quartiles(ratios),
        model_seconds=model_side.seconds,
        against_seconds=against_side.seconds,
        peak_memory_ratio=_divide(model_side.peak_memory, against_side.peak_memory),
        peak_tensors_ratio=_divide(model_side.peak_tensors, against_side.peak_tensors),
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
        model_kwargs=kwargs,
        model_side=model_side,
        against_side=against_side,
        hardware=describe_hardware(config.device),
        versions=versions(config.device),
    )


class _Side:
    """One of the two networks as a step. Building it measures its first call and its memory; the rounds follow."""

    def __init__(self, config: BenchConfig, name: str, network: nn.Module, image_size: int) -> None:
        self.batch_size = config.batch_size
        device = torch.device(config.device)
        allocated = allocated_bytes(device)
        try:
            self.step, persistent = prepare_step(network, config, image_size)
            self.first_call_seconds = time_step(self.step, device)
        except UsageError as error:
            raise UsageError(f"{name} cannot run {config.task} here: {error}") from error
        except Exception as error:  # a layer, the device or the compiler may raise anything
            raise UsageError(f"{name} cannot run {config.task} here: {reason(error)}") from error
        time_step(self.step, device, repeats=_WARM_UP)
        self.peak_memory = measure_peak(self.step, device, persistent, allocated)
        self.peak_tensors = measure_tensors(self.step, device, persistent, self.peak_memory)

    def measured(self, seconds: list[float]) -> Measured:
        """The network's figures. `seconds`: of one step, for each round."""
        median = statistics.median(seconds)
        return Measured(
            seconds=median,
            quartiles=quartiles(seconds),
            images_per_second=self.batch_size / median,
            peak_memory=self.peak_memory,
            peak_tensors=self.peak_tensors,
            first_call_seconds=self.first_call_seconds,
        )


def _divide(one: int | None, other: int | None) -> float | None:
    return None if one is None or other is None else one / other
