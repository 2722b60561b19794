"""What counts as an image is one rule for every reader, and each says what it left out."""

from __future__ import annotations

import io
import json
import os
import socket
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from dgnet.data import EVALUATION, TRAIN, Ledger, Preprocessing, ShardStream, find_image_files, open_dataset
from dgnet.data._ledger import escape, is_hidden
from dgnet.detection import CocoDetection
from dgnet.detection._predict import find_images as find_images_to_detect
from dgnet.errors import BadImageError, UsageError
from tests.helpers.data import jpeg, write_folder

ADVICE = Preprocessing((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).evaluation_transform()


# Each reader gets a folder with the class folders cat and dog, of two images each, and an oddity in it. It returns the names of
# the images that it takes, and the line and the warnings of its ledger.
def read_class_folders(root: Path, capsys) -> tuple[set[str], str]:
    dataset = open_dataset(str(root), TRAIN)
    return {Path(dataset.name(i)).name for i in range(len(dataset))}, "\n".join(dataset.ledger.lines())


def read_flat_folder(root: Path, capsys) -> tuple[set[str], str]:
    dataset = open_dataset(str(root / "cat"), EVALUATION, class_names=["cat"], needs_labels=False)
    return {Path(dataset.name(i)).name for i in range(len(dataset))}, "\n".join(dataset.ledger.lines())


def pack(root: Path) -> Path:
    """The folder as a shard, with the number of its class beside each image."""
    path = root.parent / "packed.tar"
    with tarfile.open(path, "w") as tar:
        for label, folder in enumerate(("cat", "dog")):
            for file in sorted((root / folder).rglob("*")):
                if not file.is_file():
                    continue
                name = f"{folder}/{file.relative_to(root / folder)}"
                tar.add(file, name)
                if file.name in ("0.jpg", "1.jpg"):
                    member = tarfile.TarInfo(f"{os.path.splitext(name)[0]}.cls")
                    member.size = 1
                    tar.addfile(member, io.BytesIO(str(label).encode()))
    return path


def read_shard(root: Path, capsys) -> tuple[set[str], str]:
    dataset = open_dataset(str(pack(root)), TRAIN)
    return {Path(key).name + ".jpg" for _, key, _, _ in dataset.samples}, "\n".join(dataset.ledger.lines())


def read_stream(root: Path, capsys) -> tuple[set[str], str]:
    stream = ShardStream(f"pipe:cat {pack(root)}", ["cat", "dog"], length=4, buffer=1)
    stream.transform = ADVICE
    list(islice(stream, 9))
    samples = {Path(name.split(", sample ")[1]).name + ".jpg" for _, _, name in islice(stream._read(stream.paths[0]), 9)}
    return samples, capsys.readouterr().err


def read_coco(root: Path, capsys) -> tuple[set[str], str]:
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 8, "height": 8} for i in (0, 1)]
    document = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (root.parent / "coco.json").write_text(json.dumps(document))
    dataset = CocoDetection(root.parent / "coco.json", root / "cat")
    return {Path(dataset.name(i)).name for i in range(len(dataset))}, "\n".join(dataset.ledger.lines())


def read_predict(root: Path, capsys) -> tuple[set[str], str]:
    files, ledgers = find_image_files([root])
    return {file.name for file, _ in files}, "\n".join(line for ledger in ledgers for line in ledger.lines())


def read_detect_predict(root: Path, capsys) -> tuple[set[str], str]:
    found, ledgers = find_images_to_detect([str(root)], root.parent / "drawn")
    return {file.name for file in found.values()}, "\n".join(line for ledger in ledgers for line in ledger.lines())


READERS: dict[str, Callable[..., tuple[set[str], str]]] = {
    "class folders": read_class_folders,
    "flat folder": read_flat_folder,
    "shard": read_shard,
    "stream": read_stream,
    "coco": read_coco,
    "predict": read_predict,
    "detect predict": read_detect_predict,
}
HIDDEN = ("._x.jpg", ".hidden.jpg", ".ipynb_checkpoints/x.jpg", "__MACOSX/x.jpg", "@eaDir/x.jpg")


@pytest.fixture
def root(tmp_path) -> Path:
    return write_folder(tmp_path / "data", {"cat": 2, "dog": 2})


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_names_are_skipped_everywhere(root, reader, name, capsys):
    (root / "cat" / name).parent.mkdir(exist_ok=True)
    (root / "cat" / name).write_bytes(b"no image")
    taken, words = READERS[reader](root, capsys)
    assert taken == {"0.jpg", "1.jpg"}
    if reader != "coco":  # it reads the images of its list only
        assert "1 hidden file or folder" in words
        assert words.count("\n") <= 1


@pytest.mark.parametrize("reader", [name for name in READERS if name != "coco"])
def test_files_that_are_no_images_are_counted_by_extension(root, reader, capsys):
    for name in ("a.txt", "b.txt"):
        (root / "cat" / name).write_bytes(b"x")
    _, words = READERS[reader](root, capsys)
    assert "left out: 2 other files (.txt)" in words


@pytest.mark.parametrize("reader", READERS)
def test_without_oddities_a_line_has_no_noise(root, reader, capsys):
    taken, words = READERS[reader](root, capsys)
    assert taken == {"0.jpg", "1.jpg"}
    assert "left out" not in words
    assert "warning" not in words


def test_names_with_commas_are_told_apart():
    ledger = Ledger("photos")
    ledger.count_classes([0], ["tench", "dipper, water ouzel", "kite"])
    assert str(ledger) == "photos: 1 image of 1 class; left out: 2 classes without images ('dipper, water ouzel', 'kite')"


def test_the_line_of_a_data_set(root):
    (root / "dog2").mkdir()
    (root / "cat" / "._0.jpg").write_bytes(b"")
    for name in ("a.txt", "cat/b.txt"):
        (root / name).write_bytes(b"")
    (root / "loose.jpg").write_bytes(jpeg(0))
    ledger = open_dataset(str(root), TRAIN).ledger
    assert ledger.lines() == [
        f"{root}: 4 images of 2 classes; left out: 1 hidden file or folder (._0.jpg), 2 other files (.txt),"
        " 1 empty class folder (dog2), 1 image outside the class folders (loose.jpg)",
        f"warning: {root}/dog2 holds no images; class 'dog2' has none here",
    ]
    assert ledger.document() == {
        "source": str(root),
        "images": 4,
        "classes": 2,
        "left_out": {"hidden": 1, "other_files": 2, "empty_class_folders": 1, "outside_class_folders": 1},
        "warnings": [f"{root}/dog2 holds no images; class 'dog2' has none here"],
    }


@pytest.mark.parametrize("reader", ["class folders", "predict", "detect predict"])
def test_links_are_followed_once(root, tmp_path, reader, capsys):
    more = write_folder(tmp_path / "elsewhere", {"more": 3}) / "more"
    for file in more.iterdir():
        file.rename(more / f"new{file.name}")
    (root / "cat" / "more").symlink_to(more)
    (root / "cat" / "again").symlink_to(more)
    (root / "cat" / "up").symlink_to(root)
    (root / "cat" / "self").symlink_to(root / "cat" / "self")
    (more / "deeper").symlink_to(more)
    taken, words = READERS[reader](root, capsys)
    assert taken == {"0.jpg", "1.jpg", "new0.jpg", "new1.jpg", "new2.jpg"}
    assert "1 link to a folder above it (up)" in words
    assert "links to folders that are read already" in words
    assert "1 broken link (self)" in words


@pytest.mark.parametrize("reader", ["class folders", "predict", "detect predict"])
def test_a_folder_that_cannot_be_read_is_an_error(root, reader, monkeypatch, capsys):
    (root / "cat" / "locked").mkdir()
    scan = os.scandir

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UsageError, match=r"locked cannot be read: Permission denied"):
        READERS[reader](root, capsys)


def test_special_files_are_bad_images_and_never_opened(root):
    os.mkfifo(root / "cat" / "f.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(root / "dog")  # a socket's path is limited to 108 characters
        server.bind("s.jpg")
        os.chdir(here)
    (root / "dog" / "z.jpg").symlink_to("/dev/zero")
    dataset = open_dataset(str(root), TRAIN)
    kinds = {"f.jpg": "a FIFO", "s.jpg": "a socket", "z.jpg": "a device"}
    for index in range(len(dataset)):
        name = Path(dataset.name(index)).name
        if name in kinds:
            with pytest.raises(BadImageError, match=f"{name} is {kinds.pop(name)}, not a regular file"):
                dataset[index]
    assert not kinds


def test_a_name_as_one_printable_line():
    assert escape("plain é 猫 C:\\x.jpg") == "plain é 猫 C:\\x.jpg"
    assert escape("a\tb\n\\c\udcff\u2028.jpg") == r"a\tb\n\\c\xff\u2028.jpg"


def test_hidden_names():
    assert not any(map(is_hidden, (".", "..", "a.jpg", "Thumbs", "x.y")))
    assert all(map(is_hidden, (".x", "._x.jpg", "__MACOSX", "Thumbs.db", "lost+found")))


def test_a_reason_must_be_known():
    with pytest.raises(AssertionError):
        Ledger("x").leave_out("unheard of", "y")
