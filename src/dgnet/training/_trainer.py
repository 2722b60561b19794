"""Lightning's Trainer with the settings of a run."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.plugins.layer_sync import LayerSync
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from timm.layers import convert_sync_batchnorm
from torch.nn import Module

from dgnet.devices import choose_devices
from dgnet.errors import UsageError, reason
from dgnet.training._checkpointing import Checkpointing, WholeCheckpointIO
from dgnet.training._config import RunConfig
from dgnet.training._history import MetricsFile
from dgnet.training._launcher import check_slurm
from dgnet.training._progress import Progress

_PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def build_trainer(config: RunConfig, folder: Path, progress: Progress, best: str, step: int | None) -> L.Trainer:
    """Lightning's Trainer with dgnet's loggers, checkpoints and progress.

    `best`: the metric whose highest value decides best.ckpt. `step`: where a resumed run continues.

    Raises UsageError for hardware that this machine does not have, for a batch that cannot be divided among the devices, and
    if SLURM started another number of processes.
    """
    kind, devices = choose_devices(config.accelerator, "1" if dist.is_torchelastic_launched() else config.devices)
    if kind == "cpu" and config.precision == "fp16":  # Lightning would use bf16
        raise UsageError("--precision fp16 needs a GPU, and this run is on a CPU; use bf16 or 32")
    nodes = config.nodes
    epochs, evaluate_every = config.schedule()
    if dist.is_torchelastic_launched():  # torchrun's numbers replace --devices and --nodes
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    callbacks: list[L.Callback] = [progress, Checkpointing(folder / "checkpoints", best, *config.checkpoint_interval())]
    if config.ema is not None:
        callbacks.insert(0, EMAWeightAveraging(decay=config.ema))  # before Checkpointing, because checkpoints hold the average
    asked = f"--accelerator {config.accelerator} --devices {config.devices} --precision {config.precision}"
    loggers = [build_logger(described) for described in config.loggers]
    try:
        with quiet_lightning():
            trainer = L.Trainer(
                accelerator=kind,
                devices=devices,
                num_nodes=nodes,
                precision=_PRECISIONS[config.precision],  # type: ignore[arg-type]
                max_epochs=epochs,
                accumulate_grad_batches=config.accumulate,
                gradient_clip_val=config.clip_grad,
                use_distributed_sampler=False,  # the orders divide the images among processes
                num_sanity_val_steps=0,
                check_val_every_n_epoch=evaluate_every,
                callbacks=callbacks,
                plugins=[WholeCheckpointIO(), *([SyncNorms()] if config.sync_bn else [])],
                logger=[
                    MetricsFile(folder, step),
                    # A resumed run writes the events from `step` on again.
                    TensorBoardLogger(folder, name="tensorboard", version="", purge_step=step),
                    *loggers,
                ],
                enable_progress_bar=False,
                enable_model_summary=False,
            )
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"{asked} cannot be used here: {reason(error)}") from None
    if config.sync_bn and trainer.strategy.root_device.type != "cuda":
        raise UsageError("--sync-bn needs CUDA devices, and this run has none; leave it out")
    is_without_launcher = isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)
    if trainer.num_nodes > 1 and is_without_launcher and not os.environ.get("MASTER_ADDR"):  # it would wait for ever
        raise UsageError(
            f"--nodes {config.nodes} needs a launcher, torchrun or srun, that starts the command on each machine;"
            " without one, set MASTER_ADDR, MASTER_PORT and NODE_RANK on each"
        )
    _check_processes(config, trainer.world_size)
    return trainer


def _check_processes(config: RunConfig, world_size: int) -> None:
    if SLURMEnvironment.detect() and not dist.is_torchelastic_launched():
        tasks = int(os.environ["SLURM_NTASKS"])
        if tasks != world_size:
            raise UsageError(
                f"--devices {config.devices} --nodes {config.nodes} make {world_size} processes,"
                f" and SLURM started {tasks} tasks; make the numbers equal"
            )
        check_slurm()
    elif not dist.is_torchelastic_launched() and int(os.environ.get("LOCAL_RANK", 0)) >= world_size:
        raise UsageError(
            f"LOCAL_RANK is {os.environ['LOCAL_RANK']}, and --devices {config.devices} --nodes {config.nodes} make {world_size}"
            " processes; unset LOCAL_RANK, or use torchrun"
        )
    parts = world_size * config.accumulate
    if config.batch_size % parts:
        of = f" times --accumulate {config.accumulate}" if config.accumulate > 1 else ""
        raise UsageError(
            f"--batch-size {config.batch_size} cannot be divided among {world_size} devices{of}; use a multiple of {parts}"
        )


class SyncNorms(LayerSync):
    """Batch normalisation over all devices. timm's layers keep their activation, which Lightning's own conversion drops."""

    def apply(self, model: Module) -> Module:
        converted: Module = convert_sync_batchnorm(model)
        return converted

    def revert(self, model: Module) -> Module:
        return model


def build_logger(described: dict[str, Any]) -> Logger:
    """A Lightning logger from its `class_path` and `init_args`. Raises UsageError if it cannot be built."""
    path = described["class_path"]
    try:
        kind = getattr(importlib.import_module(path.rpartition(".")[0]), path.rpartition(".")[2])
        if not isinstance(kind, type) or not issubclass(kind, Logger):
            raise TypeError("it is not a Lightning logger")
        logger: Logger = kind(**described.get("init_args", {}))
    except Exception as error:  # a logger's library may raise anything
        raise UsageError(f"--loggers: {path} cannot be built: {reason(error)}") from None
    return logger


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Inside the `with` block: Lightning and timm print no advice on settings that are the user's options or set by dgnet."""
    # timm's schedule says "no effect" of one that is counted in steps and has one cycle.
    names = ("lightning.pytorch", "lightning.fabric", "timm.scheduler.cosine_lr")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in (
                ".*does not have many workers.*",
                ".*number of training batches.*",
                ".*exists and is not empty.*",
                ".*your dataloader is not resumable.*",  # TrainingLoader continues at the trainer's step
                ".*sync_dist=True.*",  # the logged metrics are already means over all processes
                ".*in eval mode at the start.*",  # frozen normalisation layers
                ".*callbacks used to create the checkpoint.*",  # a resumed run may have other callbacks
            ):
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
