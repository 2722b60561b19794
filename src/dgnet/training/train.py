"""A training run: from a configuration to a run folder."""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import yaml
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from dgnet.checkpoint import describe_network, load_checkpoint, load_weights
from dgnet.data import ImageDataset, Preprocessing, ShardStream, open_train_and_evaluation
from dgnet.errors import BadImageError, UsageError, reason
from dgnet.files import read_table, replace_file
from dgnet.models import create_model
from dgnet.models.connectivity import Connectivity, DynamicNetwork
from dgnet.models.static_weights import classifier_prefixes
from dgnet.options import flag
from dgnet.training.budget import Budget
from dgnet.training.checkpointing import LAST, Checkpointing, Interrupted, WholeCheckpointIO
from dgnet.training.config import RESUME_OPTIONS, TrainConfig
from dgnet.training.history import MetricsFile
from dgnet.training.module import Classifier, ImageDataModule
from dgnet.training.progress import Progress

_PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
_DIGITS_SIZE = 16  # pixels: digits are 8×8, and a network with stride 4 needs some more


@dataclass(frozen=True)
class RunResult:
    """Where a run lies and how its last epoch did: the last row of metrics.csv."""

    folder: Path
    metrics: dict[str, float]


def train(
    config: TrainConfig, resume: Path | None = None, say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)
) -> RunResult:
    """Train as `config` says; writes the run folder.

    `resume`: a run folder, whose run goes on from its last checkpoint; see `read_run`.

    Raises UsageError for a mistake in the configuration or the data, before anything is written where that is possible, and
    Interrupted where a signal ended the run after it saved a checkpoint.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    is_main = is_main_process()
    folder = resume or (claim_folder(config) if is_main else Path(config.output or "runs"))
    last = folder / "checkpoints" / LAST
    checkpoint = _read_step(last) if resume and last.exists() else None
    if resume and is_main:
        for part in folder.rglob(".*.part"):  # of a file that was being written when the run was killed
            part.unlink()
    L.seed_everything(config.seed, workers=True, verbose=False)
    train_set, val_set = open_train_and_evaluation(
        config.data, config.val_data, config.data_root, config.holdout, config.epoch_images
    )
    if len(train_set) < config.batch_size:
        raise UsageError(
            f"--batch-size {config.batch_size} is more than the {len(train_set)} training images; use a smaller one"
        )
    classes = len(train_set.class_names)
    try:
        network = create_model(config.model, num_classes=classes, **config.network_kwargs)
    except UsageError as error:
        if config.budget is not None and "no option 'node_gate'" in str(error):
            raise UsageError(f"--budget needs a network with dynamic stages, which {config.model} has not") from None
        raise
    preprocessing, config = prepare_data(config, network, train_set, val_set)
    if config.weights and checkpoint is None:
        initial = load_weights(network, config.model, config.weights)
        if initial and is_main:
            say(f"{config.weights}: {describe_initial(network, initial)}")
    budget = None
    if config.budget is not None:
        how = (config.budget_per, config.budget_strength, config.budget_warmup)
        budget = Budget(network, preprocessing.image_size, config.budget, *how)
    options = config.network_kwargs
    if isinstance(network, DynamicNetwork):
        given = {f.name for f in fields(Connectivity)}
        options = {**{name: v for name, v in options.items() if name not in given}, **network.stored_options()}
    carried = describe_network(config.model, options, train_set.class_names, preprocessing, asdict(config))
    parameters = sum(p.numel() for p in network.parameters())
    if config.grad_checkpointing:
        try:
            network.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AssertionError, AttributeError):
            raise UsageError(f"{config.model} has no gradient checkpointing; leave out --grad-checkpointing") from None
    if config.channels_last:
        network.to(memory_format=torch.channels_last)
    if config.compile:
        network.compile(fullgraph=True)  # in place: the state dict keeps its keys

    progress = Progress()
    trainer = build_trainer(config, folder, progress, checkpoint)
    if config.cache and trainer.world_size > 1:
        raise UsageError(f"--cache true trains in one process, and this run has {trainer.world_size}")
    devices = trainer.world_size * config.accumulate
    if config.batch_size % devices:
        of = f" times --accumulate {config.accumulate}" if config.accumulate > 1 else ""
        raise UsageError(
            f"--batch-size {config.batch_size} cannot be divided among {trainer.world_size} devices{of}; use a multiple of them"
        )
    was_there = folder.exists()
    if is_main:
        if not resume:
            write_config(config, folder)
        from_step = f" from step {checkpoint:,} on" if checkpoint is not None else ""
        say(
            f"{config.model}, {parameters:,} parameters, on {len(train_set):,} images of {classes} classes,"
            f" {config.epochs} epochs{from_step} -> {folder}"
        )
    checkpointing = trainer.checkpoint_callback
    assert isinstance(checkpointing, Checkpointing)
    try:
        with quiet_lightning():
            data = ImageDataModule(train_set, val_set, config, preprocessing, folder)
            path = str(last) if checkpoint is not None else None
            trainer.fit(Classifier(network, config, carried, budget), datamodule=data, ckpt_path=path)
    except Interrupted:
        raise
    except BaseException as error:
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):  # or the processes that it started wait for this one
            launcher.kill(signal.SIGKILL)
        if checkpointing.signum:  # what else went wrong follows from it: helpers of a whole group of processes were told too
            raise Interrupted(checkpointing.signum, None, checkpointing.folder.parent) from None
        if isinstance(error, BadImageError) and is_main and not resume and not any(folder.glob("checkpoints/*.ckpt")):
            clear_folder(folder, keep=was_there)  # a folder without a checkpoint is no run to keep
        if isinstance(error, SystemExit):  # Lightning leaves so
            raise KeyboardInterrupt if isinstance(error.__context__, KeyboardInterrupt) else error from None
        raise
    if is_main:
        if progress.overall.images:
            say(f"trained at {progress.overall}; best epoch's top-1 {_best(folder):.2f} %")
        finish_run(folder)
    return RunResult(folder, _last_metrics(folder) if is_main else {})


def finish_run(folder: Path) -> None:
    """Write model.safetensors from the last checkpoint."""
    load_checkpoint(folder / "checkpoints" / LAST).save(folder / "model.safetensors")


def read_run(folder: Path, changes: Mapping[str, Any]) -> tuple[TrainConfig, RunResult | None]:
    """The configuration of the run in `folder`, and its result where it is finished.

    `changes`: options given again, which may be those of RESUME_OPTIONS: where data lie, and what the run takes place on.

    Raises UsageError for a folder that holds no run, and for changes of what decides the result.
    """
    path = folder / "config.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        config = TrainConfig(**values)
    except FileNotFoundError:
        raise UsageError(f"--resume {folder} is no run folder: it holds no config.yaml") from None
    except UsageError:
        raise
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read: {reason(error)}") from None
    for name in changes:
        if name not in RESUME_OPTIONS:
            allowed = ", ".join(map(flag, RESUME_OPTIONS))
            raise UsageError(f"--resume goes on as {path} says: leave out {flag(name)}; what may differ: {allowed}")
    config = replace(config, **changes)
    rows = read_table(folder / "metrics.csv")
    last = folder / "checkpoints" / LAST
    is_done = bool(rows) and int(rows[-1]["epoch"]) + 1 >= config.epochs and last.exists()
    if not is_done or _read_step(last) <= int(rows[-1]["step"]):
        return config, None
    if is_main_process() and not (folder / "model.safetensors").exists():
        finish_run(folder)
    return config, RunResult(folder, _last_metrics(folder))


def _read_step(checkpoint: Path) -> int:
    """The number of steps taken. Raises UsageError for a file that is damaged."""
    try:
        return int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, pickle.UnpicklingError):
        raise UsageError(f"{checkpoint} is damaged or no checkpoint of a run; put another in its place, as best.ckpt") from None


def _last_metrics(folder: Path) -> dict[str, float]:
    row = read_table(folder / "metrics.csv")[-1]
    return {name: float(value) for name, value in row.items() if value != ""}


def _best(folder: Path) -> float:
    return max(float(row["val_top1"]) for row in read_table(folder / "metrics.csv") if row.get("val_top1"))


def is_main_process() -> bool:
    """Whether this process writes and prints: Lightning starts the command again in each further process."""
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]


def claim_folder(config: TrainConfig) -> Path:
    """The run folder to write: `--output`, or the next free one. Raises UsageError where it holds something."""
    if config.output is None:
        number = 1
        while (folder := Path("runs") / f"{config.model}-{number}").exists():
            number += 1
        return folder
    folder = Path(config.output)
    if folder.is_file():
        raise UsageError(f"--output {folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()):
        held = "holds a run" if (folder / "config.yaml").exists() else "is not empty"
        raise UsageError(f"--output {folder} already {held}; name another folder, or move that one away")
    return folder


def clear_folder(folder: Path, keep: bool) -> None:
    """Remove what a run wrote, and the folder too unless it is to `keep`."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not keep:
        folder.rmdir()


def describe_initial(network: nn.Module, names: list[str]) -> str:
    """What of a network stayed as initialised after trained weights were loaded, in one line."""
    heads = [name for name in names if name.startswith(classifier_prefixes(network))]
    others = [name for name in names if name not in heads]
    lines = []
    if heads:
        classes = network.num_classes
        lines.append(f"trained for other classes; reset {', '.join(heads)} to {classes} classes")
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        lines.append(f"stayed as initialised: {', '.join(others[:3])}{more}")
    return "; ".join(lines)


def write_config(config: TrainConfig, folder: Path) -> None:
    """Make the run folder and write its config.yaml, which repeats the run in a folder of its own.

    Raises UsageError where the folder cannot be written.
    """
    text = yaml.safe_dump({**asdict(config), "output": None}, sort_keys=False, allow_unicode=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replace_file(folder / "config.yaml") as written:
            written.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"the run folder {folder} cannot be written: {reason(error)}; name another with --output") from None


def prepare_data(
    config: TrainConfig, network: nn.Module, train: ImageDataset | ShardStream, val: ImageDataset
) -> tuple[Preprocessing, TrainConfig]:
    """Set both data sets' transforms; returns the preprocessing that a checkpoint carries, and the resolved configuration."""
    size = config.image_size or (_DIGITS_SIZE if config.data == "digits" else None)
    preprocessing = Preprocessing.of(network.pretrained_cfg, size)  # type: ignore[arg-type]
    if config.crop_pct is not None:
        preprocessing = replace(preprocessing, crop_pct=config.crop_pct)
    augment = config.augment
    if augment == "auto":
        augment = "pad-crop" if max(preprocessing.image_size) <= 64 else "rrc"
    if config.cache and augment == "rrc":
        raise UsageError(f"--cache true augments with pad-crop or none, and images of {preprocessing.image_size} call for rrc")
    train.transform = preprocessing.training_transform(augment, config.hflip if train.flips else 0.0)
    val.transform = preprocessing.evaluation_transform()
    height, width = preprocessing.image_size
    return preprocessing, config.resolve(network, height if height == width else None, augment)


def build_trainer(config: TrainConfig, folder: Path, progress: Progress, step: int | None) -> L.Trainer:
    """Lightning's Trainer with dgnet's loggers, checkpoints and progress; `step`: where a run goes on.

    Raises UsageError for hardware that is not here.
    """
    devices: Any = int(config.devices) if config.devices.isdigit() else config.devices
    nodes = config.nodes
    if dist.is_torchelastic_launched():  # the command is the same on one machine and on many
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    callbacks: list[L.Callback] = [progress, Checkpointing(folder / "checkpoints", *config.checkpoint_interval())]
    if config.ema is not None:
        callbacks.insert(0, EMAWeightAveraging(decay=config.ema))  # before checkpoints, which hold the average
    asked = f"--accelerator {config.accelerator} --devices {config.devices} --precision {config.precision}"
    try:
        with quiet_lightning():
            trainer = L.Trainer(
                accelerator=config.accelerator,
                devices=devices,
                num_nodes=nodes,
                precision=_PRECISIONS[config.precision],  # type: ignore[arg-type]
                max_epochs=config.epochs,
                accumulate_grad_batches=config.accumulate,
                gradient_clip_val=config.clip_grad,
                sync_batchnorm=config.sync_bn,
                use_distributed_sampler=False,  # the orders know of processes
                num_sanity_val_steps=0,
                check_val_every_n_epoch=config.evaluate_every,
                callbacks=callbacks,
                plugins=[WholeCheckpointIO()],
                logger=[
                    MetricsFile(folder / "metrics.csv", step),
                    # Events from there on are written again.
                    TensorBoardLogger(folder, name="tensorboard", version="", purge_step=step),
                    *map(build_logger, config.loggers),
                ],
                enable_progress_bar=False,
                enable_model_summary=False,
            )
    except (MisconfigurationException, ValueError) as error:
        raise UsageError(f"{asked} cannot be used here: {reason(error)}") from None
    if config.sync_bn and trainer.strategy.root_device.type != "cuda":
        raise UsageError("--sync-bn needs CUDA devices, and this run has none; leave it out")
    return trainer


def build_logger(described: dict[str, Any]) -> Logger:
    """A Lightning logger from its `class_path` and `init_args`. Raises UsageError for what is none."""
    path = described["class_path"]
    try:
        kind = getattr(importlib.import_module(path.rpartition(".")[0]), path.rpartition(".")[2])
        if not issubclass(kind, Logger):
            raise TypeError("it is no Lightning logger")
        logger: Logger = kind(**described.get("init_args", {}))
    except Exception as error:  # whatever the logger's library raises
        raise UsageError(f"--loggers: {path} cannot be made: {reason(error)}") from None
    return logger


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Leave out Lightning's advice: workers and logging intervals are the user's options here."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in (
                ".*does not have many workers.*",
                ".*number of training batches.*",
                ".*exists and is not empty.*",
                ".*your dataloader is not resumable.*",  # ours reads the trainer's step
                ".*sync_dist=True.*",  # metrics are means over all processes
                ".*callbacks used to create the checkpoint.*",  # a run may go on with others
            ):
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
