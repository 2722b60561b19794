"""Labelled images: reading, decoding, holding out, and skipping those that do not decode."""

from __future__ import annotations

import io
import os
import random
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from dgnet.errors import BadImageError, UsageError, reason

IGNORED = -100
"""The label of an image without a label, and of an image that only fills up a batch. Such an image counts in no loss of labels
and in no metric, but it does count in batch statistics."""


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Labelled images: item i is (transform(image), label). Subclasses define `read` and `name`.

    Raises BadImageError, with the image's name, for an image that does not decode.
    """

    class_names: list[str]
    flips = True
    """Whether a mirrored image keeps its class. (A mirrored digit does not.)"""

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
    """The images of a data set at `indices`, with their own transform."""

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
    """Two parts of `train`: all but `count` images, and these `count` images. The random choice is the same in every call.

    Raises UsageError if no training image would be left.
    """
    if count >= len(train):
        raise UsageError(f"--holdout {count} leaves none of the {len(train)} training images; hold out fewer")
    order = np.random.default_rng(0).permutation(len(train)).tolist()
    return Part(train, sorted(order[count:])), Part(train, sorted(order[:count]))


def decode(content: bytes, name: str, size: tuple[int, int] | None = None) -> Image.Image:
    """An upright 8-bit RGB image from the bytes of an image file. Of an animation the first frame; 16-bit grey is scaled to 8.

    `size`: the expected width and height. An image that has this size only before it is turned upright is not turned.

    Raises BadImageError, with `name`, for bytes that are not a whole image, or for an image of another size.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of malformed EXIF
            image = to_rgb(Image.open(io.BytesIO(content)), size)
    except Exception as error:  # Pillow's decoders may raise anything for a broken file
        why = "no known image format" if isinstance(error, Image.UnidentifiedImageError) else reason(error)
        raise BadImageError(f"{name} does not decode as an image ({why}); replace or remove it") from None
    if size is not None and image.size != size:
        found, expected = (f"{width} × {height}" for width, height in (image.size, size))
        raise BadImageError(f"{name} is {found} pixels, its annotations expect {expected}; they belong to another image")
    return image


def _upright(image: Image.Image) -> Image.Image:
    """The image turned according to its EXIF orientation; unchanged if that cannot be read."""
    if image.format == "JPEG" and not {"exif", "xmp"} & image.info.keys():  # saves the 20 µs of Pillow's search for EXIF
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def to_rgb(image: Image.Image, size: tuple[int, int] | None = None) -> Image.Image:
    """An upright 8-bit RGB image; 16-bit grey is scaled. `size`: see `decode`."""
    upright = _upright(image)
    if upright.size == size or image.size != size:
        image = upright
    if image.mode.startswith("I"):  # Pillow would clip 16 bits at 255
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray((values // 257).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def read_image(path: Path) -> bytes:
    """The bytes of an image file. Raises BadImageError, with its path, if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadImageError(f"image {path} cannot be read: {reason(error)}") from None


def check_label(where: str, label: int, classes: int) -> None:
    """Raises UsageError, which begins with `where`, unless `label` is from 0 to `classes` - 1."""
    if not 0 <= label < classes:
        raise UsageError(f"{where}: label {label} is out of range, allowed are 0 to {classes - 1}")


def seed_generators(*key: int) -> None:
    """Seed the generators of Python and torch (CPU) with `key`."""
    seed = mix_seed(*key)
    random.seed(seed)
    torch.default_generator.manual_seed(seed)


def mix_seed(*key: int) -> int:
    """A 64-bit seed from several integers (SplitMix64)."""
    state = 0
    for value in key:
        state = (state + value + 0x9E3779B97F4A7C15) & _BITS
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _BITS
        state ^= state >> 31
    return state


_BITS = 2**64 - 1


class BadImages:
    """A file that lists skipped images, which did not decode. All processes append to it.

    Each line is an image's name, a tab, and the error. Raises UsageError for more than `limit` images.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self.limit = path, limit

    def add(self, name: str, error: BadImageError) -> None:
        """Append an image, unless it is listed already."""
        known = self.read()
        if name in known:
            return
        # One write in append mode: on a local disk the lines of several processes do not mix.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, f"{name}\t{error}\n".encode(errors="surrogateescape"))  # file names may not be valid UTF-8
        finally:
            os.close(descriptor)
        if len(known) + 1 > self.limit:
            raise UsageError(
                f"more than {self.limit} images do not decode, the last one: {error}; all are listed in {self.path};"
                " allow more with --max-bad-images"
            )

    def read(self) -> list[str]:
        """The names of the images listed so far."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
        return [line.rpartition("\t")[0] for line in lines if line]

    def leave_out(self, dataset: ImageDataset) -> ImageDataset:
        """The images of `dataset` that are not listed."""
        names = set(self.read())
        return Part(dataset, [i for i in range(len(dataset)) if dataset.name(i) not in names]) if names else dataset


class TrainingItems(Dataset[tuple[Tensor, int]]):
    """Items of a data set by (epoch, index). Augmentation is a function of (`seed`, epoch, index).

    Index -1 gives a grey image with label IGNORED. `bad`: where images that do not decode are listed; each is replaced by such
    a grey image.

    Raises BadImageError for an image that does not decode, if `bad` is None.
    """

    def __init__(self, dataset: ImageDataset, image_size: tuple[int, int], seed: int, bad: BadImages | None = None) -> None:
        self.dataset, self.image_size, self.seed, self.bad = dataset, image_size, seed, bad

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        if index >= 0:
            try:
                seed_generators(self.seed, epoch, index)
                return self.dataset[index]
            except BadImageError as error:
                if self.bad is None:
                    raise
                self.bad.add(self.dataset.name(index), error)
        return torch.zeros(3, *self.image_size), IGNORED
