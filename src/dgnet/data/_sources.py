"""From a source string to a data set of labelled images.

A source is `digits`, a folder of class folders, WebDataset shards (`…/train-{000000..000004}.tar`), or a data set name
of timm's readers (`hfds/…`, `torch/cifar10`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dgnet.data._datasets import Digits, Folder, Shards, TimmDataset
from dgnet.data._images import ImageDataset, hold_out
from dgnet.data._labels import number_classes
from dgnet.data._open_stream import check_stream, local_path
from dgnet.data._shards import ShardStream, expand_shards, is_shards, is_stream
from dgnet.data._splits import EVALUATION, TRAIN, has_both, split_folder
from dgnet.errors import UsageError, did_you_mean
from dgnet.paths import absolute, expand, find_kind, is_folder

_READERS = ("hfds", "torch", "tfds", "hfids")


def open_dataset(
    source: str,
    role: str,
    class_names: Sequence[str] | None = None,
    data_root: str = "data",
    needs_labels: bool = True,
    as_before: bool = False,
) -> ImageDataset:
    """The images of `source` for `role`, "train" or "evaluation". Their transform is not set yet.

    Of a folder with train/ and val/ the subfolder of the role is used; for the names of splits see `NAMES` in `_splits.py`. A
    test split is used on request only: `FOLDER/test`, `hfds/NAME:test`. Only torchvision's data sets that have nothing but a
    test set to evaluate on (CIFAR, MNIST) use it. `ledger` of the result tells what was taken and left out.

    `class_names`: the class names in the order of their labels, if they are known from training. `data_root`: the folder of
    timm's readers. `needs_labels`: if False, images in shards may lack a label, and a folder may hold images instead of class
    folders; their label is IGNORED. `as_before`: choose the evaluation split as for a run without data.json.

    Raises UsageError for a source that does not exist, is empty, or has other classes.
    """
    if source == "digits":
        digits = Digits(role)
        if class_names is not None and list(class_names) not in (digits.class_names, number_classes(10)):
            raise UsageError(f"digits has the classes 0 to 9, not the {len(class_names)} known from training")
        return digits
    if source.startswith("file:"):
        source = local_path(source)
    if is_stream(source):
        raise UsageError(f"{source} is a stream, allowed only as --data of training; use local shards, a folder or a data set")
    if is_shards(source):
        return Shards(source if find_kind(source) else source.removeprefix("wds/"), class_names, needs_labels)
    kind = find_kind(source)
    if source.partition("/")[0] in _READERS and kind is None:
        if source.startswith(("hfids/", "tfds/")):
            raise UsageError(f"{source} is a stream; use a map-style source: hfds/…, torch/…, a folder, or shards")
        return TimmDataset(source, role, data_root, class_names, as_before)
    if kind is None:
        raise _missing(source)
    if kind != "folder":
        raise UsageError(f"data source {source!r} is a file; expected a folder of class folders, or shards ending in .tar")
    return Folder(split_folder(Path(source), role, as_before), class_names, needs_labels)


def _missing(source: str) -> UsageError:
    return UsageError(
        f"data source {source!r} does not exist{did_you_mean(source, ['digits'])}; a source is `digits`, a folder of class"
        " folders, shards ending in .tar, or a name like torch/cifar10"
    )


def absolute_source(source: str) -> str:
    """A source as a run stores it: a name or URL as it is, a path or a pattern of paths absolute."""
    if source == "digits" or is_stream(source):
        return source
    if find_kind(source) is None:
        if not is_shards(source):
            return source  # the name of a data set
        prefix = "wds/" if source.startswith("wds/") else ""
        parts = source.removeprefix(prefix).split("::")
        return prefix + "::".join(part if part.startswith("$") or is_stream(part) else absolute(part) for part in parts)
    return absolute(source)


def source_below(source: str, folder: str | Path | None) -> str:
    """A source whose relative paths are those below `folder`; names, URLs and absolute paths as they are.

    Raises UsageError for a relative path without a folder.
    """
    if source == "digits" or is_stream(source):
        return source
    if source.partition("/")[0] in _READERS and (folder is None or find_kind(Path(folder) / source) is None):
        return source
    prefix = "wds/" if is_shards(source) and source.startswith("wds/") else ""
    parts = source.removeprefix(prefix).split("::") if is_shards(source) else [source]
    return prefix + "::".join(part if part.startswith("$") or is_stream(part) else _below(part, folder) for part in parts)


def _below(path: str, folder: str | Path | None) -> str:
    if os.path.isabs(expand(path)):
        return str(expand(path))
    if folder is None:
        raise UsageError(f"{path} is a relative path; name the folder that holds it with --data")
    return str(Path(folder) / path)


def check_source(source: str) -> None:
    """Raises UsageError if a source names files that are not there. They are not opened, and a stream is not read."""
    if source == "digits" or is_stream(source):
        return
    if is_shards(source):
        expand_shards(source)
    elif find_kind(source) is None and source.partition("/")[0] not in _READERS:
        raise _missing(source)


def gives_both(source: str) -> bool:
    """Whether a source may have training and evaluation images of its own."""
    if source == "digits" or source.startswith(("hfds/", "torch/")):
        return True
    return not is_stream(source) and has_both(Path(source))


def _is_same(one: str, other: str) -> bool:
    return absolute_source(one) == absolute_source(other) or (
        is_folder(one) and is_folder(other) and os.path.samefile(one, other)
    )


def open_train_and_evaluation(
    source: str,
    val_source: str | None,
    data_root: str = "data",
    holdout: int = 0,
    epoch_images: int | None = None,
    as_before: bool = False,
) -> tuple[ImageDataset | ShardStream, ImageDataset]:
    """The training images of `source` and the evaluation images of `val_source`, with the same classes.

    `holdout`: if above 0, evaluate on this many of the training images instead, and train on the others. `epoch_images`: number
    of images in an epoch of a stream. `as_before`: see `open_dataset`.

    Raises UsageError if `val_source` is missing and `source` has no evaluation images. Data is never split without `holdout`.
    """
    if is_stream(source) and not (source.startswith("file:") and epoch_images is None):
        if holdout:
            raise UsageError(f"{source} is a stream, from which no images can be held out; leave out --holdout")
        if val_source is None:
            raise UsageError(f"{source} is a stream, which has the classes of --val-data; add --val-data SOURCE")
        if epoch_images is None:
            raise UsageError(f"{source} is a stream, which has no length; give the images of an epoch with --epoch-images")
        evaluation = open_dataset(val_source, EVALUATION, data_root=data_root, as_before=as_before)
        stream = ShardStream(source, evaluation.class_names, epoch_images)
        check_stream(stream.paths[0])
        return stream, evaluation
    if epoch_images is not None:
        raise UsageError(f"--epoch-images is for streams; an epoch of {source} is each of its images once; leave it out")
    if holdout:
        return hold_out(open_dataset(source, TRAIN, data_root=data_root), holdout)
    if val_source is None and not gives_both(source):
        open_dataset(source, TRAIN, data_root=data_root)  # reports a source that does not exist first
        raise UsageError(f"{source} has no evaluation images of its own; give them with --val-data SOURCE")
    if val_source is None and is_folder(source):
        split_folder(Path(source), EVALUATION, as_before)  # reports that it has none before the training images are listed
    train = open_dataset(source, TRAIN, data_root=data_root)
    evaluation = open_dataset(val_source or source, EVALUATION, train.class_names, data_root, as_before=as_before)
    if _is_same(train.ledger.source, evaluation.ledger.source):
        evaluation.ledger.warnings.append(f"{train.ledger.source}: training and evaluation use the same images")
    return train, evaluation
