"""WebDataset shards: the members of a tar file, and shards read as a stream.

A sample is two files with the same key: an image (`jpg`, `png`, …), and its label as text (`cls`).
"""

from __future__ import annotations

import os
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from torchvision.datasets.folder import IMG_EXTENSIONS

from dgnet.data._images import BadImages, check_label, decode, mix_seed, seed_generators
from dgnet.errors import BadImageError, UsageError, reason


def is_stream(source: str) -> bool:
    """Whether a source is a URL or a pipe, which can only be read from front to back."""
    return source.startswith("pipe:") or "://" in source


def expand_shards(pattern: str) -> list[str]:
    """The paths, URLs or pipes of a brace pattern. Raises UsageError for a bad pattern or a file that does not exist."""
    from webdataset.shardlists import expand_urls

    try:
        paths: list[str] = expand_urls(pattern)
    except (ValueError, AssertionError) as error:  # AssertionError: a variable in the pattern is not set
        raise UsageError(f"shard pattern {pattern!r} cannot be expanded ({error}); expected …{{000000..000004}}.tar") from None
    missing = [path for path in paths if not is_stream(path) and not os.path.isfile(path)]
    if missing:
        raise UsageError(f"shard {missing[0]} does not exist ({len(missing)} of {len(paths)} missing); check {pattern}")
    return paths


def read_classes(shard: str) -> list[str] | None:
    """The class names in `classes.txt` beside a local shard, one per line; None if there is no such file."""
    path = Path(shard).parent / "classes.txt"
    if not path.is_file():
        return None
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {reason(error)}") from None
    return [line.strip() for line in lines if line.strip()]


def walk_shard(tar: tarfile.TarFile, path: str) -> Iterator[tuple[str, tarfile.TarInfo, int | None]]:
    """(key, member, label) for each image file and each label file of a shard. The label of an image file is None.

    Raises UsageError for a label that is not a whole number.
    """
    for member in tar:
        if not member.isfile():
            continue
        folder, _, basename = member.name.removeprefix("./").rpartition("/")
        stem, _, extension = basename.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if f".{extension.lower()}" in IMG_EXTENSIONS:
            yield key, member, None
        elif extension == "cls":
            content = read_member(tar, member)
            try:
                yield key, member, int(content)
            except ValueError:
                raise UsageError(f"{path}, sample {key}: label {content[:20]!r} is not a whole number") from None


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The content of `member`, which must be a file."""
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def no_label(path: str, key: str) -> UsageError:
    """The error for an image without a label."""
    return UsageError(f"{path}, sample {key}: no label; expected {key}.cls beside the image")


class ShardStream(IterableDataset[tuple[Tensor, int]]):
    """An endless stream of training images from URLs (`https://…`) or pipes (`pipe:aws s3 cp …`), read from front to back.

    Each pass reads the shards in a new order. Images are drawn at random from a buffer of `buffer` images. Shards are divided
    among all ranks and their workers; if there are fewer shards than these processes, images are divided instead. An image may
    appear twice before another appears once. `length`: number of images in an epoch.

    Raises UsageError for a shard that cannot be read, and for a label that is not among the classes.
    """

    flips = True
    transform: Callable[[Image.Image], Tensor]

    def __init__(self, pattern: str, class_names: list[str], length: int, buffer: int = 2000) -> None:
        self.paths = expand_shards(pattern)
        self.class_names, self.length, self.buffer = list(class_names), length, buffer
        self.seed, self.rank, self.ranks = 0, 0, 1
        self.bad: BadImages | None = None  # lists the images that do not decode; they are skipped

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        worker = get_worker_info()
        consumer, consumers = self.rank, self.ranks
        if worker is not None:
            consumer, consumers = self.rank * worker.num_workers + worker.id, self.ranks * worker.num_workers
        rng = random.Random(mix_seed(self.seed, consumer))
        held: list[tuple[bytes, int, str]] = []
        for count, sample in enumerate(self._samples(consumer, consumers)):
            if len(held) < self.buffer:
                held.append(sample)
                if len(held) < min(self.buffer, self.length // consumers):
                    continue
                sample = held.pop()
            place = rng.randrange(len(held) + 1)
            if place < len(held):
                held[place], sample = sample, held[place]
            content, label, name = sample
            try:
                seed_generators(self.seed, consumer, count)
                image = self.transform(decode(content, name))
            except BadImageError as error:
                if self.bad is None:
                    raise
                self.bad.add(name, error)
                continue
            yield image, label

    def _samples(self, consumer: int, consumers: int) -> Iterator[tuple[bytes, int, str]]:
        """(content, label, name) of the images that one process reads, pass after pass."""
        by_shard = len(self.paths) >= consumers
        passes = 0
        while True:
            order = np.random.default_rng((self.seed, passes)).permutation(len(self.paths)).tolist()
            own = order[consumer::consumers] if by_shard else order
            count = 0
            for index in own:
                for place, sample in enumerate(self._read(self.paths[index])):
                    if by_shard or place % consumers == consumer:
                        count += 1
                        yield sample
            if not count:
                raise UsageError(
                    f"{', '.join(self.paths[index] for index in own[:3])}: no sample for process {consumer + 1} of {consumers};"
                    " a sample is KEY.jpg with KEY.cls, and each process needs at least one"
                )
            passes += 1

    def _read(self, path: str) -> Iterator[tuple[bytes, int, str]]:
        from webdataset.gopen import gopen

        images: dict[str, bytes] = {}
        labels: dict[str, int] = {}
        try:
            with gopen(path) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
                for key, member, label in walk_shard(tar, path):
                    if label is None:
                        images[key] = read_member(tar, member)
                    else:
                        check_label(f"{path}, sample {key}", label, len(self.class_names))
                        labels[key] = label
                    if key in images and key in labels:
                        yield images.pop(key), labels.pop(key), f"{path}, sample {key}"
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{path} cannot be read as a stream of a tar file: {reason(error)}") from None
        if images:
            key = next(iter(images))
            raise no_label(path, key)
