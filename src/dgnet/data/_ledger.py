"""One rule for what counts as an image file, and a ledger of what a source gave and what was left out."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchvision.datasets.folder import IMG_EXTENSIONS

from dgnet.errors import UsageError, reason
from dgnet.paths import find_kind, is_broken_link, reading, scan_folder

# Names that systems and tools put beside images, besides those that begin with a dot.
_SYSTEM_NAMES = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "thumbs.db"}

# For each reason for leaving something out: its words for one and for several.
_REASONS = {
    "hidden": ("hidden file or folder", "hidden files or folders"),
    "other_files": ("other file", "other files"),
    "outside_class_folders": ("image outside the class folders", "images outside the class folders"),
    "empty_class_folders": ("empty class folder", "empty class folders"),
    "loops": ("link to a folder above it", "links to folders above them"),
    "repeated_folders": ("link to a folder that is read already", "links to folders that are read already"),
    "broken_links": ("broken link", "broken links"),
    "repeated_names": ("repeated name", "repeated names"),
    "second_images": ("second image of a key", "second images of a key"),
    "second_labels": ("second label of a key", "second labels of a key"),
    "labels_without_image": ("label without an image", "labels without an image"),
    "other_fields": ("image of another field", "images of another field"),
    "links_in_shard": ("link inside a shard", "links inside a shard"),
    "empty_shards": ("shard without samples", "shards without samples"),
    "special": ("file that is not regular", "files that are not regular"),
    "classes_without_images": ("class without images", "classes without images"),
    "results": ("earlier result", "earlier results"),
    "unlisted_images": ("image that is not listed", "images that are not listed"),
}
_EXAMPLES = 3  # names in a line, at most
_WARNINGS = 5  # lines about single files of one kind, at most


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is skipped: its name begins with a dot, or a system made it."""
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in _SYSTEM_NAMES


def is_image_name(name: str) -> bool:
    """Whether the name has the extension of an image."""
    return os.path.splitext(name)[1].lower() in IMG_EXTENSIONS


def is_hidden_path(name: str) -> bool:
    """Whether a part of a path inside a tar file is hidden."""
    return any(map(is_hidden, name.split("/")))


def extension_of(name: str) -> str:
    """The extension of a name, such as ".txt", for the ledger."""
    return os.path.splitext(name)[1].lower() or "no extension"


def compose(name: str) -> str:
    """A name in Unicode's composed form (NFC), in which names are compared. macOS may store "ü" as "u" and a diaeresis."""
    return unicodedata.normalize("NFC", name)


def escape(name: str) -> str:
    r"""A name as one printable line. If it holds a control character, a line separator or bytes that are no UTF-8, these are
    written as `\t`, `\xff` and the like, and `\` as `\\`; other names are unchanged."""
    if not _UNPRINTABLE.search(name):
        return name
    return _UNPRINTABLE.sub(_escape_character, name.replace("\\", "\\\\"))


_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def _escape_character(found: re.Match[str]) -> str:
    character = found[0]
    if "\udc80" <= character <= "\udcff":  # a byte that is no UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape", "backslashreplace").decode()


@dataclass
class Ledger:
    """What a source gave, and what was left out and why. `str()` gives one line.

    `images`, `classes`: numbers of images taken, and of classes that have one; None if not known. `left_out`: for each reason
    the number of cases by name (or by extension). `warnings`: lines about single cases. `summary`: replaces the numbers.
    """

    source: str
    images: int | None = None
    classes: int | None = None
    left_out: dict[str, Counter[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    summary: str = ""
    figures: dict[str, int] = field(default_factory=dict)  # further numbers for the document

    def leave_out(self, why: str, name: str, count: int = 1) -> None:
        """Count something that is left out. `why`: a key of the table of reasons."""
        assert why in _REASONS, why
        self.left_out.setdefault(why, Counter())[name] += count

    def warn(self, why: str, name: str, line: str) -> None:
        """Count something that is left out, and keep a line about it; of each reason the first few."""
        self.leave_out(why, name)
        if self.left_out[why].total() <= _WARNINGS:
            self.warnings.append(line)

    def count_classes(self, labels: Sequence[int], class_names: Sequence[str], known_empty: Sequence[str] = ()) -> None:
        """Set `images` and `classes` from the labels of the images; negative labels are no class.

        Classes without an image are counted, except those of `known_empty`, which are counted already.
        """
        self.images = len(labels)
        found = {label for label in labels if label >= 0}
        self.classes = len(found)
        if not found:
            return
        for label, name in enumerate(class_names):
            if label not in found and name not in known_empty:
                self.leave_out("classes_without_images", name)

    def describe(self) -> str:
        """What was taken and left out, without the source."""
        words = self.summary
        if not words:
            words = "" if self.images is None else f"{self.images:,} image{'s' * (self.images != 1)}"
            if self.classes:
                words += f" of {self.classes:,} class{'es' * (self.classes != 1)}"
        left_out = ", ".join(_describe_reason(why, names) for why, names in self.left_out.items())
        return "; ".join(part for part in (words, left_out and f"left out: {left_out}") if part)

    def __str__(self) -> str:
        return f"{escape(self.source)}: {self.describe()}"

    def lines(self, title: str = "") -> list[str]:
        """The lines to print: the ledger after `title`, and the warnings."""
        return [f"{title}{self}", *(f"warning: {escape(line)}" for line in self.warnings)]

    def document(self) -> dict[str, Any]:
        """The ledger for a JSON document: numbers by name, and the total of each reason."""
        left_out = {why: names.total() for why, names in self.left_out.items()}
        known = {"images": self.images, "classes": self.classes}
        return {
            "source": escape(self.source),
            **{name: number for name, number in known.items() if number is not None},
            **self.figures,
            "left_out": left_out,
            "warnings": list(map(escape, self.warnings)),
        }


def _describe_reason(why: str, names: Counter[str]) -> str:
    total = names.total()
    shown = [escape(name) for name in list(names)[:_EXAMPLES]]
    if any("," in name for name in shown):  # such as ImageNet's synonyms
        shown = [f"'{name}'" for name in shown]
    examples = ", ".join([*shown, *["…"] * (len(names) > _EXAMPLES)])
    return f"{total:,} {_REASONS[why][total != 1]} ({examples})"


class Walk:
    """Finds the images below folders. Links are followed; a folder is read once, so links cannot make a loop.

    Raises UsageError for a folder that cannot be read.
    """

    def __init__(self, root: Path, ledger: Ledger) -> None:
        self.root, self.ledger = root, ledger
        self.above = {_identity(folder) for folder in (root, *_resolve(root).parents)}

    def entries(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """Folders and other entries of `folder`, without what is hidden, in no particular order."""
        folders, files = [], []
        for name, is_folder in scan_folder(folder):
            path = folder / name
            if is_hidden(name):
                self.ledger.leave_out("hidden", name)
            elif is_folder:
                folders.append(path)
            else:
                files.append(path)
        return folders, files

    def images(self, folder: Path) -> list[Path]:
        """The images in `folder` and its subfolders, sorted by path."""
        return sorted(self._images(folder, {_identity(folder)}))

    def _images(self, start: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
        waiting = [start]
        while waiting:
            folders, files = self.entries(waiting.pop())
            for path in folders:
                identity = _identity(path)
                if identity in self.above:
                    self.ledger.leave_out("loops", path.name)
                elif identity in seen:
                    self.ledger.leave_out("repeated_folders", path.name)
                else:
                    seen.add(identity)
                    waiting.append(path)
            for path in files:
                if is_image_name(path.name):
                    yield path
                else:
                    self.leave_out_file(path)

    def leave_out_file(self, path: Path) -> None:
        """Count a file that is no image."""
        if is_broken_link(path):
            self.ledger.leave_out("broken_links", path.name)
        else:
            self.ledger.leave_out("other_files", extension_of(path.name))


def find_images(root: Path, ledger: Ledger) -> list[Path]:
    """The images in a folder and its subfolders, sorted by path. Raises UsageError for a folder that cannot be read."""
    found = Walk(root, ledger).images(root)
    ledger.images = len(found)
    return found


def find_image_files(paths: Sequence[str | Path], besides: Path | None = None) -> tuple[list[tuple[Path, Path]], list[Ledger]]:
    """Image files named on the command line, and those in folders with their subfolders: pairs (file, name in its folder).

    A file is taken as it is, whatever its name. Also returns a ledger for each folder. Images in `besides`, a folder of results
    below a folder of `paths`, are left out. Raises UsageError for a path that does
    not exist, and for a folder that cannot be read or holds no images.
    """
    found: list[tuple[Path, Path]] = []
    ledgers = []
    for path in map(Path, paths):
        kind = find_kind(path)
        if kind is None:
            raise UsageError(f"image {escape(str(path))} does not exist")
        if kind != "folder":
            found.append((path, Path(path.name)))
            continue
        ledger = Ledger(str(path))
        files = find_images(path, ledger)
        if besides is not None and besides.resolve() != path.resolve():
            results = [file for file in files if besides.resolve() in file.resolve().parents]
            for file in results:
                ledger.leave_out("results", file.name)
            files = [file for file in files if file not in set(results)]
            ledger.images = len(files)
        if not files:
            raise UsageError(f"folder {path} holds no images; allowed extensions: {' '.join(IMG_EXTENSIONS)}")
        found += [(file, file.relative_to(path)) for file in files]
        ledgers.append(ledger)
    return found, ledgers


def subfolders(folder: Path) -> list[Path]:
    """The folders in `folder` that are not hidden, sorted; links are followed. Raises UsageError if it cannot be read."""
    return sorted(folder / name for name, is_folder in scan_folder(folder) if is_folder and not is_hidden(name))


def _identity(folder: Path) -> tuple[int, int]:
    """Device and number of a folder, which are the same for all links to it."""
    with reading(f"folder {escape(str(folder))}"):
        found = os.stat(folder)
    return found.st_dev, found.st_ino


def _resolve(folder: Path) -> Path:
    try:
        return folder.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise UsageError(f"folder {escape(str(folder))} cannot be read: {reason(error)}") from None
