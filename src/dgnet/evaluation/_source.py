"""The images that a checkpoint is evaluated on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from dgnet._streams import say_once
from dgnet.checkpoint import Checkpoint, RunData
from dgnet.data import (
    EVALUATION,
    TRAIN,
    BadImages,
    ImageDataset,
    Ledger,
    Photos,
    Unlabelled,
    hold_out,
    is_shards,
    open_dataset,
    set_max_pixels,
)
from dgnet.errors import UsageError
from dgnet.paths import find_kind

DATA = "data.json"
"""The file of a run folder that tells what the run's data were."""


def describe_source(checkpoint: Checkpoint, source: str | None) -> str:
    """A description of the images that a checkpoint is evaluated on; see `open_evaluation_data`."""
    if source is not None:
        return source
    run = checkpoint.data
    return f"{run.holdout} held-out images of {run.data}" if run.holdout else run.val_data or run.data


def open_evaluation_data(
    checkpoint: Checkpoint,
    source: str | None = None,
    data_root: str | None = None,
    needs_labels: bool = True,
    drops_labels: bool = False,
) -> ImageDataset:
    """The images of `source`, with the checkpoint's preprocessing. Default: the evaluation images of the checkpoint's run.

    `dataset.ledger` tells which split it is, and what was taken and left out; `announce` prints it.
    If the run used `--on-bad-image skip`, the images that it skipped are left out, and a line on stderr gives their number.
    `data_root`: by default that of the run. `needs_labels`: see `dgnet.data.open_dataset`. `drops_labels`: if True, images of
    any classes are taken, without labels.

    Raises UsageError for a source that does not exist or has classes that the checkpoint does not have.
    """
    run = checkpoint.data if checkpoint.config or source is None else RunData(source)
    set_max_pixels(run.max_pixels, is_default=True)
    root = data_root or run.data_root
    names = None if drops_labels else checkpoint.class_names
    if source is None and run.holdout:
        whole = open_dataset(run.data, TRAIN, names, root)
        dataset: ImageDataset = hold_out(whole, run.holdout)[1]
    else:
        as_before = source is None and _is_of_old_run(checkpoint.path)
        source = source or run.val_data or run.data
        dataset = open_dataset(source, EVALUATION, names, root, needs_labels, as_before)
    if run.on_bad_image == "skip":
        dataset = _leave_out_bad(dataset, checkpoint.path)
    dataset = Unlabelled(dataset) if drops_labels else dataset
    dataset.transform = checkpoint.preprocessing.evaluation_transform()
    return dataset


def open_photos(checkpoint: Checkpoint, sources: Sequence[str]) -> tuple[ImageDataset, str]:
    """Photos on which networks are compared, with the checkpoint's preprocessing, and a line on why they have no labels, or "".

    `sources`: image files, or one source as in `open_evaluation_data`. Images whose classes the checkpoint does not have are
    taken without labels. Raises UsageError for a source that does not exist or holds no images.
    """
    why = ""
    if len(sources) == 1 and (find_kind(sources[0]) != "file" or is_shards(sources[0])):
        try:
            return open_evaluation_data(checkpoint, sources[0], needs_labels=False), ""
        except UsageError as error:
            why = f"{error}; top-1 is left out"
        if find_kind(sources[0]) != "folder":  # if the classes are not the reason, this raises the same error
            return open_evaluation_data(checkpoint, sources[0], needs_labels=False, drops_labels=True), why
    photos = Photos(sources)
    photos.transform = checkpoint.preprocessing.evaluation_transform()
    return photos, why


class HasLedger(Protocol):
    """A data set that tells what it gave and left out."""

    @property
    def ledger(self) -> Ledger: ...


def announce(dataset: HasLedger) -> None:
    """Print what the data set gave and left out on stderr, in the first process only."""
    for line in dataset.ledger.lines("evaluation data: "):
        say_once(line)


def _is_of_old_run(path: Path) -> bool:
    """Whether a checkpoint lies in the folder of a run that did not store what its data were.

    Such a run may have been evaluated on test/, which versions of that time took if there was no val/.
    """
    folders = [folder for folder in (path.parent, path.parent.parent) if find_kind(folder / "config.yaml")]
    return bool(folders) and not find_kind(folders[0] / DATA)


def _leave_out_bad(dataset: ImageDataset, path: Path) -> ImageDataset:
    """`dataset` without the images that the run of the checkpoint `path` skipped."""
    whole = len(dataset)
    for folder in (path.parent, path.parent.parent):
        listed = folder / "bad_images.txt"
        dataset = BadImages(listed, limit=0).leave_out(dataset)
        if len(dataset) < whole:
            print(
                f"{whole - len(dataset)} of {whole:,} images are left out; {listed} lists them with the reasons",
                file=sys.stderr,
            )
            break
    return dataset
