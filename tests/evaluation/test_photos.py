"""The photos on which `dgnet convert --check` compares networks."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgnet.checkpoint import Checkpoint
from dgnet.data import IGNORED, Preprocessing, number_classes
from dgnet.errors import UsageError
from dgnet.evaluation import open_photos
from tests.helpers.data import jpeg, write_folder, write_shard


def describe(classes: int) -> Checkpoint:
    """A checkpoint of a network of so many classes."""
    preprocessing = Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3)
    return Checkpoint(Path("network"), {}, "resnet18", {}, number_classes(classes), {}, preprocessing)


def test_one_shard_and_a_pattern_of_shards_are_the_same(tmp_path):
    path = write_shard(tmp_path / "a.tar", [{"jpg": jpeg(label), "cls": str(label).encode()} for label in range(5)])
    (tmp_path / "classes.txt").write_text("\n".join("abcde"))
    for source in (str(path), str(tmp_path / "{a..a}.tar")):
        photos, remark = open_photos(describe(5), [source])
        assert ([label for _, label in photos], remark) == ([0, 1, 2, 3, 4], "")
        photos, remark = open_photos(describe(7), [source])
        assert [label for _, label in photos] == [IGNORED] * 5
        assert remark.endswith("has 5 classes, the network 7; use data with the network's classes; top-1 is left out")
        assert photos.ledger.images == 5


def test_other_classes_are_compared_without_labels_also_in_folders(tmp_path):
    folder = write_folder(tmp_path / "photos", {"a": 2, "b": 1})
    photos, remark = open_photos(describe(7), [str(folder)])
    assert (len(photos), photos[0][1]) == (3, IGNORED)
    assert remark.endswith("; top-1 is left out")


def test_damaged_shards_are_refused_also_if_their_classes_are_others(tmp_path):
    path = write_shard(tmp_path / "a.tar", [{"jpg": jpeg(0), "cls": b"9"}])
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UsageError, match="is cut short"):
        open_photos(describe(7), [str(path)])
