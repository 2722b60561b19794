"""From class names to labels: by name, by ImageNet's synsets and words, or by position."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from timm.data import ImageNetInfo, infer_imagenet_subset

from dgnet.data._ledger import compose
from dgnet.errors import UsageError, did_you_mean
from dgnet.paths import read_text


def map_labels(source: str, own: Sequence[str], known: Sequence[str]) -> list[int]:
    """For each class name in `own` its label: its position in `known`. Names are equal if their Unicode is (NFC).

    If `known` are ImageNet's classes, `own` may name them by synset ("n01440764") or by one of their words ("tench"). If
    `known` only numbers the classes (`number_classes`), the order decides.

    Raises UsageError for a class that is not in `known`, and for a name that stands for several classes in one of them.
    """
    own, known = list(map(compose, own)), list(map(compose, known))
    if own == known:  # not by name, because names may repeat (ImageNet has two classes "crane")
        return list(range(len(known)))
    if known == number_classes(len(known)):
        if len(own) == len(known):
            return list(range(len(known)))
        raise UsageError(f"{source} has {len(own):,} classes, the network {len(known):,}; use data with the network's classes")
    labels = {name: label for label, name in enumerate(known)}
    unknown = [name for name in own if name not in labels]
    if unknown:
        found = _find_in_imagenet(own, known)
        if found is not None and None not in found:
            return [label for label in found if label is not None]
        if found is not None:
            unknown = [name for name, label in zip(own, found, strict=True) if label is None]
        raise UsageError(
            f"{source}: class {unknown[0]!r} is not one of the {len(known)} classes known from training"
            f"{did_you_mean(unknown[0], known)}{_explain_numbers(known)}"
        )
    counts = [Counter(names) for names in (own, known)]
    for name in own:
        if max(names[name] for names in counts) > 1:
            raise UsageError(f"{source}: several classes are called {name!r}, so labels cannot be found by name; rename them")
    return [labels[name] for name in own]


def _explain_numbers(known: Sequence[str]) -> str:
    if list(known) != [str(label) for label in range(len(known))]:
        return ""
    return f", which are numbers (0 to {len(known) - 1}); names of classes in shards are read from classes.txt beside them"


def number_classes(classes: int) -> list[str]:
    """Names for classes whose names are not known: class 0, class 1, …"""
    return [f"class {label}" for label in range(classes)]


@cache
def _imagenet(classes: int) -> ImageNetInfo | None:
    """timm's tables for the part of ImageNet with so many classes, None if there is none."""
    subset = infer_imagenet_subset({"num_classes": classes})
    return None if subset is None else ImageNetInfo(subset)


def imagenet_classes(classes: int) -> list[str] | None:
    """What ImageNet calls its classes, in words ("tench, Tinca tinca"), in the order of their labels.

    `classes`: 1,000, or the number of one of timm's larger parts; None for any other number.
    """
    info = _imagenet(classes)
    return None if info is None else list(info.label_descriptions())


@cache
def _imagenet_labels(classes: int) -> Mapping[str, frozenset[int]]:
    """The labels that a synset, a description, or a single word of it may stand for."""
    info = _imagenet(classes)
    labels: defaultdict[str, set[int]] = defaultdict(set)
    if info is not None:
        for label, (synset, words) in enumerate(zip(info.label_names(), info.label_descriptions(), strict=True)):
            for name in (synset, words, *words.split(", ")):
                labels[_plain(name)].add(label)
    return {name: frozenset(found) for name, found in labels.items()}


def _plain(name: str) -> str:
    return name.replace("_", " ").casefold().strip()


def _find_in_imagenet(own: Sequence[str], known: Sequence[str]) -> list[int | None] | None:
    """For each name in `own` its label, None where it names no class or several. None unless `known` are ImageNet's classes."""
    info = _imagenet(len(known))
    if info is None or list(known) not in (list(map(compose, info.label_descriptions())), info.label_names()):
        return None
    labels = _imagenet_labels(len(known))
    found: list[int | None] = []
    for place, name in enumerate(own):
        options = labels.get(_plain(name)) or frozenset().union(*(labels.get(_plain(word), ()) for word in name.split(", ")))
        if len(own) == len(known) and place in options:  # also one of two classes with the same name
            found.append(place)
        else:
            found.append(next(iter(options)) if len(options) == 1 else None)
    return found


def read_class_names(path: Path) -> list[str]:
    """The class names in a text file, one per line; a line's number is a label.

    Raises UsageError for a file that cannot be read, holds no names, or has a blank line.
    """
    lines = [line.strip() for line in read_text(path).split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise UsageError(f"{path} holds no class names; expected one on each line")
    if "" in lines:
        raise UsageError(
            f"{path}: line {lines.index('') + 1} is blank, but line numbers are labels; remove it or name the class"
        )
    return lines
