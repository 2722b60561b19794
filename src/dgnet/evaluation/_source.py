"""The images that a checkpoint is evaluated on."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from dgnet.checkpoint import Checkpoint
from dgnet.data import EVALUATION, TRAIN, BadImages, ImageDataset, hold_out, open_dataset, set_max_pixels
from dgnet.paths import find_kind

DATA = "data.json"
"""The file of a run folder that tells what the run's data were."""


def describe_source(checkpoint: Checkpoint, source: str | None) -> str:
    """A description of the images that a checkpoint is evaluated on; see `open_evaluation_data`."""
    config = checkpoint.config
    if source is None and config.get("holdout"):
        return f"{config['holdout']} held-out images of {config['data']}"
    return str(source or config.get("val_data") or config["data"])


def open_evaluation_data(
    checkpoint: Checkpoint, source: str | None = None, data_root: str | None = None, needs_labels: bool = True
) -> ImageDataset:
    """The images of `source`, with the checkpoint's preprocessing. Default: the evaluation images of the checkpoint's run.

    `dataset.ledger` tells which split it is, and what was taken and left out; `announce` prints it.
    If the run used `--on-bad-image skip`, the images that it skipped are left out, and a line on stderr gives their number.
    `data_root`: by default that of the run. `needs_labels`: see `dgnet.data.open_dataset`.

    Raises UsageError for a source that does not exist or has classes that the checkpoint does not have.
    """
    config = checkpoint.config
    set_max_pixels(config.get("max_pixels"), is_default=True)
    root = data_root or config.get("data_root", "data")
    if source is None and config.get("holdout"):
        whole = open_dataset(config["data"], TRAIN, checkpoint.class_names, root)
        dataset: ImageDataset = hold_out(whole, config["holdout"])[1]
    else:
        as_before = source is None and _is_of_old_run(checkpoint.path)
        source = source or config.get("val_data") or config["data"]
        dataset = open_dataset(source, EVALUATION, checkpoint.class_names, root, needs_labels, as_before)
    if config.get("on_bad_image") == "skip":
        dataset = _leave_out_bad(dataset, checkpoint.path)
    dataset.transform = checkpoint.preprocessing.evaluation_transform()
    return dataset


def announce(dataset: ImageDataset) -> None:
    """Print what the data set gave and left out on stderr, in the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print("\n".join(dataset.ledger.lines("evaluation data: ")), file=sys.stderr)


def _is_of_old_run(path: Path) -> bool:
    """Whether a checkpoint lies in the folder of a run that did not store what its data were.

    Such a run may have been evaluated on test/, which versions of that time took if there was no val/.
    """
    return any(
        find_kind(folder / "config.yaml") and not find_kind(folder / DATA) for folder in (path.parent, path.parent.parent)
    )


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
