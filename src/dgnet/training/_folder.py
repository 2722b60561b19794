"""A run's folder: making it, keeping other processes out of it, and the files in it."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
import yaml

from dgnet.checkpoint import read_tensors, save_tensors
from dgnet.data import Ledger
from dgnet.errors import UsageError
from dgnet.evaluation import DATA
from dgnet.files import lock, read_table, replace_file, writing
from dgnet.training._checkpointing import LAST
from dgnet.training._config import RunConfig

PATIENCE = 10.0
"""Seconds to wait for the lock of a run folder: after a run is killed, its loading processes hold the lock a little longer."""


def make_folder(config: RunConfig) -> tuple[Path, list[Path]]:
    """Make the run folder: `--output`, or the next free one. Returns it, and all new folders, the innermost first.

    Raises UsageError if the folder is not empty or cannot be made.
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
    """Raises UsageError if `folder`, named by `--output`, is not empty."""
    if folder.is_dir() and any(folder.iterdir()):
        held = "holds a run" if (folder / "config.yaml").exists() else "is not empty"
        raise UsageError(f"--output {folder} already {held}; name another folder, or move that one away")


def clear_folder(folder: Path) -> None:
    """Remove everything in `folder`."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def lock_folder(folder: Path) -> AbstractContextManager[None]:
    """Inside the `with` block: no other process can train in `folder`. Raises UsageError if one does already."""
    return lock(folder, f"another process trains in {folder}; stop that process first, or name another folder", PATIENCE)


def write_config(config: RunConfig, folder: Path) -> None:
    """Write config.yaml, from which the run can be repeated in a new folder. Raises UsageError if it cannot be written."""
    text = yaml.safe_dump({**asdict(config), "output": None}, sort_keys=False, allow_unicode=True)
    with writing(f"the run folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)  # another process that waited for the lock may have removed it
        with replace_file(folder / "config.yaml") as written:
            written.write_text(text, encoding="utf-8")


def write_data(ledgers: Mapping[str, Ledger], folder: Path) -> None:
    """Write data.json: what each data set gave and what was left out. Raises UsageError if it cannot be written."""
    document = {name: ledger.document() for name, ledger in ledgers.items()}
    with writing(f"the run folder {folder}"), replace_file(folder / DATA) as written:
        written.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(folder: Path) -> None:
    """Write model.safetensors from the last checkpoint."""
    tensors, carried = read_tensors(folder / "checkpoints" / LAST)
    path = folder / "model.safetensors"
    with writing(path, f"then continue with --resume {folder}"):
        save_tensors(tensors, path, carried or {})


def read_progress(checkpoint: Path) -> tuple[int, list[str]]:
    """The number of steps taken, and the class names. Raises UsageError for a damaged file."""
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        return int(content["global_step"]), list(content["dgnet"]["class_names"])
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, pickle.UnpicklingError):
        raise UsageError(
            f"{checkpoint} is damaged or not a checkpoint of a run; replace it with another, such as best.ckpt"
        ) from None


def last_metrics(folder: Path) -> dict[str, float]:
    """The last row of metrics.csv, without empty cells."""
    row = read_table(folder / "metrics.csv")[-1]
    return {name: float(value) for name, value in row.items() if value != ""}


def best_metric(folder: Path, name: str) -> float:
    """The highest value of a column of metrics.csv."""
    return max(float(row[name]) for row in read_table(folder / "metrics.csv") if row.get(name))
