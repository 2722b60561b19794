"""From a source string to a data set of labelled images.

A source is `digits`, a folder of class folders, WebDataset shards (`…/train-{000000..000004}.tar`), or a data set name
of timm's readers (`hfds/…`, `torch/cifar10`).
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from dgnet.data._images import IGNORED, ImageDataset, check_label, hold_out, read_image, to_rgb
from dgnet.data._shards import ShardStream, expand_shards, is_stream, no_label, read_classes, walk_shard
from dgnet.errors import BadImageError, UsageError, did_you_mean, reason

TRAIN, EVALUATION = "train", "evaluation"
_FOLDERS = {TRAIN: ("train",), EVALUATION: ("val", "validation", "test")}
_SPLITS = {TRAIN: ("train",), EVALUATION: ("validation", "test")}


def map_labels(source: str, own: Sequence[str], known: Sequence[str]) -> list[int]:
    """For each class name in `own` its label: its position in `known`. Raises UsageError for a class that is not in `known`."""
    if list(own) == list(known):  # not by name, because names may repeat (ImageNet has two classes "crane")
        return list(range(len(known)))
    labels = {name: label for label, name in enumerate(known)}
    unknown = [name for name in own if name not in labels]
    if unknown:
        raise UsageError(
            f"{source}: class {unknown[0]!r} is not one of the {len(known)} classes known from training"
            f"{did_you_mean(unknown[0], known)}"
        )
    return [labels[name] for name in own]


class Digits(ImageDataset):
    """scikit-learn's 1,797 handwritten digits, 8×8 pixels, grey. Every fifth image of each class is for evaluation."""

    flips = False

    def __init__(self, role: str) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        rank_in_class = np.zeros(len(digits.target), dtype=int)
        for label in range(10):
            members = digits.target == label
            rank_in_class[members] = np.arange(members.sum())
        chosen = (rank_in_class % 5 == 4) == (role == EVALUATION)
        self.images = (digits.images[chosen] * (255 / 16)).round().astype(np.uint8)
        self.labels = digits.target[chosen].tolist()
        self.class_names = [str(label) for label in range(10)]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[Any, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), self.labels[index]

    def name(self, index: int) -> str:
        return f"digits, image {index}"


class Folder(ImageDataset):
    """A folder of class folders. The classes are the sorted names of the folders, or `class_names` if given.

    If `needs_labels` is False, the folder may hold images instead of class folders; their label is IGNORED.
    """

    def __init__(self, root: Path, class_names: Sequence[str] | None = None, needs_labels: bool = True) -> None:
        try:
            folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        except OSError as error:
            raise UsageError(f"{root} cannot be read: {reason(error)}") from None
        if not folders and needs_labels:
            raise UsageError(f"{root} holds no class folders; a data folder looks like {root}/CLASS/IMAGE.jpg")
        self.class_names = list(class_names) if class_names is not None else folders
        labels = dict(zip(folders, map_labels(str(root), folders, self.class_names), strict=True)) or {"": IGNORED}
        self.samples = [
            (path, label)
            for name, label in labels.items()
            for path in sorted((root / name).rglob("*"))
            if path.suffix.lower() in IMG_EXTENSIONS
            and (folders or not any(part.startswith(".") for part in path.relative_to(root).parts))
        ]
        if not self.samples:
            where = f" in its {len(folders)} class folders" if folders else ""
            raise UsageError(f"{root} holds no images{where}; allowed extensions: {' '.join(IMG_EXTENSIONS)}")

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return read_image(path), label

    def name(self, index: int) -> str:
        return str(self.samples[index][0])


class Shards(ImageDataset):
    """Local WebDataset shards as a map-style data set. It keeps an index of tar offsets and reads an image with one seek.

    A sample is two files with the same key: an image (`jpg`, `png`, …), and its label as text (`cls`). Class names are read
    from `classes.txt` beside the shards, one per line, if there is one. If `class_names` is given too, labels are mapped to it
    by name. If `needs_labels` is False, an image without a label gets the label IGNORED.
    """

    def __init__(self, pattern: str, class_names: Sequence[str] | None = None, needs_labels: bool = True) -> None:
        self.needs_labels = needs_labels
        self.paths = expand_shards(pattern)
        self.samples: list[tuple[int, str, int, int]] = []  # shard, key, offset, size
        self.labels: list[int] = []
        for shard, path in enumerate(tqdm(self.paths, desc="indexing shards", leave=False, disable=None)):
            self._index(shard, path)
        if not self.samples:
            raise UsageError(f"{pattern} holds no samples; a sample is KEY.jpg with its label in KEY.cls")
        own = read_classes(self.paths[0])
        names = class_names or own or [str(label) for label in range(max(*self.labels, 0) + 1)]
        self.class_names = list(names)
        for (shard, key, _, _), label in zip(self.samples, self.labels, strict=True):
            if label == IGNORED:
                continue
            check_label(f"{self.paths[shard]}, sample {key}", label, len(own or self.class_names))
        if own is not None:
            mapped = map_labels(pattern, own, self.class_names)
            self.labels = [label if label == IGNORED else mapped[label] for label in self.labels]

    def _index(self, shard: int, path: str) -> None:
        images: dict[str, tuple[int, int]] = {}
        labels: dict[str, int] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for key, member, label in walk_shard(tar, path):
                    if label is None:
                        images[key] = (member.offset_data, member.size)
                    else:
                        labels[key] = label
                end = tar.offset
        except (tarfile.TarError, EOFError, OSError) as error:
            raise UsageError(f"{path} is not a readable tar file ({reason(error)}); copy it again") from None
        with open(path, "rb") as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:  # tarfile does not notice a cut file
                raise UsageError(f"{path} is cut short: it lacks the end mark of a tar file; copy it again")
        for key, (offset, size) in images.items():
            if key not in labels and self.needs_labels:
                raise no_label(path, key)
            if labels.get(key, 0) < 0:  # a negative label in the file must not be mistaken for IGNORED
                check_label(f"{path}, sample {key}", labels[key], 1)
            self.samples.append((shard, key, offset, size))
            self.labels.append(labels.get(key, IGNORED))

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[Any, int]:
        shard, _, offset, size = self.samples[index]
        try:
            with open(self.paths[shard], "rb", buffering=0) as file:
                file.seek(offset)
                return file.read(size), self.labels[index]
        except OSError as error:
            raise UsageError(f"{self.name(index)} cannot be read: {reason(error)}") from None

    def name(self, index: int) -> str:
        shard, key, _, _ = self.samples[index]
        return f"{self.paths[shard]}, sample {key}"


class TimmDataset(ImageDataset):
    """A data set by its timm name. dgnet downloads nothing; the data set's own library may."""

    def __init__(self, source: str, role: str, root: str, class_names: Sequence[str] | None = None) -> None:
        if source in ("torch/image_folder", "torch/folder"):
            raise UsageError(f"{source}: name the folder itself, as in --data FOLDER")
        errors = []
        for split in _SPLITS[role]:
            try:
                self.dataset = timm.data.create_dataset(source, root=root, split=split)
                break
            except ImportError as error:
                raise UsageError(
                    f"{source}: {reason(error)}; install its reader, for example with: pip install 'dgnet[hfds]'"
                ) from None
            except Exception as error:  # the data set's library may raise anything
                errors.append(f"split {split!r}: {reason(error)}")
        else:
            raise UsageError(
                f"{source} cannot be opened under {root!r} ({'; '.join(errors)}); give its folder with --data-root"
            )
        self.reader = getattr(self.dataset, "reader", None)
        own = getattr(self.dataset, "classes", None) or list(getattr(self.reader, "class_to_idx", None) or {})
        own = [
            ", ".join(name) if isinstance(name, tuple) else str(name) for name in own
        ]  # ImageNet's names are tuples of synonyms
        if not own:
            raise UsageError(f"{source} names no classes")
        self.class_names = list(class_names or own)
        self.labels = map_labels(source, own, self.class_names)
        self.source = source

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Any, int]:
        # Use the reader, if there is one, instead of timm's data set, which skips images that do not decode.
        content: Any
        try:
            image, label = self.dataset[index] if self.reader is None else self.reader[index]
            if isinstance(image, Image.Image):
                content = to_rgb(image)
            else:
                with image:
                    content = image.read()
        except (OSError, ValueError, SyntaxError, TypeError, AssertionError) as error:  # the last two for an empty row
            raise BadImageError(f"{self.name(index)} cannot be read: {reason(error)}") from None
        check_label(self.name(index), label, len(self.labels))
        return content, self.labels[label]

    def name(self, index: int) -> str:
        return f"{self.source}, image {index}"


def open_dataset(
    source: str,
    role: str,
    class_names: Sequence[str] | None = None,
    data_root: str = "data",
    needs_labels: bool = True,
) -> ImageDataset:
    """The images of `source` for `role`, "train" or "evaluation". Their transform is not set yet.

    Of a folder with train/ and val/ (or validation/ or test/) the subfolder of the role is used. `class_names`: the class names
    in the order of their labels, if they are known from training. `data_root`: the folder of timm's readers. `needs_labels`: if
    False, images in shards may lack a label, and a folder may hold images instead of class folders; their label is IGNORED.

    Raises UsageError for a source that does not exist, is empty, or has other classes.
    """
    if source == "digits":
        digits = Digits(role)
        if class_names is not None and list(class_names) != digits.class_names:
            raise UsageError(f"digits has the classes 0 to 9, not the {len(class_names)} known from training")
        return digits
    if is_stream(source):
        raise UsageError(f"{source} is a stream, allowed only as --data of training; use local shards, a folder or a data set")
    if ".tar" in source:
        return Shards(source.removeprefix("wds/"), class_names, needs_labels)
    if source.partition("/")[0] in ("hfds", "torch", "tfds", "hfids") and not os.path.exists(source):
        if source.startswith(("hfids/", "tfds/")):
            raise UsageError(f"{source} is a stream; use a map-style source: hfds/…, torch/…, a folder, or shards")
        return TimmDataset(source, role, data_root, class_names)
    root = Path(source)
    if not root.exists():
        raise UsageError(
            f"data source {source!r} does not exist{did_you_mean(source, ['digits'])}; a source is `digits`, a folder of class"
            " folders, shards ending in .tar, or a name like torch/cifar10"
        )
    if not root.is_dir():
        raise UsageError(f"data source {source!r} is a file; expected a folder of class folders, or shards ending in .tar")
    return Folder(_split_folder(root, role) or root, class_names, needs_labels)


def _split_folder(root: Path, role: str) -> Path | None:
    """The subfolder of `root` for `role`; None if `root` has no splits."""
    if not _is_divided(root):
        return None
    found = next((root / name for name in _FOLDERS[role] if (root / name).is_dir()), None)
    if found is None:
        raise UsageError(f"{root} holds train/ but neither val/ nor test/; give the evaluation data with --val-data")
    return found


def _is_divided(root: Path) -> bool:
    """Whether a folder has splits: a train/ with class folders. (A class folder named train holds images.)"""
    return (root / "train").is_dir() and any(entry.is_dir() for entry in (root / "train").iterdir())


def gives_both(source: str) -> bool:
    """Whether a source has training and evaluation images of its own."""
    if source == "digits" or source.startswith(("hfds/", "torch/")):
        return True
    root = Path(source)
    return _is_divided(root) and any((root / name).is_dir() for name in _FOLDERS[EVALUATION])


def open_train_and_evaluation(
    source: str,
    val_source: str | None,
    data_root: str = "data",
    holdout: int = 0,
    epoch_images: int | None = None,
) -> tuple[ImageDataset | ShardStream, ImageDataset]:
    """The training images of `source` and the evaluation images of `val_source`, with the same classes.

    `holdout`: if above 0, evaluate on this many of the training images instead, and train on the others. `epoch_images`: number
    of images in an epoch of a stream.

    Raises UsageError if `val_source` is missing and `source` has no evaluation images. Data is never split without `holdout`.
    """
    if is_stream(source):
        if holdout:
            raise UsageError(f"{source} is a stream, from which no images can be held out; leave out --holdout")
        if val_source is None:
            raise UsageError(f"{source} is a stream, which has the classes of --val-data; add --val-data SOURCE")
        if epoch_images is None:
            raise UsageError(f"{source} is a stream, which has no length; give the images of an epoch with --epoch-images")
        evaluation = open_dataset(val_source, EVALUATION, data_root=data_root)
        return ShardStream(source, evaluation.class_names, epoch_images), evaluation
    if epoch_images is not None:
        raise UsageError(f"--epoch-images is for streams; an epoch of {source} is each of its images once; leave it out")
    if holdout:
        return hold_out(open_dataset(source, TRAIN, data_root=data_root), holdout)
    if val_source is None and not gives_both(source):
        open_dataset(source, TRAIN, data_root=data_root)  # reports a source that does not exist first
        raise UsageError(f"{source} has no evaluation images of its own; give them with --val-data SOURCE")
    train = open_dataset(source, TRAIN, data_root=data_root)
    evaluation = open_dataset(val_source or source, EVALUATION, train.class_names, data_root)
    return train, evaluation
