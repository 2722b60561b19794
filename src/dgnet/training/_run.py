"""A run: its folder, its trainer, and what stops it and lets it go on."""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import pickle
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
import torch.distributed as dist
import yaml
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.plugins.layer_sync import LayerSync
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from timm.layers import convert_sync_batchnorm
from torch.nn import Module

from dgnet.checkpoint import read_tensors, save_tensors
from dgnet.errors import BadImageError, UsageError, reason
from dgnet.files import lock, read_table, replace_file, writing
from dgnet.options import flag
from dgnet.training._checkpointing import LAST, Checkpointing, Interrupted, WholeCheckpointIO
from dgnet.training._config import RESUME_OPTIONS, RunConfig
from dgnet.training._history import MetricsFile
from dgnet.training._module import RunModule
from dgnet.training._progress import Progress

_PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}

C = TypeVar("C", bound=RunConfig)

PATIENCE = 10.0
"""Seconds that processes which load images may outlive one that was killed; so long they hold its folder."""


@dataclass(frozen=True)
class RunResult:
    """Where a run lies and how its last epoch did: the last row of metrics.csv."""

    folder: Path
    metrics: dict[str, float]


@contextmanager
def open_run(config: RunConfig, resume: Path | None) -> Iterator[Run]:
    """A run that is about to begin, or to go on in the folder `resume`, which is its own inside the `with` block.

    Where nothing was written, no folder is left.

    Raises UsageError for a folder that holds something or that another process trains in, and for a checkpoint that is damaged.
    """
    if not is_main_process(config.nodes):  # the first process chose the folder
        yield Run(config, resume, resume or Path(config.output or "runs"))
        return
    folder, made = (resume, []) if resume else make_folder(config)
    try:
        with _lock_folder(folder):
            if not resume:
                check_empty(folder)
            yield Run(config, resume, folder)
    finally:
        for path in made:
            with suppress(OSError):  # it holds something
                path.rmdir()


def _lock_folder(folder: Path) -> AbstractContextManager[None]:
    return lock(folder, f"{folder} is a run's that goes on in another process; stop that first, or name another", PATIENCE)


class Run:
    """A run that writes `folder`; `step`: where it goes on, None from the start. Raises UsageError for a damaged checkpoint."""

    def __init__(self, config: RunConfig, resume: Path | None, folder: Path) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
            os.environ["OMP_NUM_THREADS"] = str(config.threads)  # or Lightning's launcher chooses for itself
        self.is_main = is_main_process(config.nodes)
        self.progress = Progress()
        self.resume = resume
        self.folder = folder
        self.last = self.folder / "checkpoints" / LAST
        self.step: int | None = None
        self.class_names: list[str] | None = None  # of the run that goes on
        if resume and self.last.exists():
            self.step, self.class_names = _read_progress(self.last)
        if resume and self.is_main:
            for part in self.folder.rglob(".*.part"):  # of a file that was being written when the run was killed
                part.unlink()
        L.seed_everything(config.seed, workers=True, verbose=False)

    def say(self, line: str) -> None:
        """Print a line on stderr, once over all processes."""
        if self.is_main:
            print(line, file=sys.stderr)

    def check_data(self, images: int, class_names: Sequence[str], batch_size: int) -> None:
        """Raises UsageError for too few training `images`, and where a run that goes on learned other classes."""
        if images < batch_size:
            raise UsageError(f"--batch-size {batch_size} is more than the {images} training images; use a smaller one")
        if self.class_names is not None and list(class_names) != self.class_names:
            raise UsageError(
                f"--resume {self.folder}: the run learned the classes {_listed(self.class_names)},"
                f" and --data has {_listed(class_names)}"
            )

    def build_trainer(self, config: RunConfig, best: str) -> L.Trainer:
        """The trainer of the run.

        Raises UsageError where a batch cannot be divided among its devices, and where SLURM started more or fewer processes.
        """
        trainer = build_trainer(config, self.folder, self.progress, best, self.step)
        if SLURMEnvironment.detect() and not dist.is_torchelastic_launched():
            tasks = int(os.environ["SLURM_NTASKS"])
            if tasks != trainer.world_size:
                raise UsageError(
                    f"--devices {config.devices} --nodes {config.nodes} make {trainer.world_size} processes,"
                    f" and SLURM started {tasks} tasks; use as many"
                )
        if config.batch_size % (trainer.world_size * config.accumulate):
            of = f" times --accumulate {config.accumulate}" if config.accumulate > 1 else ""
            raise UsageError(
                f"--batch-size {config.batch_size} cannot be divided among {trainer.world_size} devices{of};"
                " use a multiple of them"
            )
        return trainer

    def fit(self, trainer: L.Trainer, module: RunModule, data: L.LightningDataModule, about: str) -> RunResult:
        """Train, and write the run folder; `about`: one line on what is trained on what.

        Raises Interrupted where a signal ended the run after it saved a checkpoint.
        """
        folder = self.folder
        if self.is_main and not self.resume:
            write_config(module.config, folder)
        from_step = f" from step {self.step:,} on" if self.step is not None else ""
        self.say(f"{about}{from_step} -> {folder}")
        checkpointing = trainer.checkpoint_callback
        assert isinstance(checkpointing, Checkpointing)
        try:
            with quiet_lightning():
                trainer.fit(module, datamodule=data, ckpt_path=str(self.last) if self.step is not None else None)
        except Interrupted:
            raise
        except BaseException as error:
            launcher = trainer.strategy.launcher
            others: list[subprocess.Popen[bytes]] = []
            if isinstance(launcher, _SubprocessScriptLauncher):
                others += launcher.procs
                launcher.procs.clear()  # Lightning watches them, and would kill this process where one left
            has_refused = isinstance(error, RuntimeError) and _has_refused(others)
            for process in others:  # or they would wait for this one
                process.kill()
            # What else went wrong follows from a signal: helpers of a whole group of processes were told too.
            if checkpointing.signum:
                raise Interrupted(checkpointing.signum, None, checkpointing.folder.parent) from None
            is_new = not self.resume and not any(folder.glob("checkpoints/*.ckpt"))
            is_bad_image = isinstance(error, BadImageError) or (has_refused and not (folder / "bad_images.txt").exists())
            if is_bad_image and self.is_main and is_new:
                clear_folder(folder)  # without a checkpoint it is no run to keep
            if has_refused:
                raise SystemExit(2) from None
            if isinstance(error, SystemExit):  # Lightning leaves so
                raise KeyboardInterrupt if isinstance(error.__context__, KeyboardInterrupt) else error from None
            raise
        if not self.is_main:
            return RunResult(folder, {})
        pace = self.progress.overall
        if pace.images:
            self.say(f"trained at {pace}; best {module.best_title} {_best(folder, module.best):.2f} %")
        _write_weights(folder)
        return RunResult(folder, _last_metrics(folder))


def _has_refused(processes: Sequence[subprocess.Popen[bytes]]) -> bool:
    """Whether one of the processes met a mistake, printed its line and left: that breaks the connection to it."""
    end = time.monotonic() + 3
    while processes and time.monotonic() < end and all(process.poll() is None for process in processes):
        time.sleep(0.05)
    return any(process.poll() == 2 for process in processes)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 5 else f"{', '.join(names[:5])}, … ({len(names)})"


def _write_weights(folder: Path) -> None:
    """Write model.safetensors from the last checkpoint."""
    tensors, carried = read_tensors(folder / "checkpoints" / LAST)
    path = folder / "model.safetensors"
    with writing(path, f"then go on with --resume {folder}"):
        save_tensors(tensors, path, carried or {})


def read_run(folder: Path, changes: Mapping[str, Any], kind: type[C]) -> tuple[C, RunResult | None]:
    """The configuration, of `kind`, of the run in `folder`, and its result where it is finished.

    `changes`: options given again, which may be those of RESUME_OPTIONS: where data lie, and what the run takes place on.

    Raises UsageError for a folder that holds no run, and for changes of what decides the result.
    """
    path = folder / "config.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        unknown = sorted(set(values) - {f.name for f in fields(kind)})
        if unknown:
            raise UsageError(f"{path} is not of a run of dgnet {kind.command}, which has no {flag(unknown[0])}")
        config = kind(**values)
    except FileNotFoundError:
        raise UsageError(f"--resume {folder} is no run folder: it holds no config.yaml") from None
    except UsageError:
        raise
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read: {reason(error)}") from None
    for name in changes:
        if name not in RESUME_OPTIONS:
            own = {f.name for f in fields(kind)}
            allowed = ", ".join(flag(option) for option in RESUME_OPTIONS if option in own)
            raise UsageError(f"--resume goes on as {path} says: leave out {flag(name)}; what may differ: {allowed}")
    config = replace(config, **changes)
    rows = read_table(folder / "metrics.csv")
    last = folder / "checkpoints" / LAST
    is_done = bool(rows) and int(rows[-1]["epoch"]) + 1 >= config.schedule()[0] and last.exists()
    if not is_done or _read_progress(last)[0] <= int(rows[-1]["step"]):
        return config, None
    if is_main_process() and not (folder / "model.safetensors").exists():
        with _lock_folder(folder):
            if not (folder / "model.safetensors").exists():
                _write_weights(folder)
    return config, RunResult(folder, _last_metrics(folder))


def _read_progress(checkpoint: Path) -> tuple[int, list[str]]:
    """The number of steps taken, and the classes learned. Raises UsageError for a file that is damaged."""
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        return int(content["global_step"]), list(content["dgnet"]["class_names"])
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, pickle.UnpicklingError):
        raise UsageError(f"{checkpoint} is damaged or no checkpoint of a run; put another in its place, as best.ckpt") from None


def _last_metrics(folder: Path) -> dict[str, float]:
    row = read_table(folder / "metrics.csv")[-1]
    return {name: float(value) for name, value in row.items() if value != ""}


def _best(folder: Path, name: str) -> float:
    return max(float(row[name]) for row in read_table(folder / "metrics.csv") if row.get(name))


def is_main_process(nodes: int = 1) -> bool:
    """Whether this process writes and prints: Lightning starts the command again in each further process.

    `nodes`: on how many machines the run takes place, where there is no trainer yet, which knows.
    """
    node = int(os.environ.get("NODE_RANK", 0)) if nodes > 1 and "RANK" not in os.environ else 0
    return rank_zero_only.rank == 0 and node == 0  # type: ignore[attr-defined]


@contextmanager
def join_processes(device: str) -> Iterator[str]:
    """Under torchrun, the group of its processes inside the `with` block, each with a device of its own; gives the device."""
    if not dist.is_torchelastic_launched():
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def make_folder(config: RunConfig) -> tuple[Path, list[Path]]:
    """The run folder, `--output` or the next free one, and the folders that were made for it, the innermost first.

    Raises UsageError where it holds something or cannot be made.
    """
    if config.output is not None:
        folder = Path(config.output)
        if folder.is_file():
            raise UsageError(f"--output {folder} is a file; name a folder")
        check_empty(folder)
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        with writing(f"the run folder {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
        return folder, made
    runs = Path("runs")
    made = [] if runs.exists() else [runs]
    with writing(runs):
        runs.mkdir(exist_ok=True)
    for number in itertools.count(1):
        folder = runs / f"{config.model}-{number}"
        with writing(f"the run folder {folder}"), suppress(FileExistsError):
            folder.mkdir()
            break
    return folder, [folder, *made]


def check_empty(folder: Path) -> None:
    """Raises UsageError where the folder that `--output` names holds something."""
    if folder.is_dir() and any(folder.iterdir()):
        held = "holds a run" if (folder / "config.yaml").exists() else "is not empty"
        raise UsageError(f"--output {folder} already {held}; name another folder, or move that one away")


def clear_folder(folder: Path) -> None:
    """Remove what a run wrote."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_config(config: RunConfig, folder: Path) -> None:
    """Write config.yaml, which repeats the run in a folder of its own. Raises UsageError where it cannot be written."""
    text = yaml.safe_dump({**asdict(config), "output": None}, sort_keys=False, allow_unicode=True)
    with writing(f"the run folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)  # another process that had waited for it may have taken it away
        with replace_file(folder / "config.yaml") as written:
            written.write_text(text, encoding="utf-8")


def build_trainer(config: RunConfig, folder: Path, progress: Progress, best: str, step: int | None) -> L.Trainer:
    """Lightning's Trainer with dgnet's loggers, checkpoints and progress.

    `best`: the metric whose highest value decides best.ckpt; `step`: where a run goes on.

    Raises UsageError for hardware that is not here.
    """
    devices: Any = int(config.devices) if config.devices.isdigit() else config.devices
    nodes = config.nodes
    epochs, evaluate_every = config.schedule()
    if dist.is_torchelastic_launched():  # the command is the same on one machine and on many
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    callbacks: list[L.Callback] = [progress, Checkpointing(folder / "checkpoints", best, *config.checkpoint_interval())]
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
                max_epochs=epochs,
                accumulate_grad_batches=config.accumulate,
                gradient_clip_val=config.clip_grad,
                use_distributed_sampler=False,  # the orders know of processes
                num_sanity_val_steps=0,
                check_val_every_n_epoch=evaluate_every,
                callbacks=callbacks,
                plugins=[WholeCheckpointIO(), *([SyncNorms()] if config.sync_bn else [])],
                logger=[
                    MetricsFile(folder / "metrics.csv", step),
                    # Events from there on are written again.
                    TensorBoardLogger(folder, name="tensorboard", version="", purge_step=step),
                    *map(build_logger, config.loggers),
                ],
                enable_progress_bar=False,
                enable_model_summary=False,
            )
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"{asked} cannot be used here: {reason(error)}") from None
    if config.sync_bn and trainer.strategy.root_device.type != "cuda":
        raise UsageError("--sync-bn needs CUDA devices, and this run has none; leave it out")
    return trainer


class SyncNorms(LayerSync):
    """Batch normalisation over all devices; timm's keep the activations that they hold, which Lightning's own would drop."""

    def apply(self, model: Module) -> Module:
        return convert_sync_batchnorm(model)

    def revert(self, model: Module) -> Module:
        return model


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
                ".*in eval mode at the start.*",  # frozen normalisations
                ".*callbacks used to create the checkpoint.*",  # a run may go on with others
            ):
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
