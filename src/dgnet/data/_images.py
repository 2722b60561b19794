"""Labelled images: reading, decoding, holding out, and skipping those that do not decode."""

from __future__ import annotations

import io
import math
import os
import random
import stat
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from dgnet.data._ledger import Ledger, escape
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

    ledger: Ledger
    """What the source gave and what was left out."""

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
        if hasattr(whole, "ledger"):
            self.ledger = whole.ledger

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> tuple[Any, int]:
        return self.whole.read(self.indices[index])

    def name(self, index: int) -> str:
        return self.whole.name(self.indices[index])


class Unlabelled(Part):
    """The images of a data set without their labels, which are IGNORED."""

    def __init__(self, whole: ImageDataset) -> None:
        super().__init__(whole, range(len(whole)))
        self.class_names = []

    def read(self, index: int) -> tuple[Any, int]:
        return super().read(index)[0], IGNORED


def hold_out(train: ImageDataset, count: int) -> tuple[Part, Part]:
    """Two parts of `train`: all but `count` images, and these `count` images. The random choice is the same in every call.

    Raises UsageError if no training image would be left.
    """
    if count >= len(train):
        raise UsageError(f"--holdout {count} leaves none of the {len(train)} training images; hold out fewer")
    order = np.random.default_rng(0).permutation(len(train)).tolist()
    kept, held_out = Part(train, sorted(order[count:])), Part(train, sorted(order[:count]))
    if hasattr(train, "ledger"):
        held_out.ledger = Ledger(f"{count:,} held-out images of {train.ledger.source}", count)
        kept.ledger = replace(train.ledger, figures={"held_out": count})
    return kept, held_out


def decode(content: bytes, name: str, size: tuple[int, int] | None = None) -> Image.Image:
    """An upright 8-bit RGB image from the bytes of an image file. Of an animation the first frame; 16-bit grey is scaled to 8.

    `size`: the expected width and height. An image that has this size only before it is turned upright is not turned.

    Raises BadImageError, with `name`, for bytes that are not a whole image, or for an image of another size.
    """
    name = escape(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of malformed EXIF
            raise_pillows_limit()
            image = to_rgb(Image.open(io.BytesIO(content)), size)
    except _UnsuitableError as error:
        raise BadImageError(f"{name} {error}") from None
    except Image.DecompressionBombError as error:
        raise BadImageError(f"{name} has too many pixels ({reason(error)}); {_too_large()}") from None
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
    """An upright 8-bit RGB image; 16-bit grey and floats are scaled. `size`: see `decode`.

    Raises BadImageError, without a name, for an image that is too large or too thin, or whose values cannot be scaled.
    """
    check_shape(*image.size)
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):  # Pillow 11 opens 16-bit PNG as I
        image = _from_numbers(image)
    upright = _upright(image)
    if upright.size == size or image.size != size:
        image = upright
    if image.mode.startswith("I"):  # Pillow would clip 16 bits at 255
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray((values // 257).astype(np.uint8))
    elif image.mode in ("P", "PA") and ("transparency" in image.info or image.mode == "PA"):
        image = image.convert("RGBA")
    elif image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    return image.convert("RGB")


_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}  # Pillow does not convert these to RGB in one step


class _UnsuitableError(BadImageError):
    """The reason why an image is not used. The caller adds its name."""


def _from_numbers(image: Image.Image) -> Image.Image:
    """An 8-bit grey image from floats or 32-bit integers, by the range that they have.

    Up to 1 (floats): [0, 1]. Above 8 and up to 255: 8 bits. Up to 65,535: 16 bits. Floats between 1 and 8 are refused: they may
    be a bright image in [0, 1] with some values outside, or a dark one of 8 bits.
    """
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    is_float = image.mode == "F"
    if not math.isfinite(low) or not math.isfinite(high) or low < 0 or high > 65535 or (is_float and 1 < high <= 8):
        allowed = "0 to 1, 0 to 255 or 0 to 65535" if is_float else "0 to 255 or 0 to 65535"
        raise _UnsuitableError(f"has values from {low:g} to {high:g}, allowed are {allowed}; scale it, replace or remove it")
    scale = 255.0 if is_float and high <= 1 else 1.0 if high <= 255 else 1 / 257
    grey = Image.fromarray((values * scale).round().astype(np.uint8))
    grey.info = image.info
    grey.format = image.format
    exif = image.getexif()
    if exif:
        grey.info["exif"] = exif.tobytes()
    return grey


_LIMIT = "DGNET_MAX_PIXELS"  # in the environment, so that worker processes have it too
_MOST_THIN = 2000
_MOST_BYTES = 2**30  # of a file, unless the limit of pixels allows more


def check_max_pixels(what: str, megapixels: float | None) -> None:
    """Raises UsageError, which begins with `what`, for a limit that is not above 0, or that no image reaches."""
    if megapixels is not None and not 0 < megapixels <= 1e9:
        raise UsageError(f"{what} must be above 0 and at most 1,000,000,000 (million pixels), got {megapixels:g}")


def set_max_pixels(megapixels: float | None, is_default: bool = False) -> None:
    """Allow images of up to `megapixels` million pixels, in this process and those that it starts. None changes nothing.

    `is_default`: only if no limit is set yet. By default the limit is Pillow's, 178.9 megapixels.

    Raises UsageError for a number that is not above 0.
    """
    if megapixels is not None and not (is_default and _LIMIT in os.environ):
        check_max_pixels("--max-pixels", megapixels)
        os.environ[_LIMIT] = repr(float(megapixels))


def max_pixels() -> float:
    """The largest number of pixels of an image."""
    own = os.environ.get(_LIMIT)
    if own is None:
        return math.inf if Image.MAX_IMAGE_PIXELS is None else 2.0 * Image.MAX_IMAGE_PIXELS
    try:
        limit = float(own)
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf:
        raise UsageError(f"{_LIMIT} must be a number of megapixels above 0, got {own!r}")
    return limit * 1e6


def raise_pillows_limit() -> None:
    """Give Pillow the limit of `max_pixels`, if that is higher than its own."""
    if _LIMIT in os.environ and Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, math.ceil(max_pixels() / 2))


def check_shape(width: int, height: int) -> None:
    """Raises BadImageError, without a name, for an image with too many pixels, or one that is too thin to be scaled."""
    if width * height > max_pixels():
        raise _UnsuitableError(f"has {width} × {height} = {width * height / 1e6:,.1f} million pixels; {_too_large()}")
    if max(width, height) > _MOST_THIN * min(width, height):
        raise _UnsuitableError(
            f"is {width} × {height} pixels; one side is more than {_MOST_THIN:,} times the other; replace or remove it"
        )


def _too_large() -> str:
    return f"allowed are {max_pixels() / 1e6:,.1f} million pixels; allow more with --max-pixels MEGAPIXELS"


def read_image(path: Path) -> bytes:
    """The bytes of an image file. Raises BadImageError, with its path, if it cannot be read or is not a regular file."""
    name = escape(str(path))
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a FIFO would wait for ever
            raise BadImageError(f"image {name} is {_kind(found.st_mode)}, not a regular file; replace or remove it")
        if found.st_size > max(_MOST_BYTES, 8 * min(max_pixels(), 2**40)):
            raise BadImageError(f"image {name} has {found.st_size / 2**30:,.1f} GiB, which is no image; replace or remove it")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        if isinstance(error, BadImageError):
            raise
        raise BadImageError(f"image {name} cannot be read: {reason(error)}") from None


def _kind(mode: int) -> str:
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def check_label(where: str, label: int, classes: int) -> None:
    """Raises UsageError, which begins with `where`, unless `label` is from 0 to `classes` - 1."""
    if not 0 <= label < classes:
        raise UsageError(f"{where}: label {label} is out of range, allowed are 0 to {classes - 1}")


def seed_generators(*key: int) -> None:
    """Seed the generators of Python, NumPy and torch (CPU) with `key`."""
    seed = mix_seed(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # timm's RandAugment draws from it
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

    Each line is an image's name, a tab, and the error, both without control characters (see `escape`). Lists of older versions
    have names as they are. Raises UsageError for more than `limit` images.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self.limit = path, limit

    def add(self, name: str, error: BadImageError) -> None:
        """Append an image, unless it is listed already."""
        known = self.read()
        if name in known or escape(name) in known:
            return
        # One write in append mode: on a local disk the lines of several processes do not mix.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, f"{escape(name)}\t{escape(str(error))}\n".encode())
        finally:
            os.close(descriptor)
        if len(known) + 1 > self.limit:
            raise UsageError(
                f"more than {self.limit} images do not decode, the last one: {error}; all are listed in {self.path};"
                " allow more with --max-bad-images"
            )

    def read(self) -> set[str]:
        """The names of the images listed so far, as in the file."""
        try:
            lines = self.path.read_bytes().decode(errors="surrogateescape").split("\n")
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise UsageError(f"{self.path} cannot be read: {reason(error)}") from None
        return {line.rpartition("\t")[0] for line in lines if line}

    def leave_out(self, dataset: ImageDataset) -> ImageDataset:
        """The images of `dataset` that are not listed."""
        listed = self.read()
        if not listed:
            return dataset
        names = map(dataset.name, range(len(dataset)))
        return Part(dataset, [i for i, name in enumerate(names) if name not in listed and escape(name) not in listed])


class TrainingItems(Dataset[tuple[Tensor, int]]):
    """Items of a data set: images of `shape`, and labels.

    Keys are (epoch, index) or (epoch, index, copy), and augmentation is a function of `seed` and the key. Index -1 gives a grey
    image with label IGNORED. `bad`: where images that do not decode are listed; each is replaced by such a grey image.

    Raises BadImageError for an image that does not decode, if `bad` is None.
    """

    def __init__(self, dataset: ImageDataset, shape: tuple[int, int, int], seed: int, bad: BadImages | None = None) -> None:
        self.dataset, self.shape, self.seed, self.bad = dataset, shape, seed, bad

    def __getitem__(self, key: tuple[int, ...]) -> tuple[Tensor, int]:
        index = key[1]
        if index >= 0:
            try:
                seed_generators(self.seed, *key)
                return self.dataset[index]
            except BadImageError as error:
                if self.bad is None:
                    raise
                self.bad.add(self.dataset.name(index), error)
        return torch.zeros(self.shape), IGNORED
