"""Steps to be timed: a training step or a forward pass of a network as a classifier, or as a detector's backbone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgnet.bench._config import BenchConfig, image_width
from dgnet.graph import compile_options
from dgnet.inference import Step, fold_batch_norms
from dgnet.models import find_channels

_CLASSES, _OBJECTS = 80, 8  # of a detector, and of each of its images


@dataclass
class _Task:
    """A network on its device, with random images."""

    model: nn.Module
    images: list[Tensor]
    forward: Step
    loss: Callable[[], Tensor]


def prepare_step(network: nn.Module, config: BenchConfig, image_size: int) -> tuple[Step, list[Tensor]]:
    """The step, and the tensors that exist before and after it.

    Parameters are listed twice in training: SGD's momentum is as large as they are.
    """
    if not config.is_training:
        network = fold_batch_norms(network, image_size)
    task = (_build_detector if config.is_detection else _build_classifier)(network, config, image_size)
    parameters = list(task.model.parameters())
    persistent = [*task.images, *parameters, *task.model.buffers()]
    if not config.is_training:

        def infer() -> None:
            with torch.inference_mode():
                task.forward()

        return infer, persistent
    optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9)

    def train() -> None:
        with _autocast(config):
            value = task.loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train, persistent + parameters


def _build_classifier(network: nn.Module, config: BenchConfig, image_size: int) -> _Task:
    device = torch.device(config.device)
    dtype = torch.float32 if config.is_training else _find_dtype(config)
    network = network.to(dtype).to(device).to(memory_format=_memory_format(config)).train(config.is_training)
    images = torch.randn(config.batch_size, find_channels(network), image_size, image_size, device=device, dtype=dtype)
    images = images.to(memory_format=_memory_format(config))
    labels = torch.randint(int(network.num_classes), (config.batch_size,), device=device)  # type: ignore[arg-type]
    run: Callable[[Tensor], Tensor] = network
    if config.compile:
        options = compile_options(network, device.type) if config.is_training else {}
        options |= {"triton.cudagraphs": True} if config.cuda_graphs else {}
        run = torch.compile(network, fullgraph=True, options=options)
    return _Task(network, [images], lambda: run(images), lambda: F.cross_entropy(run(images).float(), labels))


def _build_detector(network: nn.Module, config: BenchConfig, image_size: int) -> _Task:
    """A detector with the network as its backbone. Weights stay in float32."""
    from dgnet.detection import Detector

    device = torch.device(config.device)
    height, width = image_size, image_width(config.task, image_size)
    network.to(memory_format=_memory_format(config))
    detector = Detector(network, _CLASSES, short_side=height, long_side=width).to(device).train(config.is_training)
    images = [torch.rand(3, height, width, device=device) for _ in range(config.batch_size)]
    corners = torch.rand(_OBJECTS, 2) * torch.tensor([width, height]) / 2
    boxes = torch.cat([corners, corners + torch.tensor([width, height]) / 4], dim=1).to(device)
    labels = torch.randint(1, _CLASSES + 1, (_OBJECTS,), device=device)
    targets = [{"boxes": boxes, "labels": labels} for _ in images]

    def forward() -> object:
        with _autocast(config):
            return detector(images)

    def loss() -> Tensor:
        return torch.stack([value.float() for value in detector(images, targets).values()]).sum()

    return _Task(detector, images, forward, loss)


def _memory_format(config: BenchConfig) -> torch.memory_format:
    return torch.channels_last if config.channels_last else torch.contiguous_format


def _autocast(config: BenchConfig) -> torch.autocast:
    dtype = _find_dtype(config)
    return torch.autocast(torch.device(config.device).type, dtype, enabled=dtype != torch.float32)


def _find_dtype(config: BenchConfig) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, config.dtype)
    return dtype
