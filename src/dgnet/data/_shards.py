"""WebDataset shards: how files of a tar form samples, and shards read as a stream.

A sample is two files with the same key: an image (`jpg`, `png`, …), and its label as text (`cls`).
"""

from __future__ import annotations

import os
import posixpath
import random
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from dgnet._streams import say
from dgnet.data._images import IGNORED, BadImages, check_label, decode, mix_seed, seed_generators
from dgnet.data._labels import read_class_names
from dgnet.data._ledger import Ledger, compose, escape, extension_of, is_hidden_path, is_image_name
from dgnet.data._open_stream import open_stream
from dgnet.data._tars import TarReader, decompress
from dgnet.errors import BadImageError, UsageError, reason
from dgnet.paths import find_kind, is_file

T = TypeVar("T")

_MOST_SHARDS = 1_000_000  # of a brace pattern
_MOST_DIGITS = 18  # of a label
_TAR = re.compile(r"\.(tar|tgz|tbz2|txz|tar\.(gz|bz2|xz|zst))$", re.IGNORECASE)


def is_stream(source: str) -> bool:
    """Whether a source is a URL or a pipe, which can only be read from front to back."""
    return source.startswith("pipe:") or re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source) is not None


def is_shards(source: str) -> bool:
    """Whether a source names shards: a tar file, or a brace pattern or list of them. A folder is none, whatever its name is."""
    kind = find_kind(source)
    if kind == "folder":
        return False
    source = source if kind else source.removeprefix("wds/")
    if _TAR.search(source) or any(_TAR.search(part) for part in source.split("::")):
        return True
    return _TAR.search(re.sub(r"[{}]", "", source)) is not None or bool(re.search(r"\.tar[,}]", source, re.IGNORECASE))


def expand_shards(pattern: str) -> list[str]:
    """The paths, URLs or pipes of a brace pattern. Raises UsageError for a bad pattern or a file that does not exist."""
    from webdataset.shardlists import expand_urls

    if not is_stream(pattern) and is_file(pattern):
        return [pattern]
    if _count_shards(pattern) > _MOST_SHARDS:
        raise UsageError(f"shard pattern {pattern!r} stands for more than {_MOST_SHARDS:,} files; check its numbers")
    try:
        paths: list[str] = expand_urls(pattern)
    except (ValueError, AssertionError) as error:  # AssertionError: a variable in the pattern is not set
        raise UsageError(f"shard pattern {pattern!r} cannot be expanded ({error}); expected …{{000000..000004}}.tar") from None
    missing = []
    for path in paths:
        kind = "file" if is_stream(path) else find_kind(path)
        if kind is None:
            missing.append(path)
        elif kind != "file":
            what = "a folder" if kind == "folder" else "not a regular file"
            raise UsageError(f"shard {escape(path)} is {what}; expected tar files")
    if missing:
        raise UsageError(f"shard {missing[0]} does not exist ({len(missing)} of {len(paths)} missing); check {pattern}")
    return paths


def _count_shards(pattern: str) -> int:
    """At most the number of paths of a pattern: numbers in a range, or items between commas, multiplied."""
    count = 1
    for content in re.findall(r"\{([^{}]*)\}", pattern):
        numbers = re.fullmatch(r"(-?\d{1,30})\.\.(-?\d{1,30})(\.\.-?\d+)?", content)
        count *= abs(int(numbers[2]) - int(numbers[1])) + 1 if numbers else content.count(",") + 1
        if count > _MOST_SHARDS or (".." in content and len(content) > 80):
            return _MOST_SHARDS + 1
    return count


def read_classes(shards: list[str]) -> list[str] | None:
    """The class names in `classes.txt` beside local shards, one per line; None if there is no such file.

    A line's number is a label, so no line may be blank. Raises UsageError for a file that cannot be read or has a blank line,
    and for shards in several folders with different files.
    """
    found: dict[Path, list[str]] = {}
    for folder in dict.fromkeys(Path(shard).parent for shard in shards):
        path = folder / "classes.txt"
        if is_file(path):
            found[path] = read_class_names(path)
    for path, names in found.items():
        first = next(iter(found))
        if list(map(compose, names)) != list(map(compose, found[first])):
            raise UsageError(f"{first} and {path} differ, but shards of one data set have the same classes; make them equal")
    return next(iter(found.values()), None)


def read_label(content: bytes, shard: str, name: str) -> int:
    """A label from the content of the label file `name` of a shard: ASCII digits, perhaps with white space around them.

    Raises UsageError for other content, or a number of more than 18 digits.
    """
    text = content.strip()
    if text.isdigit() and len(text) <= _MOST_DIGITS:  # bytes: ASCII digits only
        return int(text)
    where = f"{shard}, sample {escape(split_key(name))}"
    if not re.fullmatch(rb"-?[0-9]+", text):
        raise UsageError(f"{where}: label {content[:20]!r} is not a whole number in digits 0 to 9")
    if len(text) > _MOST_DIGITS:
        raise UsageError(f"{where}: label {text[:20].decode()}… of {len(text):,} digits is out of range")
    raise UsageError(f"{where}: label {int(text)} is out of range; labels are 0 or more")


def split_key(name: str, first_dot: bool = False) -> str:
    """The key of a file of a shard: its path without the extension, or with `first_dot` without all of its extensions."""
    folder, _, base = name.rpartition("/")
    stem = base.partition(".")[0] if first_dot else os.path.splitext(base)[0]
    return f"{folder}/{stem}" if folder else stem


class Entry(Generic[T]):
    """A file of a shard: its path there, and the `content` of an image or the `label` of a label file; the other is None."""

    def __init__(self, name: str, content: T | None = None, label: int | None = None) -> None:
        self.name, self.content, self.label = name, content, label


def walk_shard(tar: TarReader, load: Callable[[tarfile.TarInfo], T]) -> Iterator[Entry[T]]:
    """The images, as `load` gives them, and the labels of a shard. Everything else is counted in the ledger.

    Raises UsageError for a label that is not a whole number.
    """
    ledger, images = tar.ledger, dict[str, tarfile.TarInfo]()
    for member in tar:
        if member.type == tarfile.DIRTYPE:
            continue
        name = member.name if member.name[:1] != "." else re.sub(r"^(\./+)+", "", member.name)
        is_label = extension_of(name) == ".cls"
        if is_hidden_path(name):
            ledger.leave_out("hidden", posixpath.basename(name))
            continue
        if not is_label and not is_image_name(name):
            ledger.leave_out("other_files", extension_of(name))
            continue
        source = member
        if member.issym() or member.islnk():
            folder = posixpath.dirname(name) if member.issym() else ""
            target = images.get(posixpath.normpath(posixpath.join(folder, member.linkname)))
            if target is None:
                ledger.warn(
                    "links_in_shard", name, f"{tar.path}: {name} is a link to {member.linkname}, which cannot be followed"
                )
                continue
            source = target
        elif not member.isreg():
            ledger.leave_out("special", name)
            continue
        if tar.input.seekable():
            images[name] = source
        if is_label:
            if source.size > 1000:
                raise UsageError(f"{tar.path}: label file {escape(name)} has {source.size:,} bytes; expected a whole number")
            yield Entry(name, label=read_label(tar.read(source), tar.path, name))
        else:
            tar.check_content(source)
            yield Entry(name, load(source))


def pair_samples(entries: Iterator[Entry[T]], path: str, ledger: Ledger, needs_labels: bool) -> Iterator[tuple[str, T, int]]:
    """(key, image, label) of the samples of a shard, each as soon as it is complete.

    The key is the name without its last extension. WebDataset's is the name up to the first dot, so `x.seg.png` belongs to the
    sample `x`: it is left out if `x` has an image of its own, and it is the image of `x` if there is no other. If two images or
    two labels have the same key, the first is used, with a warning.

    Raises UsageError for an image without a label (if `needs_labels` is False, its label is IGNORED), and for a label with
    several images.
    """
    images: dict[str, Entry[T]] = {}
    labels: dict[str, Entry[T]] = {}
    done: dict[str, tuple[str, str, int | None]] = {}
    group: str | None = None
    for entry in entries:
        if split_key(entry.name, first_dot=True) != group:
            if group is not None:
                yield from _finish_group(group, images, labels, done, path, ledger)
            group = split_key(entry.name, first_dot=True)
        key = split_key(entry.name)
        held = labels if entry.label is not None else images
        if key in held or key in done:
            _warn_of_second(entry, key, held, done, path, ledger)
            continue
        held[key] = entry
        if key in images and key in labels:
            image, label = images.pop(key), labels.pop(key)
            done[key] = image.name, label.name, label.label
            yield _sample(key, image, label)
    for key in list(dict.fromkeys(split_key(entry.name, first_dot=True) for entry in images.values())):
        yield from _finish_group(key, images, labels, done, path, ledger)
    for key, entry in images.items():
        if needs_labels:
            raise no_label(path, key)
        yield _sample(key, entry, Entry("", label=IGNORED))
    for entry in labels.values():
        ledger.leave_out("labels_without_image", entry.name)


def _sample(key: str, image: Entry[T], label: Entry[T]) -> tuple[str, T, int]:
    assert image.content is not None
    assert label.label is not None
    return key, image.content, label.label


def _finish_group(
    group: str,
    images: dict[str, Entry[T]],
    labels: dict[str, Entry[T]],
    done: dict[str, tuple[str, str, int | None]],
    path: str,
    ledger: Ledger,
) -> Iterator[tuple[str, T, int]]:
    """Decide about the images called `GROUP.field.png` that have no label of their own."""
    fields = [key for key, entry in images.items() if key != group and split_key(entry.name, first_dot=True) == group]
    if not fields or (group not in done and group not in images and group not in labels):
        return
    if group in done or group in images:
        for key in fields:
            name = images.pop(key).name
            ledger.leave_out("other_fields", name.removeprefix(group))
    elif len(fields) == 1:
        image, label = images.pop(fields[0]), labels.pop(group)
        done[group] = image.name, label.name, label.label
        yield _sample(group, image, label)
    else:
        names = " and ".join(escape(images[key].name) for key in fields[:2])
        raise UsageError(
            f"{path}, sample {escape(group)}: it has several images, {names}; call the one to use {escape(group)}.jpg"
        )


def _warn_of_second(
    entry: Entry[T],
    key: str,
    held: dict[str, Entry[T]],
    done: dict[str, tuple[str, str, int | None]],
    path: str,
    ledger: Ledger,
) -> None:
    is_label = entry.label is not None
    if key in held:
        first, label = held[key].name, held[key].label
    else:
        image, named, label = done[key]
        first = named if is_label else image
    kind = "labels" if is_label else "images"
    differs = f" (which differ: {label} and {entry.label})" if is_label and label != entry.label else ""
    line = f"{path}: key {key} has two {kind}, {first} and {entry.name}{differs}; the first is used"
    ledger.warn("second_labels" if is_label else "second_images", entry.name, line)


def no_label(path: str, key: str) -> UsageError:
    """The error for an image without a label."""
    key = escape(key)
    return UsageError(f"{path}, sample {key}: no label; expected {key}.cls beside the image")


def _print_left_out(ledger: Ledger) -> None:
    if ledger.left_out or ledger.warnings:
        for line in ledger.lines():
            say(line)


class ShardStream(IterableDataset[tuple[Tensor, int]]):
    """An endless stream of training images from URLs (`https://…`) or pipes (`pipe:aws s3 cp …`), read from front to back.

    Each pass reads the shards in a new order. Images are drawn at random from a buffer of `buffer` images. Shards are divided
    among all ranks and their workers; if there are fewer shards than these processes, images are divided instead. An image may
    appear twice before another appears once. `length`: number of images in an epoch.

    Images are paired with labels as in local shards. What is left out of a shard is printed after its first reading.

    Raises UsageError for a shard that cannot be read, and for a label that is not among the classes.
    """

    flips = True
    transform: Callable[[Image.Image], Tensor]

    def __init__(self, pattern: str, class_names: list[str], length: int, buffer: int = 2000) -> None:
        self.paths = expand_shards(pattern)
        self.class_names, self.length, self.buffer = list(class_names), length, buffer
        self.seed, self.rank, self.ranks = 0, 0, 1
        self.bad: BadImages | None = None  # lists the images that do not decode; they are skipped
        shards = f"a stream of {len(self.paths):,} shard{'s' * (len(self.paths) != 1)}, {length:,} images an epoch"
        self.ledger = Ledger(pattern, length, summary=shards)

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
                report = _print_left_out if passes == 0 and (by_shard or consumer == 0) else None
                for place, sample in enumerate(self._read(self.paths[index], report)):
                    if by_shard or place % consumers == consumer:
                        count += 1
                        yield sample
            if not count:
                raise UsageError(
                    f"{', '.join(self.paths[index] for index in own[:3])}: no sample for process {consumer + 1} of {consumers};"
                    " a sample is KEY.jpg with KEY.cls, and each process needs at least one"
                )
            passes += 1

    def _read(self, path: str, report: Callable[[Ledger], object] | None = None) -> Iterator[tuple[bytes, int, str]]:
        """The samples of a shard. `report`: is given the ledger at the end."""
        ledger = Ledger(path)
        try:
            with open_stream(path) as stream, decompress(stream) as content:
                tar = TarReader(content, path, None, ledger)
                for key, image, label in pair_samples(walk_shard(tar, tar.read), path, ledger, needs_labels=True):
                    check_label(f"{path}, sample {escape(key)}", label, len(self.class_names))
                    yield image, label, f"{path}, sample {key}"
        except Exception as error:  # of the stream's command, or of decompression
            if isinstance(error, UsageError) and str(error).startswith(path):
                raise
            raise UsageError(f"{path} cannot be read as a stream of a tar file: {reason(error)}") from None
        if report is not None:
            report(ledger)
