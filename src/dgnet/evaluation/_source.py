"""The images that a checkpoint is evaluated on."""

from __future__ import annotations

import sys
from pathlib import Path

from dgnet.checkpoint import Checkpoint
from dgnet.data import EVALUATION, TRAIN, BadImages, ImageDataset, hold_out, open_dataset


def describe_source(checkpoint: Checkpoint, source: str | None) -> str:
    """The images that a checkpoint is evaluated on, in words: `source`, or what its run was evaluated on."""
    config = checkpoint.config
    if source is None and config.get("holdout"):
        return f"{config['holdout']} held-out images of {config['data']}"
    return str(source or config.get("val_data") or config["data"])


def open_evaluation_data(
    checkpoint: Checkpoint, source: str | None = None, data_root: str | None = None, needs_labels: bool = True
) -> ImageDataset:
    """`source`, by default what the checkpoint's run was evaluated on, with the checkpoint's preprocessing.

    `needs_labels`: see `dgnet.data.open_dataset`.

    Images that the run skipped, as its `--on-bad-image skip` had asked for, are left out, and a line on stderr says so.

    Raises UsageError for a source that is not there or has classes unknown to it.
    """
    config = checkpoint.config
    root = data_root or config.get("data_root", "data")
    if source is None and config.get("holdout"):
        whole = open_dataset(config["data"], TRAIN, checkpoint.class_names, root)
        dataset: ImageDataset = hold_out(whole, config["holdout"])[1]
    else:
        source = source or config.get("val_data") or config["data"]
        dataset = open_dataset(source, EVALUATION, checkpoint.class_names, root, needs_labels)
    if config.get("on_bad_image") == "skip":
        dataset = _leave_out_bad(dataset, checkpoint.path)
    dataset.transform = checkpoint.preprocessing.evaluation_transform()
    return dataset


def _leave_out_bad(dataset: ImageDataset, path: Path) -> ImageDataset:
    """Without what the run that wrote the checkpoint `path` skipped."""
    whole = len(dataset)
    for folder in (path.parent, path.parent.parent):
        listed = folder / "bad_images.txt"
        dataset = BadImages(listed, limit=0).leave_out(dataset)
        if len(dataset) < whole:
            print(f"{whole - len(dataset)} of {whole:,} images are left out: {listed} says why", file=sys.stderr)
            break
    return dataset
