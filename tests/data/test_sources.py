from __future__ import annotations

import io
import struct
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dgnet.data import EVALUATION, TRAIN, Preprocessing, open_dataset, open_train_and_evaluation
from dgnet.errors import UsageError
from dgnet.typed import read_fields
from tests.helpers.data import SHARED_DATA, jpeg, write_folder, write_shard

PREPROCESSING = Preprocessing((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_digits_hold_out_a_fifth_of_each_class():
    train, held_out = open_train_and_evaluation("digits", None)
    assert len(train) + len(held_out) == 1797
    assert 0.18 < len(held_out) / 1797 < 0.22
    assert not train.flips
    train.transform = PREPROCESSING.evaluation_transform()
    image, label = train[0]
    assert image.shape == (3, 8, 8)
    assert train.class_names[label] == "0"


def test_a_folder_gives_its_classes_sorted(tmp_path):
    dataset = open_dataset(str(write_folder(tmp_path, {"cat": 2, "ant": 3})), TRAIN)
    assert dataset.class_names == ["ant", "cat"]
    assert [dataset.read(i)[1] for i in range(5)] == [0, 0, 0, 1, 1]


def test_a_class_may_be_called_train(tmp_path):
    for name in ("a", "b"):
        write_folder(tmp_path / name, {"car": 2, "train": 2})
    train, held_out = open_train_and_evaluation(str(tmp_path / "a"), str(tmp_path / "b"))
    assert train.class_names == held_out.class_names == ["car", "train"]


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev", "eval", "VAL"])
def test_a_divided_folder_gives_both(tmp_path, name):
    write_folder(tmp_path / "train", {"ant": 3, "cat": 2})
    write_folder(tmp_path / name, {"cat": 1})
    train, held_out = open_train_and_evaluation(str(tmp_path), None)
    assert (len(train), len(held_out)) == (5, 1)
    assert held_out.read(0)[1] == 1  # "cat" keeps the label of training


def test_data_are_never_split_silently(tmp_path):
    write_folder(tmp_path, {"ant": 3, "cat": 2})
    with pytest.raises(UsageError, match="has no evaluation images of its own; give them with --val-data"):
        open_train_and_evaluation(str(tmp_path), None)
    write_folder(tmp_path / "two", {"train": 3, "val": 2})  # classes of these names, or splits without class folders
    with pytest.raises(UsageError, match="holds the splits train, val, which hold no class folders"):
        open_train_and_evaluation(str(tmp_path / "two"), None)


def test_shards_are_read_by_offset_with_their_class_names(tmp_path):
    for shard in range(2):
        write_shard(tmp_path / f"a-{shard}.tar", [{"jpg": jpeg(20 * i), "cls": str(i % 2).encode()} for i in range(3)])
    (tmp_path / "classes.txt").write_text("ant\ncat\n")
    dataset = open_dataset(str(tmp_path / "a-{0..1}.tar"), TRAIN)
    assert len(dataset) == 6
    assert dataset.class_names == ["ant", "cat"]
    assert dataset.read(4) == (jpeg(20), 1)
    assert dataset.name(4) == f"{tmp_path}/a-1.tar, sample 0001"
    dataset.transform = PREPROCESSING.evaluation_transform()
    images, labels = next(iter(DataLoader(dataset, batch_size=6, num_workers=1)))
    assert labels.tolist() == [0, 1, 0, 0, 1, 0]
    torch.testing.assert_close(images[1].mean().item(), (20 / 255 - 0.5) / 0.5, rtol=0, atol=0.02)


def test_keys_of_shards_may_lie_in_folders(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("./v1.0/x.jpg", jpeg(0)), ("./v1.0/x.cls", b"0")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert open_dataset(str(tmp_path / "a.tar"), TRAIN).name(0).endswith("sample v1.0/x")


def test_digits_fit_their_own_classes_only():
    with pytest.raises(UsageError, match="digits has the classes 0 to 9, not the 2 known from training"):
        open_dataset("digits", EVALUATION, class_names=["dark", "light"])


@pytest.mark.slow
def test_cifar10_as_shards():
    root = SHARED_DATA / "cifar10"
    if not root.is_dir():
        pytest.skip(f"CIFAR-10 shards are not at {root}")
    dataset = open_dataset(str(root / "cifar10-test-000000.tar"), EVALUATION)
    assert len(dataset) == 10_000
    assert dataset.class_names[0] == "airplane"
    dataset.transform = PREPROCESSING.evaluation_transform()
    assert dataset[9_999][0].shape == (3, 8, 8)


def test_classes_of_shards_go_together_by_name(tmp_path):
    write_shard(tmp_path / "a.tar", [{"jpg": jpeg(0), "cls": b"0"}, {"jpg": jpeg(0), "cls": b"1"}])
    (tmp_path / "classes.txt").write_text("cat\nant\n")
    dataset = open_dataset(str(tmp_path / "a.tar"), EVALUATION, class_names=["ant", "bee", "cat"])
    assert [dataset.read(i)[1] for i in range(2)] == [2, 0]
    with pytest.raises(UsageError, match="class 'cat' is not one of the 2 classes known from training"):
        open_dataset(str(tmp_path / "a.tar"), EVALUATION, class_names=["ant", "bee"])
    (tmp_path / "classes.txt").write_text("crane\ncrane\n")  # ImageNet has two
    dataset = open_dataset(str(tmp_path / "a.tar"), EVALUATION, class_names=["crane", "crane"])
    assert [dataset.read(i)[1] for i in range(2)] == [0, 1]


def write_mnist(root: Path, counts: dict[str, int]) -> None:
    """MNIST's own files: magic number, sizes, then bytes, all big-endian."""
    (root / "MNIST" / "raw").mkdir(parents=True)
    for part, count in counts.items():
        images = struct.pack(">IIII", 0x803, count, 28, 28) + bytes(count * 28 * 28)
        labels = struct.pack(">II", 0x801, count) + bytes(index % 10 for index in range(count))
        (root / "MNIST" / "raw" / f"{part}-images-idx3-ubyte").write_bytes(images)
        (root / "MNIST" / "raw" / f"{part}-labels-idx1-ubyte").write_bytes(labels)


def test_a_data_set_of_torchvision_by_timms_name(tmp_path):
    write_mnist(tmp_path, {"train": 12, "t10k": 3})
    train, held_out = open_train_and_evaluation("torch/mnist", None, str(tmp_path))
    assert (len(train), len(held_out)) == (12, 3)
    assert str(held_out.ledger) == "torch/mnist (test split): 3 images"
    assert train.class_names[:2] == ["0 - zero", "1 - one"]
    train.transform = PREPROCESSING.evaluation_transform()
    image, label = train[11]
    assert (image.shape, label) == ((3, 8, 8), 1)


def test_hugging_face_data_sets_by_timms_name(tmp_path):
    pytest.importorskip("datasets", reason="the Hugging Face datasets package is not installed")
    write_folder(tmp_path / "data" / "train", {"ant": 3, "cat": 2})
    write_folder(tmp_path / "data" / "test", {"ant": 1, "cat": 1})
    source = f"hfds/{tmp_path}/data"
    with pytest.raises(UsageError, match=r"has no split called 'val' or .*as in hfds/.*data:test with --val-data"):
        open_train_and_evaluation(source, None, str(tmp_path / "cache"))
    train, held_out = open_train_and_evaluation(source, f"{source}:test", str(tmp_path / "cache"))
    assert held_out.ledger.source == f"{source} (test split)"
    assert (len(train), len(held_out)) == (5, 2)
    assert train.class_names == ["ant", "cat"]
    train.transform = PREPROCESSING.evaluation_transform()
    assert [train[i][1] for i in range(5)] == [0, 0, 0, 1, 1]
    (tmp_path / "data" / "train" / "ant" / "1.jpg").write_bytes(b"no image")
    broken = open_dataset(source, TRAIN, data_root=str(tmp_path / "cache2"))
    broken.transform = PREPROCESSING.evaluation_transform()
    with pytest.raises(UsageError, match="image 1 does not decode"):
        list(DataLoader(broken))


@pytest.mark.parametrize("augment", ["rrc", "pad-crop", "reflect-crop", "none"])
def test_transforms_give_the_networks_size(augment):
    preprocessing = Preprocessing((24, 16), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    image = Image.new("RGB", (40, 50))
    assert preprocessing.training_transform(augment, 0.5)(image).shape == (3, 24, 16)
    assert preprocessing.evaluation_transform()(image).shape == (3, 24, 16)


def test_a_small_photo_is_padded_and_cropped_without_being_squashed():
    torch.manual_seed(1)
    photo = Image.fromarray((torch.rand(30, 60, 3) * 255).byte().numpy())
    plain = PREPROCESSING.evaluation_transform()(photo)
    augmented = PREPROCESSING.training_transform("pad-crop", 0.0)
    crops = [augmented(photo) for _ in range(60)]
    assert any(torch.equal(crop, plain) for crop in crops)  # the shift by nothing
    assert any(torch.equal(crop[:, :-1], plain[:, 1:]) for crop in crops)  # by a pixel


def test_mirrored_borders_hold_no_black():
    white = Image.new("RGB", (8, 8), "white")
    assert min(PREPROCESSING.training_transform("pad-crop", 0.0)(white).min() for _ in range(20)) < 0
    assert all((PREPROCESSING.training_transform("reflect-crop", 0.0)(white) > 0).all() for _ in range(20))


def test_flips_follow_their_probability():
    image = Image.fromarray(torch.arange(64, dtype=torch.uint8).view(8, 8).numpy()).convert("RGB")
    plain = PREPROCESSING.evaluation_transform()(image)
    assert torch.equal(Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3).training_transform("none", 1.0)(image), plain)
    crops = [PREPROCESSING.training_transform("pad-crop", 1.0)(image) for _ in range(50)]
    assert any(torch.equal(crop, plain.flip(2)) for crop in crops)
    assert not any(torch.equal(crop, plain) for crop in crops)


def test_preprocessing_survives_as_plain_values():
    assert read_fields(Preprocessing, PREPROCESSING.to_dict(), "stored") == PREPROCESSING


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([{"jpg": jpeg(0), "cls": b"7"}], "sample 0000: label 7 is out of range, allowed are 0 to 1"),
        ([{"jpg": jpeg(0), "cls": b"-1"}], "label -1 is out of range"),
        ([{"jpg": jpeg(0), "cls": b"cat"}], "label b'cat' is not a whole number"),
        ([{"jpg": jpeg(0)}], "no label; expected 0000.cls"),
        ([{"txt": b"x"}], "holds no samples"),
    ],
)
def test_bad_shards_are_named(tmp_path, samples, message):
    write_shard(tmp_path / "a.tar", samples)
    (tmp_path / "classes.txt").write_text("ant\ncat\n")
    with pytest.raises(UsageError, match=message):
        open_dataset(str(tmp_path / "a.tar"), TRAIN)


def test_broken_and_missing_shards_are_named(tmp_path):
    path = write_shard(tmp_path / "a.tar", [{"jpg": jpeg(0, size=64), "cls": b"0"}] * 20)
    whole = path.read_bytes()
    for cut in (len(whole) // 2 + 100, len(whole) // 2 + 700, 512 * 50):
        path.write_bytes(whole[:cut])
        with pytest.raises(UsageError, match=r"a\.tar is (cut short|not a readable tar file)"):
            open_dataset(str(path), TRAIN)
    path.write_bytes(b"no tar file at all" * 100)
    with pytest.raises(UsageError, match="not a readable tar file"):
        open_dataset(str(path), TRAIN)
    with pytest.raises(UsageError, match=r"b-0.tar does not exist \(2 of 2 missing\)"):
        open_dataset(str(tmp_path / "b-{0..1}.tar"), TRAIN)


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        open_dataset(str(tmp_path / "nowhere"), TRAIN)
    with pytest.raises(UsageError, match="holds no class folders"):
        open_dataset(str(tmp_path), TRAIN)
    (tmp_path / "ant").mkdir()
    with pytest.raises(UsageError, match="holds no images in its 1 class folders"):
        open_dataset(str(tmp_path), TRAIN)
    with pytest.raises(UsageError, match="class 'ant' is not one of the 1 classes known from training"):
        open_dataset(str(tmp_path), TRAIN, class_names=["cat"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        open_dataset(str(tmp_path / "file"), TRAIN)
    with pytest.raises(UsageError, match=r"torch/cifar10 cannot be opened under .*; give its folder with --data-root"):
        open_dataset("torch/cifar10", TRAIN, data_root=str(tmp_path))
    with pytest.raises(UsageError, match="name the folder itself"):
        open_dataset("torch/image_folder", TRAIN, data_root=str(tmp_path))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_does_not_decode_is_named(tmp_path, workers):
    root = write_folder(tmp_path, {"ant": 1})
    (root / "ant" / "bad.jpg").write_bytes(jpeg(0)[:100])
    dataset = open_dataset(str(root), TRAIN)
    dataset.transform = PREPROCESSING.evaluation_transform()
    with pytest.raises(UsageError) as caught:
        list(DataLoader(dataset, num_workers=workers))
    assert str(caught.value).startswith(str(root / "ant" / "bad.jpg"))
    assert "\n" not in str(caught.value)


def test_an_image_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    dataset = open_dataset(str(write_folder(tmp_path, {"ant": 1})), TRAIN)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UsageError, match=r"ant/0\.jpg cannot be read: Permission denied"):
        dataset[0]


def test_a_shard_that_goes_away_is_named(tmp_path):
    path = write_shard(tmp_path / "a.tar", [{"jpg": jpeg(0), "cls": b"0"}])
    dataset = open_dataset(str(path), TRAIN)
    path.unlink()
    with pytest.raises(UsageError, match=r"a\.tar, sample 0000 cannot be read: No such file"):
        dataset.read(0)
