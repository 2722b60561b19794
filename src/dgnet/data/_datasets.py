"""The kinds of data sets: digits, class folders, local shards, and those of timm's readers."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from dgnet._extras import import_extra
from dgnet.data._images import IGNORED, ImageDataset, check_label, read_image, to_rgb
from dgnet.data._labels import map_labels
from dgnet.data._ledger import Ledger, Walk, compose, escape, find_image_files, is_image_name
from dgnet.data._shards import expand_shards, is_shards, pair_samples, read_classes, walk_shard
from dgnet.data._splits import EVALUATION, NAMES, TRAIN
from dgnet.data._tars import TarReader, refuse_compressed
from dgnet.errors import BadImageError, UsageError, reason

# torchvision's data sets with two parts only: the test set is the one that the field evaluates on.
_TWO_PARTS = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
_MOST_LABELS = 10_000  # without class names; more are allowed if there are more images


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
        part = "every fifth image of each class" if role == EVALUATION else "all but every fifth image of each class"
        self.ledger = Ledger(f"digits ({part})")
        self.ledger.count_classes(self.labels, self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[Any, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), self.labels[index]

    def name(self, index: int) -> str:
        return f"digits, image {index}"


class Folder(ImageDataset):
    """A folder of class folders. The classes are the sorted names of the folders, or `class_names` if given.

    What counts as an image: see `Walk`. An empty class folder is a class without images. If `needs_labels` is False, the folder
    may hold images instead of class folders; their label is IGNORED.

    Raises UsageError for a folder that cannot be read, holds no images, or holds two class folders of the same name (in NFC).
    """

    def __init__(self, root: Path, class_names: Sequence[str] | None = None, needs_labels: bool = True) -> None:
        self.ledger = Ledger(str(root))
        walk = Walk(root, self.ledger)
        folders, files = walk.entries(root)
        by_name = _class_folders(root, folders)
        if not by_name and needs_labels:
            hint = next(
                (f"; its shards are named by a pattern, as in {path}" for path in sorted(files) if is_shards(str(path))), ""
            )
            raise UsageError(f"{root} holds no class folders; a data folder looks like {root}/CLASS/IMAGE.jpg{hint}")
        self.class_names = list(class_names) if class_names is not None else list(by_name)
        labels = map_labels(str(root), list(by_name), self.class_names)
        self.samples: list[tuple[Path, int]] = []
        empty: list[str] = []
        for (name, folder), label in zip(by_name.items(), labels, strict=True):
            images = walk.images(folder)
            self.samples += [(path, label) for path in images]
            if not images:
                empty.append(self.class_names[label])
                line = f"{folder} holds no images; class {name!r} has none here"
                self.ledger.warn("empty_class_folders", name, line)
        for path in sorted(files):
            if not is_image_name(path.name):
                walk.leave_out_file(path)
            elif by_name:
                self.ledger.leave_out("outside_class_folders", path.name)
            else:
                self.samples.append((path, IGNORED))
        if not self.samples:
            where = f" in its {len(by_name)} class folders" if by_name else ""
            raise UsageError(f"{root} holds no images{where}; allowed extensions: {' '.join(IMG_EXTENSIONS)}")
        self.ledger.count_classes([label for _, label in self.samples], self.class_names, empty)

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return read_image(path), label

    def name(self, index: int) -> str:
        return str(self.samples[index][0])


def _class_folders(root: Path, folders: Sequence[Path]) -> dict[str, Path]:
    """Class folders by name, sorted. Raises UsageError for names that are equal in NFC or are no text."""
    by_name: dict[str, Path] = {}
    for folder in folders:
        name = compose(folder.name)
        if escape(name) != name:
            raise UsageError(f"class folder {escape(str(folder))} has a name that cannot be printed; rename it")
        if name in by_name:
            raise UsageError(
                f"{root} holds two class folders called {name!r}, which differ only in how Unicode stores the name; merge them"
            )
        by_name[name] = folder
    return dict(sorted(by_name.items()))


class Photos(ImageDataset):
    """Image files, and the images in folders with their subfolders, without labels.

    Raises UsageError for a path that does not exist, and for a folder without images.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        files, ledgers = find_image_files(paths)
        self.files = [path for path, _ in files]
        self.class_names: list[str] = []
        self.ledger = ledgers[0] if len(paths) == len(ledgers) == 1 else Ledger(" ".join(paths), len(files))

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[Any, int]:
        return read_image(self.files[index]), IGNORED

    def name(self, index: int) -> str:
        return str(self.files[index])


class Shards(ImageDataset):
    """Local WebDataset shards as a map-style data set. It keeps an index of tar offsets and reads an image with one seek.

    A sample is two files with the same key: an image (`jpg`, `png`, …), and its label as text (`cls`). Class names are read
    from `classes.txt` beside the shards, one per line, if there is one. If `class_names` is given too, labels are mapped to it
    by name. If `needs_labels` is False, an image without a label gets the label IGNORED.
    """

    def __init__(self, pattern: str, class_names: Sequence[str] | None = None, needs_labels: bool = True) -> None:
        self.needs_labels = needs_labels
        self.paths = expand_shards(pattern)
        self.ledger = Ledger(pattern)
        self.samples: list[tuple[int, str, int, int]] = []  # shard, key, offset, size
        self.labels: list[int] = []
        for path, count in Counter(map(os.path.realpath, self.paths)).items():
            if count > 1:
                self.ledger.warnings.append(f"{path} is named {count} times; its images count {count} times")
        for shard, path in enumerate(tqdm(self.paths, desc="indexing shards", leave=False, disable=None)):
            self._index(shard, path)
        if not self.samples:
            raise UsageError(f"{pattern} holds no samples; a sample is KEY.jpg with its label in KEY.cls{self._left_out()}")
        own = read_classes(self.paths)
        if own is None:
            self._check_labels(max(_MOST_LABELS, len(self.samples)) if class_names is None else len(class_names))
        else:
            self._check_labels(len(own))
        self.class_names = list(class_names or own or [str(label) for label in range(max(*self.labels, 0) + 1)])
        if own is not None:
            mapped = map_labels(pattern, own, self.class_names)
            self.labels = [label if label == IGNORED else mapped[label] for label in self.labels]
        self.ledger.count_classes(self.labels, self.class_names)

    def _check_labels(self, classes: int) -> None:
        for (shard, key, _, _), label in zip(self.samples, self.labels, strict=True):
            if label >= classes:
                check_label(f"{self.paths[shard]}, sample {escape(key)}", label, classes)

    def _left_out(self) -> str:
        words = self.ledger.describe()
        return f" ({words})" if words else ""

    def _index(self, shard: int, path: str) -> None:
        try:
            with open(path, "rb") as file:
                refuse_compressed(path, file.read(8))
                file.seek(0)
                tar = TarReader(file, path, os.stat(path).st_size, self.ledger)
                entries = walk_shard(tar, lambda member: (member.offset_data, member.size))
                found = sorted(pair_samples(entries, path, self.ledger, self.needs_labels), key=lambda sample: sample[1])
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {reason(error)}") from None
        if not found:
            self.ledger.leave_out("empty_shards", os.path.basename(path))
        for key, (offset, size), label in found:
            self.samples.append((shard, key, offset, size))
            self.labels.append(label)

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

    def __init__(
        self, source: str, role: str, root: str, class_names: Sequence[str] | None = None, as_before: bool = False
    ) -> None:
        named = re.fullmatch(r"(.+):(\w+)", source)
        name, splits = (named[1], [named[2]]) if named else (source, _split_names(source, role, as_before))
        if name in ("torch/image_folder", "torch/folder"):
            raise UsageError(f"{name}: name the folder itself, as in --data FOLDER")
        if name.lower().startswith("hfds/"):
            import_extra("datasets", name)  # if it is missing, timm also prints on stdout
        errors = []
        for split in splits:
            try:
                self.dataset = timm.data.create_dataset(name, root=root, split=split)
                break
            except ImportError as error:
                raise UsageError(f"{name}: {reason(error)}; install the package that reads it") from None
            except Exception as error:  # the data set's library may raise anything
                errors.append(f"split {split!r}: {reason(error)}")
                if "split" not in str(error).lower():  # another name of a split would not help
                    break
        else:
            why = errors[0].partition(": ")[2]
            raise UsageError(
                f"{name} has no split called {' or '.join(map(repr, splits))} ({why}); name one of its splits, as in"
                f" {name}:test with --val-data (dgnet evaluate: --data), or evaluate on training images with --holdout N"
            )
        if not hasattr(self, "dataset"):
            raise UsageError(f"{name} cannot be opened under {root!r} ({'; '.join(errors)}); give its folder with --data-root")
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
        self.ledger = Ledger(f"{name} ({split} split)", len(self.dataset))

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


def _split_names(source: str, role: str, as_before: bool) -> Sequence[str]:
    """The names of splits to try for a data set of timm's readers."""
    prefix, _, name = source.partition("/")
    if role == TRAIN:
        return NAMES[TRAIN][:1] if prefix == "torch" else NAMES[TRAIN]
    if as_before:
        return ("validation", "test")
    if prefix == "torch":
        return ("test",) if name.lower() in _TWO_PARTS else ("validation",)
    return NAMES[EVALUATION]
