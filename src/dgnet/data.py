"""One function from a source string to a data set of labelled images, and the transforms in front of the network.

A source is `digits`, a folder of class folders, WebDataset shards (`…/train-{000000..000004}.tar`), or a data set name
that timm's reader takes (`hfds/…`, `torch/cifar10`).
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from dgnet.errors import UsageError, did_you_mean, reason

TRAIN, EVALUATION = "train", "evaluation"
_FOLDERS = {TRAIN: ("train",), EVALUATION: ("val", "validation", "test")}
_SPLITS = {TRAIN: ("train",), EVALUATION: ("validation", "test")}


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the network: plain values, so that a checkpoint can carry them."""

    image_size: tuple[int, int]  # height, width in pixels
    mean: tuple[float, ...]  # of each channel, for images in [0, 1]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0  # share of the short side that evaluation's centre crop keeps

    @classmethod
    def of(cls, pretrained_cfg: dict[str, Any], image_size: int | None = None) -> Preprocessing:
        """A model's own preprocessing (its timm default config), at another size where one is given."""
        size = (image_size, image_size) if image_size else tuple(pretrained_cfg["input_size"][1:])
        return cls(
            size,
            tuple(pretrained_cfg["mean"]),
            tuple(pretrained_cfg["std"]),
            pretrained_cfg["interpolation"],
            pretrained_cfg["crop_pct"],
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values: lists, numbers, strings."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`. Raises TypeError or ValueError for values that are no preprocessing."""
        return cls(
            **{
                **values,
                "image_size": tuple(int(side) for side in values["image_size"]),
                "mean": tuple(float(value) for value in values["mean"]),
                "std": tuple(float(value) for value in values["std"]),
            }
        )

    def evaluation_transform(self) -> Callable[[Image.Image], Tensor]:
        """Resize, centre crop, normalise."""
        transform: Callable[[Image.Image], Tensor] = timm.data.create_transform(
            (3, *self.image_size),
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
        )
        return transform

    def training_transform(self, augment: str, hflip: float) -> Callable[[Image.Image], Tensor]:
        """Random augmentation, then normalise.

        `augment`: "rrc" (random resized crop, as on ImageNet), "pad-crop" (evaluation's crop, zero-padded by an eighth and
        cropped again: 4 pixels of CIFAR's 32), or "none". `hflip`: probability of a horizontal flip.
        """
        if augment == "none":
            return self.evaluation_transform()
        if augment == "rrc":
            transform: Callable[[Image.Image], Tensor] = timm.data.create_transform(
                (3, *self.image_size),
                is_training=True,
                hflip=hflip,
                color_jitter=0.0,
                interpolation=self.interpolation,
                mean=self.mean,
                std=self.std,
            )
            return transform
        height, width = self.image_size
        *resize_and_crop, _, _ = self.evaluation_transform().transforms  # type: ignore[attr-defined]
        return transforms.Compose(
            [
                *resize_and_crop,
                transforms.RandomCrop(self.image_size, padding=(width // 8, height // 8)),
                transforms.RandomHorizontalFlip(hflip),
                transforms.ToTensor(),
                transforms.Normalize(self.mean, self.std),
            ]
        )


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Labelled images: item i is (transform(image), label). Subclasses say where the images are.

    Raises UsageError, naming the image, for one that does not decode.
    """

    class_names: list[str]
    flips = True
    """Whether a mirrored image keeps its class; a mirrored digit does not."""

    transform: Callable[[Image.Image], Tensor]

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> tuple[Any, int]:
        """The image as bytes or a PIL image, and its label."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Where the image is: a path, or a shard and key."""
        raise NotImplementedError

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The image, decoded, and its label."""
        image, label = self.read(index)
        return decode(image, self.name(index)) if isinstance(image, bytes) else image, label

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.load(index)
        return self.transform(image), label


class Part(ImageDataset):
    """The images of a data set at `indices`, with a transform of their own."""

    def __init__(self, whole: ImageDataset, indices: Sequence[int]) -> None:
        self.whole, self.indices = whole, indices
        self.class_names, self.flips = whole.class_names, whole.flips

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> tuple[Any, int]:
        return self.whole.read(self.indices[index])

    def name(self, index: int) -> str:
        return self.whole.name(self.indices[index])


def hold_out(train: ImageDataset, count: int) -> tuple[Part, Part]:
    """All but `count` images, and those: drawn at random, always the same ones of a data set.

    Raises UsageError where none would be left.
    """
    if count >= len(train):
        raise UsageError(f"--holdout {count} leaves none of the {len(train)} training images; hold out fewer")
    order = np.random.default_rng(0).permutation(len(train)).tolist()
    return Part(train, sorted(order[count:])), Part(train, sorted(order[:count]))


def decode(content: bytes, name: str) -> Image.Image:
    """An RGB image from the bytes of an image file. Raises UsageError, with `name`, where they are none."""
    try:
        return Image.open(io.BytesIO(content)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        why = "no known image format" if isinstance(error, Image.UnidentifiedImageError) else reason(error)
        raise UsageError(f"{name} does not decode as an image ({why}); replace it or take it out") from None


def read_image(path: Path) -> bytes:
    """The bytes of an image file. Raises UsageError, with its path, where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"image {path} cannot be read: {reason(error)}") from None


def map_labels(source: str, own: Sequence[str], known: Sequence[str]) -> list[int]:
    """The label in `known` of each class of `own`, by name. Raises UsageError for a class that is not known."""
    if list(own) == list(known):  # as they are: names may repeat (ImageNet has two kinds of crane)
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
    """scikit-learn's 1,797 handwritten digits, 8×8 grey; every fifth image of each class is held out for evaluation."""

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
    """A folder of class folders; the classes are the folders' names, sorted, or `class_names` where given."""

    def __init__(self, root: Path, class_names: Sequence[str] | None = None) -> None:
        try:
            folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        except OSError as error:
            raise UsageError(f"{root} cannot be read: {reason(error)}") from None
        if not folders:
            raise UsageError(f"{root} holds no class folders; a data folder looks like {root}/CLASS/IMAGE.jpg")
        self.class_names = list(class_names) if class_names is not None else folders
        self.samples = [
            (path, label)
            for name, label in zip(folders, map_labels(str(root), folders, self.class_names), strict=True)
            for path in sorted((root / name).rglob("*"))
            if path.suffix.lower() in IMG_EXTENSIONS
        ]
        if not self.samples:
            raise UsageError(f"{root} holds no images in its {len(folders)} class folders; known: {' '.join(IMG_EXTENSIONS)}")

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return read_image(path), label

    def name(self, index: int) -> str:
        return str(self.samples[index][0])


class Shards(ImageDataset):
    """Local WebDataset shards as a map-style data set: an index of tar offsets, read with one seek an image.

    A sample is an image (`jpg`, `png`, …) and its label as text (`cls`) under one key. Class names come from
    `classes.txt` beside the shards, one a line, where there is one; with `class_names`, classes go together by name.
    """

    def __init__(self, pattern: str, class_names: Sequence[str] | None = None) -> None:
        self.paths = expand_shards(pattern)
        self.samples: list[tuple[int, str, int, int]] = []  # shard, key, offset, size
        self.labels: list[int] = []
        for shard, path in enumerate(tqdm(self.paths, desc="indexing shards", leave=False, disable=None)):
            self._index(shard, path)
        if not self.samples:
            raise UsageError(f"{pattern} holds no samples; a sample is KEY.jpg with its label in KEY.cls")
        own = self._own_class_names()
        names = class_names or own or [str(label) for label in range(max(*self.labels, 0) + 1)]
        self.class_names = list(names)
        for (shard, key, _, _), label in zip(self.samples, self.labels, strict=True):
            if not 0 <= label < len(own or self.class_names):
                raise UsageError(
                    f"{self.paths[shard]}, sample {key}: label {label} is out of range,"
                    f" allowed are 0 to {len(own or self.class_names) - 1}"
                )
        if own is not None:
            mapped = map_labels(pattern, own, self.class_names)
            self.labels = [mapped[label] for label in self.labels]

    def _own_class_names(self) -> list[str] | None:
        path = Path(self.paths[0]).parent / "classes.txt"
        if not path.is_file():
            return None
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} cannot be read: {reason(error)}") from None
        return [line.strip() for line in lines if line.strip()]

    def _index(self, shard: int, path: str) -> None:
        images: dict[str, tuple[int, int]] = {}
        labels: dict[str, int] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    folder, _, basename = member.name.removeprefix("./").rpartition("/")
                    stem, _, extension = basename.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    if not member.isfile():
                        continue
                    if f".{extension.lower()}" in IMG_EXTENSIONS:
                        images[key] = (member.offset_data, member.size)
                    elif extension == "cls":
                        content = tar.extractfile(member).read()  # type: ignore[union-attr]
                        try:
                            labels[key] = int(content)
                        except ValueError:
                            raise UsageError(f"{path}, sample {key}: label {content[:20]!r} is no whole number") from None
                end = tar.offset
        except (tarfile.TarError, EOFError, OSError) as error:
            raise UsageError(f"{path} is no readable tar file ({reason(error)}); copy it again") from None
        with open(path, "rb") as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:  # tarfile takes a cut for the end
                raise UsageError(f"{path} is cut short: it lacks the end mark of a tar file; copy it again")
        for key, (offset, size) in images.items():
            if key not in labels:
                raise UsageError(f"{path}, sample {key}: no label; expected {key}.cls beside the image")
            self.samples.append((shard, key, offset, size))
            self.labels.append(labels[key])

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


def expand_shards(pattern: str) -> list[str]:
    """The shard paths that a brace pattern names. Raises UsageError for one that does not exist."""
    from webdataset.shardlists import expand_urls

    try:
        paths: list[str] = expand_urls(pattern)
    except ValueError as error:
        raise UsageError(f"shard pattern {pattern!r} cannot be expanded ({error}); expected …{{000000..000004}}.tar") from None
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise UsageError(f"shard {missing[0]} does not exist ({len(missing)} of {len(paths)} missing); check {pattern}")
    return paths


class TimmDataset(ImageDataset):
    """A data set by the name that timm takes. Nothing is downloaded unless the data set's own library does."""

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
                    f"{source}: {reason(error)}; install what reads it, as with: pip install 'dgnet[hfds]'"
                ) from None
            except Exception as error:  # whatever the data set's library raises
                errors.append(f"split {split!r}: {reason(error)}")
        else:
            raise UsageError(f"{source} cannot be opened under {root!r} ({'; '.join(errors)}); its folder goes in --data-root")
        self.reader = getattr(self.dataset, "reader", None)
        own = getattr(self.dataset, "classes", None) or list(getattr(self.reader, "class_to_idx", None) or {})
        own = [", ".join(name) if isinstance(name, tuple) else str(name) for name in own]  # ImageNet's are synonyms
        if not own:
            raise UsageError(f"{source} names no classes")
        self.class_names = list(class_names or own)
        self.labels = map_labels(source, own, self.class_names)
        self.source = source

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Any, int]:
        # Past timm's own data set where it has a reader: it skips an image that does not decode.
        content: Any
        try:
            image, label = self.dataset[index] if self.reader is None else self.reader[index]
            if isinstance(image, Image.Image):
                content = image.convert("RGB")
            else:
                with image:
                    content = image.read()
        except (OSError, ValueError, SyntaxError) as error:
            raise UsageError(f"{self.name(index)} cannot be read: {reason(error)}") from None
        if not 0 <= label < len(self.labels):
            raise UsageError(f"{self.name(index)}: label {label} is out of range, allowed are 0 to {len(self.labels) - 1}")
        return content, self.labels[label]

    def name(self, index: int) -> str:
        return f"{self.source}, image {index}"


def open_dataset(source: str, role: str, class_names: Sequence[str] | None = None, data_root: str = "data") -> ImageDataset:
    """The images of `source` for `role` ("train" or "evaluation"), without a transform yet.

    A folder that holds train/ and val/ (or test/) gives the one of the role. `class_names`: the classes, in the order of
    their labels, where they are known from training. `data_root`: where timm's readers look.

    Raises UsageError for a source that is not there, is empty, or does not fit the classes.
    """
    if source == "digits":
        digits = Digits(role)
        if class_names is not None and list(class_names) != digits.class_names:
            raise UsageError(f"digits has the classes 0 to 9, not the {len(class_names)} known from training")
        return digits
    if ".tar" in source:
        return Shards(source.removeprefix("wds/"), class_names)
    if source.partition("/")[0] in ("hfds", "torch", "tfds", "hfids") and not os.path.exists(source):
        if source.startswith(("hfids/", "tfds/")):
            raise UsageError(f"{source} streams; use a map-style source: hfds/…, torch/…, a folder, or shards")
        return TimmDataset(source, role, data_root, class_names)
    root = Path(source)
    if not root.exists():
        raise UsageError(
            f"data source {source!r} does not exist{did_you_mean(source, ['digits'])}; a source is `digits`, a folder of class"
            " folders, shards ending in .tar, or a name like torch/cifar10"
        )
    if not root.is_dir():
        raise UsageError(f"data source {source!r} is a file; expected a folder of class folders, or shards ending in .tar")
    return Folder(_split_folder(root, role) or root, class_names)


def _split_folder(root: Path, role: str) -> Path | None:
    """The subfolder of `root` for `role`, where `root` is divided into splits."""
    # A class may be called train: then it holds images, not class folders.
    is_divided = (root / "train").is_dir() and any(entry.is_dir() for entry in (root / "train").iterdir())
    found = next((root / name for name in _FOLDERS[role] if (root / name).is_dir()), None) if is_divided else None
    if is_divided and found is None:
        raise UsageError(f"{root} holds train/ but neither val/ nor test/; name the evaluation data with --val-data")
    return found


def gives_both(source: str) -> bool:
    """Whether a source has training and evaluation images of its own."""
    if source == "digits" or source.startswith(("hfds/", "torch/")):
        return True
    root = Path(source)
    return (root / "train").is_dir() and any((root / name).is_dir() for name in _FOLDERS[EVALUATION])


def open_train_and_evaluation(
    source: str, val_source: str | None, data_root: str = "data", holdout: int = 0
) -> tuple[ImageDataset, ImageDataset]:
    """The training images of `source` and the evaluation images of `val_source`, with one set of classes.

    `holdout`: evaluate on so many of the training images instead, and train on the others.

    Raises UsageError where `val_source` is missing and `source` does not give both: data is never split silently.
    """
    if holdout:
        return hold_out(open_dataset(source, TRAIN, data_root=data_root), holdout)
    if val_source is None and not gives_both(source):
        open_dataset(source, TRAIN, data_root=data_root)  # a source that is not there is the first mistake to name
        raise UsageError(f"{source} has no evaluation images of its own; name them with --val-data SOURCE")
    train = open_dataset(source, TRAIN, data_root=data_root)
    evaluation = open_dataset(val_source or source, EVALUATION, train.class_names, data_root)
    return train, evaluation
