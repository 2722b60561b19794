"""A run: from its start or its last checkpoint to its end or its interruption."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import lightning as L
import torch

from dgnet._streams import forget_closed_pipe, say
from dgnet.code import import_packages, list_packages
from dgnet.data import Ledger, absolute_source, compose
from dgnet.documents import read_yaml
from dgnet.errors import MachineError, UsageError, WriteError, describe_failure_of_machine, reason
from dgnet.evaluation import DATA
from dgnet.graph import accept_cuts
from dgnet.models import TimmNetwork, create_model, find_channels
from dgnet.options import flag
from dgnet.paths import absolute, find_kind, is_file
from dgnet.training._checkpointing import LAST, Checkpointing, Interrupted
from dgnet.training._config import RESUME_OPTIONS, RunConfig
from dgnet.training._folder import (
    BAD_IMAGES,
    Progress,
    best_metric,
    check_empty,
    clear_folder,
    lock_folder,
    make_folder,
    read_progress,
    write_config,
    write_data,
    write_weights,
)
from dgnet.training._history import read_history
from dgnet.training._module import RunModule
from dgnet.training._processes import end_other_processes, is_main_process
from dgnet.training._progress import Progress as ProgressBar
from dgnet.training._trainer import build_trainer, quiet_lightning
from dgnet.typed import hints_of, is_location, read_fields

C = TypeVar("C", bound=RunConfig)


@dataclass(frozen=True)
class RunResult:
    """A run's folder, and the metrics of its last epoch: the last row of metrics.csv."""

    folder: Path
    metrics: dict[str, float]


@contextmanager
def open_run(config: RunConfig, resume: Path | None) -> Iterator[Run]:
    """A run that is about to start, or to continue in the folder `resume`. Its folder is locked inside the `with` block.

    A new folder that is still empty at the end is removed. The packages of `--import` are imported first.

    Raises UsageError for a folder that is not empty or in which another process trains, and for a damaged checkpoint.
    """
    import_packages(list_packages(config.imports, flag("imports")), flag("imports"))
    if not is_main_process(config.nodes):  # the first process chose the folder
        yield Run(config, resume, resume or Path(config.output or "runs"))
        return
    forget_closed_pipe()
    folder, made = (resume, []) if resume else make_folder(config)
    try:
        with lock_folder(folder):
            if not resume:
                check_empty(folder)
                (folder / BAD_IMAGES).unlink(missing_ok=True)
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
        self.progress = ProgressBar()
        self.resume = resume
        self.folder = folder
        self.last = self.folder / "checkpoints" / LAST
        self.step: int | None = None
        self.class_names: list[str] | None = None  # of the resumed run
        self.ledgers: dict[str, Ledger] = {}
        if resume and is_file(self.last):
            progress = read_progress(self.last)
            check_unchanged(config, progress, self.folder / "config.yaml")
            self.step, self.class_names = progress.step, progress.class_names
        if resume and self.is_main:
            for part in self.folder.rglob(".*.part"):  # left over if the run was killed while it wrote a file
                if is_file(part):
                    part.unlink()
        L.seed_everything(config.seed, workers=True, verbose=False)

    def create_network(self, config: RunConfig, **options: Any) -> TimmNetwork:
        """The network of the run, untrained. A resumed run may have gates that a new one may not; see `NodeGates`."""
        with accept_cuts() if self.resume else nullcontext():
            return create_model(config.model, **options, **config.network_kwargs)

    def say(self, line: str) -> None:
        """Print a line on stderr, in the first process only."""
        if self.is_main:
            say(line)

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
            if not self.is_main:
                return RunResult(folder, {})
            pace = self.progress.overall
            if pace.images:
                self.say(f"trained at {pace}; best {module.best_title} {best_metric(folder, module.best):.2f} %")
            write_weights(folder)
            return RunResult(folder, read_history(folder)[-1])
        except Interrupted:
            raise
        except BaseException as error:
            is_restoring = (
                self.step is not None and not checkpointing.has_started and describe_failure_of_machine(error) is None
            )
            if is_restoring and isinstance(error, _MISFIT) and not isinstance(error, UsageError):
                raise UsageError(
                    f"{self.last} is damaged: its state does not fit the run ({reason(error)}); replace it with another"
                ) from error
            self._end(error, trainer, checkpointing, module.config)

    def _end(self, error: BaseException, trainer: L.Trainer, checkpointing: Checkpointing, config: RunConfig) -> NoReturn:
        """End the other processes, clear a folder that has no checkpoint, and raise the exception that ends the command."""
        has_refused = end_other_processes(trainer, error)
        if checkpointing.signum:  # `error` follows from the signal, which also reaches helper processes of the same group
            raise Interrupted(checkpointing.signum, None, checkpointing.folder.parent, checkpointing.cause) from None
        has_checkpoint = any(self.folder.glob("checkpoints/*.ckpt"))
        if self.is_main and not self.resume and not has_checkpoint:
            clear_folder(self.folder)  # the same command can be typed again
        if has_refused:
            raise SystemExit(2) from None
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):  # Lightning replaced it
            error = error.__context__
        if isinstance(error, KeyboardInterrupt):
            if has_checkpoint or self.resume:
                raise Interrupted(getattr(error, "signum", signal.SIGINT), None, self.folder) from None
            raise error from None
        if has_checkpoint or self.resume:
            kept, how = self._describe_checkpoint(), f"continue with --resume: dgnet {config.command} --resume {self.folder}"
        else:
            kept, how = "no checkpoint was written yet", "type the same command again"
        if isinstance(error, WriteError):
            full, free = ("the disk is full: ", "free some space, ") if error.is_full else ("", "")
            raise WriteError(f"{full}{error.problem}", f"{kept}; {free}then {how}") from None
        if isinstance(error, ValueError) and "Expected more than 1" in str(error):
            raise UsageError(one_value_line(config, trainer.world_size)) from None
        line = None if isinstance(error, UsageError) else describe_failure_of_machine(error)
        if line is not None:
            raise MachineError(f"{line}; {kept}; then {how}") from error
        raise error

    def _describe_checkpoint(self) -> str:
        """One clause on the checkpoint with which the run continues."""
        try:
            return f"the checkpoint {self.last} of step {read_progress(self.last).step:,} is whole"
        except UsageError:
            return f"{self.folder} holds no whole last checkpoint yet"


def one_value_line(config: RunConfig, processes: int) -> str:
    """The message for a batch normalisation that sees one value of each channel in training."""
    images = config.batch_size // (config.accumulate * processes)
    return (
        f"{config.model} cannot be trained with {images} image in a forward pass (--batch-size {config.batch_size},"
        f" --accumulate {config.accumulate}, {processes} process{'es' * (processes > 1)}): its batch normalisation then has one"
        " value for each channel; use a larger --batch-size, a smaller --accumulate, or larger images"
    )


def check_single_image(network: torch.nn.Module, image_size: Sequence[int], config: RunConfig, processes: int) -> None:
    """Raises UsageError if a forward pass in training has one image, and batch normalisation one value for each channel.

    `image_size`: height and width in pixels. The pass runs on the meta device, without values.
    """
    if config.batch_size != config.accumulate * processes or config.sync_bn:
        return
    trained = deepcopy(network).to("meta").train()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            trained(torch.empty(1, find_channels(network), *image_size, device="meta"))
    except ValueError as error:
        if "Expected more than 1" in str(error):
            raise UsageError(one_value_line(config, processes)) from None
    except Exception:  # a layer that cannot run on the meta device: the first step tells
        return


# What torch and Lightning raise when they restore a state that does not fit.
_MISFIT = (LookupError, TypeError, ValueError, AttributeError, RuntimeError)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 5 else f"{', '.join(names[:5])}, … ({len(names)})"


def read_run(folder: Path, changes: Mapping[str, Any], kind: type[C]) -> tuple[C, RunResult | None]:
    """The configuration of the run in `folder`, an instance of `kind`; and the run's result, None if it is not finished.

    `changes`: options with new values. Only RESUME_OPTIONS are allowed: where the data are, and which hardware is used.

    Raises UsageError for a folder that holds no run, and for a change of any other option.
    """
    path = folder / "config.yaml"
    if not is_file(path):
        raise UsageError(f"--resume {folder} is not a run folder: it holds no config.yaml")
    values = read_yaml(path)
    unknown = sorted(map(str, set(values) - {f.name for f in fields(kind)})) if isinstance(values, dict) else []
    if unknown:
        raise UsageError(f"{path} is not from a run of dgnet {kind.command}, which has no {flag(unknown[0])}")
    config = read_fields(kind, values, str(path), flag)
    if "data" not in values:  # the option's default would be other images
        raise UsageError(f"{path} lacks {flag('data')}")
    for name in changes:
        if name not in RESUME_OPTIONS:
            own = {f.name for f in fields(kind)}
            allowed = ", ".join(flag(option) for option in RESUME_OPTIONS if option in own)
            raise UsageError(f"--resume uses the options in {path}: leave out {flag(name)}; these may differ: {allowed}")
    if changes.get("imports"):  # typed again, because a file cannot make code trusted; what the run imports stays
        changes = {**changes, "imports": ",".join(filter(None, [config.imports, changes["imports"]]))}
    config = replace(config, **changes)
    rows = read_history(folder)
    if rows and rows[-1]["epoch"] + 1 > config.schedule()[0]:
        raise UsageError(
            f"{folder / 'metrics.csv'} is damaged: its last row is of epoch {rows[-1]['epoch']}, counted from 0,"
            f" and the run has {config.schedule()[0]}; remove the rows that are not of this run"
        )
    last = folder / "checkpoints" / LAST
    is_done = bool(rows) and rows[-1]["epoch"] + 1 >= config.schedule()[0] and is_file(last)
    if not is_done:
        return config, None
    progress = read_progress(last)
    check_unchanged(config, progress, path)
    if progress.step <= rows[-1]["step"]:
        return config, None
    if is_main_process() and not is_file(folder / "model.safetensors"):
        with lock_folder(folder):
            if not is_file(folder / "model.safetensors"):
                write_weights(folder)
    return config, RunResult(folder, rows[-1])


def with_absolute_paths(config: C, sources: Sequence[str] = ()) -> C:
    """`config` as the run stores it: what it names is found from every folder. `sources`: the options that hold a data source.

    `output` stays as it is: a run does not store where it lies.
    """
    hints = hints_of(type(config))
    given = {name: getattr(config, name) for name in hints if name != "output" and is_location(hints[name])}
    paths: dict[str, Any] = {
        name: absolute_source(path) if name in sources else absolute(path) for name, path in given.items() if path is not None
    }
    return replace(config, **paths)


def check_unchanged(config: RunConfig, progress: Progress, path: Path) -> None:
    """Raises UsageError if `config`, from the file `path`, differs from what the checkpoint was trained with.

    What has no effect on a resumed run may differ: RESUME_OPTIONS, output, weights, and what its version of dgnet did not have.
    """
    kind = type(config)
    known = {f.name for f in fields(kind)} - {*RESUME_OPTIONS, "output", "weights"}
    stored = {name: value for name, value in progress.config.items() if name in known}
    trained = read_fields(kind, {**asdict(config), **stored}, str(path), flag)
    for name in stored:
        if getattr(trained, name) != getattr(config, name):
            raise UsageError(
                f"{path} was changed: {flag(name)} is {getattr(config, name)!r}, and the run was trained with"
                f" {getattr(trained, name)!r}; change it back, or start a new run with --config {path} and --output"
            )
