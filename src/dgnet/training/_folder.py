"""A run's folder: making it, keeping other processes out of it, and the files in it."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from dgnet._streams import escape
from dgnet.checkpoint import DESCRIPTION, damaged, read_tensors, save_tensors
from dgnet.data import Ledger
from dgnet.errors import UsageError
from dgnet.evaluation import DATA
from dgnet.files import lock, replace_file, writing
from dgnet.paths import expand, find_kind, is_file, is_folder, list_folder
from dgnet.training._checkpointing import FINGERPRINT, LAST, fingerprint
from dgnet.training._config import RunConfig
from dgnet.training._history import read_history
from dgnet.typed import Label, read_entry

BAD_IMAGES = "bad_images.txt"
PATIENCE = 10.0
"""Seconds to wait for the lock of a run folder: after a run is killed, its loading processes hold the lock a little longer."""


def make_folder(config: RunConfig) -> tuple[Path, list[Path]]:
    """Make the run folder: `--output`, or the next free one. Returns it, and all new folders, the innermost first.

    Raises UsageError if the folder is not empty or cannot be made.
    """
    if config.output is not None:
        folder = expand(config.output)
        if find_kind(folder) not in (None, "folder"):
            raise UsageError(f"--output {folder} is a file; name a folder")
        if escape(str(folder.absolute())) != str(folder.absolute()):
            raise UsageError(
                f"--output {folder}: the name is not UTF-8, which TensorBoard cannot write to; name another folder"
            )
        check_empty(folder)
        made = [path for path in (folder, *folder.parents) if find_kind(path) is None]
        with writing(f"the run folder {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
        return folder, made
    runs = Path("runs")
    made = [runs] if find_kind(runs) is None else []
    with writing(runs):
        runs.mkdir(exist_ok=True)
    for number in itertools.count(1):
        folder = runs / f"{config.model}-{number}"
        with writing(f"the run folder {folder}"), suppress(FileExistsError):
            folder.mkdir()
            break
    return folder, [folder, *made]


def check_empty(folder: Path) -> None:
    """Raises UsageError if `folder`, of `--output`, is not empty. The list of bad images of an earlier try does not count."""
    if is_folder(folder) and any(path.name != BAD_IMAGES for path in list_folder(folder)):
        held = "holds a run" if is_file(folder / "config.yaml") else "is not empty"
        raise UsageError(f"--output {folder} already {held}; name another folder, or move that one away")


def clear_folder(folder: Path) -> None:
    """Remove what a run without a checkpoint has written to `folder`, except the list of bad images."""
    with suppress(OSError, UsageError):  # a file system may refuse; the error that ended the run is the one to report
        for path in list_folder(folder):
            if path.name != BAD_IMAGES:
                shutil.rmtree(path) if is_folder(path) else path.unlink()


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


@dataclass(frozen=True)
class Progress:
    """How far the run of a checkpoint is, and what it was trained as."""

    step: int  # steps taken
    class_names: list[str]
    config: dict[str, Any]  # the run's options


def read_progress(checkpoint: Path) -> Progress:
    """The progress in a checkpoint of a run. Raises UsageError for a file that a run cannot continue from."""
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # torch may raise anything for damaged bytes
        raise UsageError(
            f"{checkpoint} is damaged or not a checkpoint of a run; replace it with another, such as best.ckpt"
        ) from None
    with damaged(checkpoint):
        what = "the state of the run"
        step = read_entry(content, "global_step", int, what)
        if step < 0:
            raise UsageError(f"{what}: global_step must be at least 0, got {step}")
        for name in ("state_dict", "loops", "callbacks", "optimizer_states", "lr_schedulers"):
            if not content.get(name):
                raise UsageError(f"{what} lacks {name}")
        counts = content["loops"]
        for name in ("fit_loop", "epoch_loop.automatic_optimization.optim_progress", "optimizer", "step", "total"):
            counts = read_entry(counts, name, dict[str, Any], f"{what}: loops")
        if counts.get("completed") != step:
            raise UsageError(f"{what}: global_step is {step}, and the optimizer took {counts.get('completed')} steps")
        description = content.get("dgnet", {})
        progress = Progress(
            step,
            read_entry(description, "class_names", list[Label], DESCRIPTION),
            read_entry(description, "config", dict[str, Any], DESCRIPTION),
        )
        if content.get(FINGERPRINT, fresh := fingerprint(content)) != fresh:
            raise UsageError(f"{what} was changed after it was written")
    return progress


def best_metric(folder: Path, name: str) -> float:
    """The highest value of a column of metrics.csv; if training has phases, in the last one."""
    rows = read_history(folder)
    return max(row[name] for row in rows if name in row and row.get("phase") == rows[-1].get("phase"))
