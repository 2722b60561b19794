"""Labels and class names as text."""

from __future__ import annotations

import unicodedata

import pytest
from timm.data import ImageNetInfo

from dgnet.data import (
    EVALUATION,
    TRAIN,
    imagenet_classes,
    map_labels,
    number_classes,
    open_dataset,
    open_train_and_evaluation,
)
from dgnet.errors import UsageError
from tests.helpers.data import jpeg, write_folder, write_shard

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "Füchse") for form in ("NFC", "NFD"))
FORMS = [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)]


@pytest.mark.parametrize(("first", "second"), FORMS)
def test_names_are_equal_in_every_unicode_form(tmp_path, first, second):
    assert map_labels("x", [second, "B"], ["B", first]) == [1, 0]
    train = open_dataset(str(write_folder(tmp_path / "a", {first: 1, "B": 1})), TRAIN)
    held_out = open_dataset(str(write_folder(tmp_path / "b", {second: 1, "B": 1})), EVALUATION, train.class_names)
    assert held_out.read(1)[1] == train.class_names.index(COMPOSED) == 1
    (tmp_path / "classes.txt").write_text(f"B\n{second}\n", encoding="utf-8")
    shard = write_shard(tmp_path / "a.tar", [{"jpg": jpeg(0), "cls": b"1"}])
    assert open_dataset(str(shard), EVALUATION, train.class_names).read(0)[1] == 1


def test_two_folders_of_one_name_are_refused(tmp_path):
    write_folder(tmp_path, {COMPOSED: 1, DECOMPOSED: 1})
    with pytest.raises(UsageError, match=r"holds two class folders called 'Füchse'.*merge them"):
        open_dataset(str(tmp_path), TRAIN)


@pytest.mark.parametrize(("own", "known"), [(["a"], ["a", "a"]), (["a", "a"], ["a"]), (["b", "a", "a"], ["a", "a", "b"])])
def test_a_name_of_several_classes_gives_no_label(own, known):
    with pytest.raises(UsageError, match="several classes are called 'a'"):
        map_labels("x", own, known)


@pytest.mark.parametrize("content", ["0", "0\n", " 0 \r\n", "00"])
def test_labels_are_digits(tmp_path, content):
    path = write_shard(tmp_path / "a.tar", [{"jpg": jpeg(0), "cls": content.encode()}])
    assert open_dataset(str(path), TRAIN).read(0)[1] == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *(
            (text, "is not a whole number")
            for text in ("1_0", "+1", "0x10", "1.0", "1e2", "０", "٣", "", "1 2", "\ufeff1", "one")
        ),
        ("1" + "0" * 100, "of 101 digits is out of range"),
        ("9" * 900, "of 900 digits is out of range"),
        ("99999", "label 99999 is out of range, allowed are 0 to 9999"),
        ("-1", "label -1 is out of range"),
        ("1" * 2000, "has 2,000 bytes"),
    ],
)
def test_other_labels_are_refused(tmp_path, content, message):
    path = write_shard(tmp_path / "a.tar", [{"jpg": jpeg(0), "cls": content.encode()}])
    with pytest.raises(UsageError, match=message):
        open_dataset(str(path), TRAIN)


@pytest.mark.parametrize("content", [b"cat\nant\n", b"\xef\xbb\xbfcat\r\nant\r\n\r\n", b"cat\nant"])
def test_class_names_of_every_editor(tmp_path, content):
    path = write_shard(tmp_path / "a.tar", [{"jpg": jpeg(0), "cls": b"1"}])
    (tmp_path / "classes.txt").write_bytes(content)
    assert open_dataset(str(path), TRAIN).class_names == ["cat", "ant"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cat\n\nant\n", "line 2 is blank, but line numbers are labels"),
        (b"\ncat\n", "line 1 is blank"),
        (b"caf\xe9\n", "not UTF-8"),
        (b"\n\n", "holds no class names"),
    ],
)
def test_class_names_that_would_shift_labels(tmp_path, content, message):
    path = write_shard(tmp_path / "a.tar", [{"jpg": jpeg(0), "cls": b"0"}])
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        open_dataset(str(path), TRAIN)


def test_shards_of_one_data_set_have_the_same_classes(tmp_path):
    for name, classes in (("a", "cat\nant\n"), ("b", "ant\ncat\n")):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "x.tar", [{"jpg": jpeg(0), "cls": b"0"}])
        (tmp_path / name / "classes.txt").write_text(classes)
    with pytest.raises(UsageError, match="differ, but shards of one data set have the same classes"):
        open_dataset(str(tmp_path / "{a,b}" / "x.tar"), TRAIN)


def test_a_class_folder_whose_name_is_no_text(tmp_path):
    write_folder(tmp_path, {"cat": 1, "d\udcff": 1})
    with pytest.raises(UsageError, match=r"d\\xff has a name that cannot be printed"):
        open_dataset(str(tmp_path), TRAIN)


def test_a_message_about_shards_without_class_names_says_where_names_are_read(tmp_path):
    samples = [{"jpg": jpeg(90), "cls": str(label).encode()} for label in (0, 1)]
    train = write_shard(tmp_path / "train.tar", samples)
    write_folder(tmp_path / "val", {"cat": 1, "dog": 1})
    with pytest.raises(UsageError, match=r"the 2 classes known from training, which are numbers \(0 to 1\); .* classes.txt"):
        open_train_and_evaluation(str(train), str(tmp_path / "val"))


def test_a_folder_of_shards_is_told_how_shards_are_named(tmp_path):
    shard = write_shard(tmp_path / "train.tar", [{"jpg": jpeg(90), "cls": b"0"}])
    with pytest.raises(UsageError, match=f"no class folders; .*; its shards are named by a pattern, as in {shard}"):
        open_dataset(str(tmp_path), TRAIN)


def test_a_shard_that_is_named_twice_is_said(tmp_path):
    train = write_shard(tmp_path / "train.tar", [{"jpg": jpeg(90), "cls": b"0"}])
    dataset = open_dataset(f"{train}::{train}", TRAIN)
    assert len(dataset) == 2
    assert dataset.ledger.warnings == [f"{train} is named 2 times; its images count 2 times"]


@pytest.mark.slow
def test_imagenets_classes_are_found_by_synset_and_by_each_of_their_words():
    known = imagenet_classes(1000)
    assert known is not None
    assert map_labels("x", ["n01440764", "goldfish", "Tiger_Shark", "tench, Tinca tinca"], known) == [0, 1, 3, 0]
    synsets = ImageNetInfo().label_names()
    assert map_labels("x", synsets, known) == list(range(1000))
    assert map_labels("x", known[::-1][:100], synsets) == list(range(999, 899, -1))
    assert map_labels("x", [name.partition(",")[0] for name in known], known) == list(range(1000))  # two are called crane
    for name in ("aeroplane", "crane"):  # no class, and two
        with pytest.raises(UsageError, match=f"x: class '{name}' is not one of the 1000 classes"):
            map_labels("x", ["tench", name], known)
    with pytest.raises(UsageError, match="class 'n01440764' is not one of the 3 classes"):
        map_labels("x", ["n01440764"], known[:3])


def test_numbered_classes_are_taken_in_the_order_of_the_data():
    assert map_labels("x", ["b", "a"], number_classes(2)) == [0, 1]
    with pytest.raises(UsageError, match="x has 3 classes, the network 2"):
        map_labels("x", ["a", "b", "c"], number_classes(2))
