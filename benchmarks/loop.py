"""Time that a run's loop (Lightning, metrics, checkpoints, progress) adds to a training step, against a bare PyTorch loop.

    python benchmarks/loop.py [--model dg_resnet20] [--batch-size 64] [--cuda]

Both loops train a tiny network on the same batches with the same optimiser and schedule, in one process, in alternating
segments. The time added per step does not depend on the network, and with a tiny one it stands out from the noise. It is then
given as a share of a bare step of the network named by --model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from PIL import Image
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from tqdm import tqdm

import dgnet
from dgnet.bench import describe_hardware, versions
from dgnet.data import ImageDataset
from dgnet.training import TrainConfig
from dgnet.training._module import Classifier, ImageDataModule, build_parameter_groups
from dgnet.training._progress import Progress
from dgnet.training._train import prepare_data
from dgnet.training._trainer import build_trainer, quiet_lightning


class Noise(ImageDataset):
    """Images of random pixels."""

    def __init__(self, count: int, size: int) -> None:
        self.class_names = [str(label) for label in range(10)]
        self.pixels = torch.randint(256, (count, size, size, 3), dtype=torch.uint8).numpy()

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), index % 10

    def name(self, index: int) -> str:
        return f"image {index}"


class StepTimes(L.Callback):
    """The start of the first step and the end of each step, in seconds."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def on_train_batch_start(self, *arguments: Any) -> None:
        if not self.moments:
            self.moments.append(time.perf_counter())

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        self.moments.append(time.perf_counter())


def main() -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dg_resnet20")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200, help="steps per segment")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cuda", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dgnet.keep_freed_memory()
    device = "cuda" if args.cuda else "cpu"
    tiny = {"channels": [16, 16, 16]}
    small = Noise(4 * (args.steps + 1), 8)
    added = []
    for number in tqdm(range(args.rounds), file=sys.stderr):
        loops = {"bare": bare_loop, "lightning": lightning_loop}
        order = list(loops) if number % 2 else list(loops)[::-1]
        seconds = {name: loops[name](configure("dg_resnet20", tiny, 4, 8, device), small, device) for name in order}
        added.append(1000 * (seconds["lightning"] - seconds["bare"]))
    data = Noise(args.batch_size * 11, args.image_size)
    config = configure(args.model, {}, args.batch_size, args.image_size, device)
    bare_seconds = [1000 * bare_loop(config, data, device) for _ in range(3)]
    bare, adds = statistics.median(bare_seconds), statistics.median(added)
    print(f"{describe_hardware(device)}; {', '.join(f'{k} {v}' for k, v in versions(device).items())}")
    of = f"{args.model}, batch {args.batch_size}, {args.image_size} pixels, {args.threads} thread(s)"
    print(
        f"the loop adds {adds:.2f} ms a step (median of {args.rounds} rounds of {args.steps} steps, {min(added):.2f} …"
        f" {max(added):.2f} ms): {100 * adds / bare:.2f} % of a bare step of {of}:"
        f" {bare:.0f} ms ({min(bare_seconds):.0f} … {max(bare_seconds):.0f})"
    )


def configure(model: str, kwargs: dict[str, Any], batch_size: int, image_size: int, device: str) -> TrainConfig:
    """The configuration of a run of one epoch."""
    return TrainConfig(
        model=model,
        model_kwargs=kwargs,
        batch_size=batch_size,
        image_size=image_size,
        epochs=1,
        warmup_epochs=0.1,
        cache=True,
        channels_last=True,
        accelerator="gpu" if device == "cuda" else "cpu",
    )


def lightning_loop(config: TrainConfig, dataset: Noise, device: str) -> float:
    """Median seconds of a training step in a `dgnet train` run."""
    with tempfile.TemporaryDirectory() as folder, quiet_lightning():
        torch.manual_seed(0)
        network = dgnet.create_model(config.model, num_classes=10, **config.model_kwargs)
        preprocessing, config = prepare_data(config, network, dataset, dataset)
        times = StepTimes()
        trainer = build_trainer(config, Path(folder), Progress(), Classifier.best, None)
        trainer.callbacks.append(times)  # type: ignore[attr-defined]
        trainer.limit_val_batches = 1
        network.to(memory_format=torch.channels_last)
        carried = {"class_names": dataset.class_names}
        data = ImageDataModule(dataset, dataset, config, preprocessing, Path(folder))
        trainer.fit(Classifier(network, config, carried), data)
    return median_step(times.moments)


def bare_loop(config: TrainConfig, dataset: Noise, device: str) -> float:
    """Median seconds of a training step in a minimal PyTorch loop."""
    torch.manual_seed(0)
    network = dgnet.create_model(config.model, num_classes=10, **config.model_kwargs)
    preprocessing, config = prepare_data(config, network, dataset, dataset)
    network.to(device, memory_format=torch.channels_last).train()
    data = ImageDataModule(dataset, dataset, config, preprocessing, Path())
    strategy = type("Strategy", (), {"root_device": torch.device(device)})()
    place = {"global_rank": 0, "world_size": 1, "global_step": 0, "strategy": strategy}
    data.trainer = type("Trainer", (), place)()  # type: ignore[assignment]
    groups = build_parameter_groups(network, config)
    optimizer = create_optimizer_v2(groups, opt=config.optimizer, lr=config.lr, weight_decay=config.weight_decay, momentum=0.9)
    schedule = CosineLRScheduler(optimizer, t_initial=100, t_in_epochs=False)
    moments = [time.perf_counter()]
    for step, (images, labels) in enumerate(data.train_dataloader(), start=1):
        images, labels = images.to(device, memory_format=torch.channels_last), labels.to(device)
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step_update(step)
        if device == "cuda":
            torch.cuda.synchronize()
        moments.append(time.perf_counter())
    return median_step(moments)


def median_step(moments: list[float]) -> float:
    """Median seconds of the steps, without the first (warm-up)."""
    steps = [after - before for before, after in pairwise(moments)]
    return statistics.median(steps[1:])


if __name__ == "__main__":
    main()
