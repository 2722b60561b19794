"""A training run: from a configuration to a run folder."""

from __future__ import annotations

import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from dgnet.checkpoint import describe_network, load_weights, save_network
from dgnet.data import ImageDataset, Preprocessing, open_train_and_evaluation
from dgnet.errors import UsageError, reason
from dgnet.models import create_model
from dgnet.models.connectivity import Connectivity, DynamicNetwork
from dgnet.models.static_weights import classifier_prefixes
from dgnet.training.budget import Budget
from dgnet.training.config import TrainConfig
from dgnet.training.module import Classifier, ImageDataModule
from dgnet.training.progress import Progress

_PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
_DIGITS_SIZE = 16  # pixels: digits are 8×8, and a network with stride 4 needs some more


@dataclass(frozen=True)
class RunResult:
    """Where a run lies and how its last epoch did on the evaluation images."""

    folder: Path
    metrics: dict[str, float]


def train(config: TrainConfig, say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> RunResult:
    """Train as `config` says; writes the run folder.

    Raises UsageError for a mistake in the configuration or the data, before anything is written where that is possible.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    is_main = is_main_process()
    folder = claim_folder(config) if is_main else Path(config.output or "runs")
    L.seed_everything(config.seed, workers=True, verbose=False)
    train_set, val_set = open_train_and_evaluation(config.data, config.val_data, config.data_root, config.holdout)
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
    if config.weights:
        initial = load_weights(network, config.model, config.weights)
        if initial and is_main:
            say(f"{config.weights}: {describe_initial(network, initial)}")
    budget = None
    if config.budget is not None:
        of = (config.budget_per, config.budget_strength, config.budget_warmup)
        budget = Budget(network, preprocessing.image_size, config.budget, *of)
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

    trainer = build_trainer(config, folder)
    devices = trainer.num_devices * trainer.num_nodes
    if config.batch_size % devices:
        raise UsageError(f"--batch-size {config.batch_size} cannot be divided among {devices} devices; use a multiple of them")
    if is_main:
        was_there = folder.exists()
        write_config(config, folder)
        say(
            f"{config.model}, {parameters:,} parameters, on {len(train_set):,} images of {classes} classes,"
            f" {config.epochs} epochs -> {folder}"
        )
    try:
        with quiet_lightning():
            data = ImageDataModule(train_set, val_set, config, preprocessing, config.batch_size // devices)
            trainer.fit(Classifier(network, config, carried, budget), datamodule=data)
    except UsageError:  # an image that cannot be read: a folder without a checkpoint is no run to keep
        if is_main and not any(folder.glob("checkpoints/*.ckpt")):
            shutil.rmtree(folder)
            if was_there:
                folder.mkdir()
        raise
    except SystemExit as leaving:  # Lightning leaves so when it is interrupted
        if isinstance(leaving.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    if is_main:
        save_network(network, folder / "model.safetensors", carried)
    return RunResult(folder, {name: float(value) for name, value in trainer.callback_metrics.items()})


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
        (folder / "config.yaml").write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"the run folder {folder} cannot be written: {reason(error)}; name another with --output") from None


def prepare_data(
    config: TrainConfig, network: nn.Module, train: ImageDataset, val: ImageDataset
) -> tuple[Preprocessing, TrainConfig]:
    """Set both data sets' transforms; returns the preprocessing that a checkpoint carries, and the resolved configuration."""
    size = config.image_size or (_DIGITS_SIZE if config.data == "digits" else None)
    preprocessing = Preprocessing.of(network.pretrained_cfg, size)  # type: ignore[arg-type]
    augment = config.augment
    if augment == "auto":
        augment = "pad-crop" if max(preprocessing.image_size) <= 64 else "rrc"
    if config.cache and augment == "rrc":
        raise UsageError(f"--cache true augments with pad-crop or none, and images of {preprocessing.image_size} call for rrc")
    train.transform = preprocessing.training_transform(augment, config.hflip if train.flips else 0.0)
    val.transform = preprocessing.evaluation_transform()
    height, width = preprocessing.image_size
    return preprocessing, config.resolve(network, height if height == width else None, augment)


def build_trainer(config: TrainConfig, folder: Path) -> L.Trainer:
    """Lightning's Trainer with dgnet's loggers, checkpoints and progress. Raises UsageError for hardware that is not here."""
    # Two callbacks: with a monitor, Lightning's `save_last` writes only the epochs that improve.
    options: dict[str, Any] = {"save_on_train_epoch_end": True, "enable_version_counter": False}
    last = ModelCheckpoint(folder / "checkpoints", filename="last", **options)
    best = ModelCheckpoint(
        folder / "checkpoints", filename="best", monitor="val_top1", mode="max", every_n_epochs=config.evaluate_every, **options
    )
    devices: Any = int(config.devices) if config.devices.isdigit() else config.devices
    try:
        with quiet_lightning():
            return L.Trainer(
                accelerator=config.accelerator,
                devices=devices,
                precision=_PRECISIONS[config.precision],  # type: ignore[arg-type]
                max_epochs=config.epochs,
                num_sanity_val_steps=0,
                check_val_every_n_epoch=config.evaluate_every,
                callbacks=[last, best, Progress()],
                logger=[
                    CSVLogger(folder, name="", version=""),
                    TensorBoardLogger(folder, name="tensorboard", version=""),
                ],
                enable_progress_bar=False,
                enable_model_summary=False,
            )
    except (MisconfigurationException, ValueError) as error:
        asked = f"--accelerator {config.accelerator} --devices {config.devices} --precision {config.precision}"
        raise UsageError(f"{asked} cannot be used here: {reason(error)}") from None


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Leave out Lightning's advice: workers and logging intervals are the user's options here."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in (".*does not have many workers.*", ".*number of training batches.*", ".*exists and is not empty.*"):
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
