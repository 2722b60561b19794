"""A run: from its start or its last checkpoint to its end or its interruption."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import lightning as L
import torch
import yaml

from dgnet.data import Ledger, compose
from dgnet.errors import BadImageError, UsageError, reason
from dgnet.evaluation import DATA
from dgnet.files import read_table
from dgnet.options import flag
from dgnet.paths import find_kind
from dgnet.training._checkpointing import LAST, Checkpointing, Interrupted
from dgnet.training._config import RESUME_OPTIONS, RunConfig
from dgnet.training._folder import (
    best_metric,
    check_empty,
    clear_folder,
    last_metrics,
    lock_folder,
    make_folder,
    read_progress,
    write_config,
    write_data,
    write_weights,
)
from dgnet.training._module import RunModule
from dgnet.training._processes import end_other_processes, is_main_process
from dgnet.training._progress import Progress
from dgnet.training._trainer import build_trainer, quiet_lightning

C = TypeVar("C", bound=RunConfig)


@dataclass(frozen=True)
class RunResult:
    """A run's folder, and the metrics of its last epoch: the last row of metrics.csv."""

    folder: Path
    metrics: dict[str, float]


@contextmanager
def open_run(config: RunConfig, resume: Path | None) -> Iterator[Run]:
    """A run that is about to start, or to continue in the folder `resume`. Its folder is locked inside the `with` block.

    A new folder that is still empty at the end is removed.

    Raises UsageError for a folder that is not empty or in which another process trains, and for a damaged checkpoint.
    """
    if not is_main_process(config.nodes):  # the first process chose the folder
        yield Run(config, resume, resume or Path(config.output or "runs"))
        return
    folder, made = (resume, []) if resume else make_folder(config)
    try:
        with lock_folder(folder):
            if not resume:
                check_empty(folder)
            yield Run(config, resume, folder)
    finally:
        for path in made:
            with suppress(OSError):  # it is not empty
                path.rmdir()


class Run:
    """A run that writes to `folder`. `step`: where it continues; None for a run from the start.

    Raises UsageError for a damaged checkpoint.
    """

    def __init__(self, config: RunConfig, resume: Path | None, folder: Path) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
            os.environ["OMP_NUM_THREADS"] = str(config.threads)  # otherwise Lightning's launcher chooses a number
        self.is_main = is_main_process(config.nodes)
        self.progress = Progress()
        self.resume = resume
        self.folder = folder
        self.last = self.folder / "checkpoints" / LAST
        self.step: int | None = None
        self.class_names: list[str] | None = None  # of the resumed run
        self.ledgers: dict[str, Ledger] = {}
        if resume and self.last.exists():
            self.step, self.class_names = read_progress(self.last)
        if resume and self.is_main:
            for part in self.folder.rglob(".*.part"):  # left over if the run was killed while it wrote a file
                part.unlink()
        L.seed_everything(config.seed, workers=True, verbose=False)

    def say(self, line: str) -> None:
        """Print a line on stderr, in the first process only."""
        if self.is_main:
            print(line, file=sys.stderr)

    @property
    def is_of_old_version(self) -> bool:
        """Whether the resumed run did not store what its data were, and may have been evaluated on test/."""
        return self.resume is not None and find_kind(self.folder / DATA) is None

    def record_data(self, training: Ledger, evaluation: Ledger) -> None:
        """What the data sets of the run gave and left out: `fit` prints it and stores it in data.json."""
        self.ledgers = {"training": training, "evaluation": evaluation}

    def check_data(self, images: int, class_names: Sequence[str], batch_size: int) -> None:
        """Raises UsageError for fewer training `images` than a batch, and if a resumed run was trained on other classes."""
        if images < batch_size:
            raise UsageError(f"--batch-size {batch_size} is more than the {images} training images; use a smaller one")
        if self.class_names is not None and list(map(compose, class_names)) != list(map(compose, self.class_names)):
            raise UsageError(
                f"--resume {self.folder}: the run was trained on the classes {_listed(self.class_names)},"
                f" and --data has {_listed(class_names)}"
            )

    def build_trainer(self, config: RunConfig, best: str) -> L.Trainer:
        """The trainer of the run; see `dgnet.training._trainer.build_trainer`."""
        return build_trainer(config, self.folder, self.progress, best, self.step)

    def fit(self, trainer: L.Trainer, module: RunModule, data: L.LightningDataModule, about: str) -> RunResult:
        """Train, and write the run folder. `about`: one line that describes the network and the data.

        Raises Interrupted if a signal ended the run after it saved a checkpoint.
        """
        folder = self.folder
        if self.is_main and not self.resume:
            write_config(module.config, folder)
        if self.is_main and self.ledgers:
            write_data(self.ledgers, folder)
        for name, ledger in self.ledgers.items():
            for line in ledger.lines(f"{name} data: "):
                self.say(line)
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
            self._end(error, trainer, checkpointing)
        if not self.is_main:
            return RunResult(folder, {})
        pace = self.progress.overall
        if pace.images:
            self.say(f"trained at {pace}; best {module.best_title} {best_metric(folder, module.best):.2f} %")
        write_weights(folder)
        return RunResult(folder, last_metrics(folder))

    def _end(self, error: BaseException, trainer: L.Trainer, checkpointing: Checkpointing) -> NoReturn:
        """End the other processes, clear a folder that has no result, and raise the exception that ends the command."""
        has_refused = end_other_processes(trainer, error)
        if checkpointing.signum:  # `error` follows from the signal, which also reaches helper processes of the same group
            raise Interrupted(checkpointing.signum, None, checkpointing.folder.parent) from None
        is_new = not self.resume and not any(self.folder.glob("checkpoints/*.ckpt"))
        is_bad_image = isinstance(error, BadImageError) or (has_refused and not (self.folder / "bad_images.txt").exists())
        if is_bad_image and self.is_main and is_new:
            clear_folder(self.folder)  # a run without a checkpoint is not kept
        if has_refused:
            raise SystemExit(2) from None
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):  # Lightning replaced it
            raise KeyboardInterrupt from None
        raise error


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 5 else f"{', '.join(names[:5])}, … ({len(names)})"


def read_run(folder: Path, changes: Mapping[str, Any], kind: type[C]) -> tuple[C, RunResult | None]:
    """The configuration of the run in `folder`, an instance of `kind`; and the run's result, None if it is not finished.

    `changes`: options with new values. Only RESUME_OPTIONS are allowed: where the data are, and which hardware is used.

    Raises UsageError for a folder that holds no run, and for a change of any other option.
    """
    path = folder / "config.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        unknown = sorted(set(values) - {f.name for f in fields(kind)})
        if unknown:
            raise UsageError(f"{path} is not from a run of dgnet {kind.command}, which has no {flag(unknown[0])}")
        config = kind(**values)
    except FileNotFoundError:
        raise UsageError(f"--resume {folder} is not a run folder: it holds no config.yaml") from None
    except UsageError:
        raise
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read: {reason(error)}") from None
    for name in changes:
        if name not in RESUME_OPTIONS:
            own = {f.name for f in fields(kind)}
            allowed = ", ".join(flag(option) for option in RESUME_OPTIONS if option in own)
            raise UsageError(f"--resume uses the options in {path}: leave out {flag(name)}; these may differ: {allowed}")
    config = replace(config, **changes)
    rows = read_table(folder / "metrics.csv")
    last = folder / "checkpoints" / LAST
    is_done = bool(rows) and int(rows[-1]["epoch"]) + 1 >= config.schedule()[0] and last.exists()
    if not is_done or read_progress(last)[0] <= int(rows[-1]["step"]):
        return config, None
    if is_main_process() and not (folder / "model.safetensors").exists():
        with lock_folder(folder):
            if not (folder / "model.safetensors").exists():
                write_weights(folder)
    return config, RunResult(folder, last_metrics(folder))
