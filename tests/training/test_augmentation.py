"""Augmentation of images one by one, and mixing of the images of a batch."""

from __future__ import annotations

import random

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from timm.data.distributed_sampler import RepeatAugSampler

from dgnet.data import IGNORED, Augmentation, ImageDataset, Preprocessing, TrainingItems
from dgnet.errors import UsageError
from dgnet.training import TrainConfig
from dgnet.training._cached import CachedLoader
from dgnet.training._loading import TrainingOrder
from dgnet.training._mixing import Mixing

PREPROCESSING = Preprocessing((24, 24), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
KINDS = {
    "RandAugment, erasing": {"auto_augment": "rand-m9-n3-mstd0.5-inc1", "reprob": 0.9, "recount": 2},
    "AutoAugment": {"auto_augment": "original", "train_interpolation": "random", "augment": "rrc"},
    "AugMix": {"auto_augment": "augmix-m5-w2-d2"},
    "3-Augment, jitter": {"auto_augment": "3a", "color_jitter": 0.3},
    "jitter, scale, ratio": {"color_jitter": 0.4, "scale": [0.5, 0.6], "ratio": [0.9, 1.1], "augment": "rrc"},
}


class Noise(ImageDataset):
    """Ten images of noise; the label is the index."""

    def __init__(self, transform: object = None) -> None:
        self.class_names = [str(label) for label in range(10)]
        pixels = np.random.default_rng(0).integers(256, size=(10, 30, 30, 3), dtype=np.uint8)
        self.images = [Image.fromarray(image) for image in pixels]
        self.transform = transform or PREPROCESSING.evaluation_transform()

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index], index


def items(augment: str = "pad-crop", **options: object) -> TrainingItems:
    config = TrainConfig(augment=augment, **options)
    return TrainingItems(Noise(PREPROCESSING.training_transform(augment, 0.5, config.augmentation)), (3, 24, 24), seed=3)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_is_a_function_of_epoch_image_and_copy(kind):
    drawn = items(**KINDS[kind])
    keys = [(epoch, index, copy) for epoch in range(2) for index in range(3) for copy in range(2)]
    first = {key: drawn[key][0] for key in keys}
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    for key in reversed(keys):
        assert torch.equal(items(**KINDS[kind])[key][0], first[key])
    assert len({tuple(image.flatten().tolist()) for image in first.values()}) == len(keys)
    assert not torch.equal(drawn[0, 1, 0][0], drawn[0, 1][0])


def test_a_random_resized_crop_is_the_one_of_timm():
    own = Augmentation((0.3, 0.4), (0.8, 0.9), "bilinear", "rand-m7", 0.0, 1.0, "const", 2)
    transform = PREPROCESSING.training_transform("rrc", 0.5, own)
    theirs = timm.data.create_transform(
        (3, 24, 24),
        is_training=True,
        scale=(0.3, 0.4),
        ratio=(0.8, 0.9),
        interpolation="bilinear",
        auto_augment="rand-m7",
        re_prob=1.0,
        re_mode="const",
        re_count=2,
        mean=PREPROCESSING.mean,
        std=PREPROCESSING.std,
    )
    for seed in range(5):
        found = []
        for one in (transform, theirs):
            random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
            found.append(one(Noise().images[seed]))
        assert torch.equal(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_grey_images_are_augmented_too(kind):
    config = TrainConfig(**{"augment": "pad-crop", **KINDS[kind]})
    transform = Preprocessing((24, 24), (0.5,), (0.2,)).training_transform(config.augment, 0.5, config.augmentation)
    for index in range(10):
        assert transform(Noise().images[index]).shape == (1, 24, 24)


def test_erasing_sets_pixels_to_the_mean():
    erased = items("pad-crop", reprob=1.0, remode="const", hflip=0.0)
    plain = items("pad-crop", hflip=0.0)
    shares = []
    for index in range(10):
        one, other = erased[0, index][0], plain[0, index][0]
        is_changed = (one != other).any(0)
        assert (one[:, is_changed] == 0).all()
        shares.append(is_changed.float().mean().item())
    assert 0.02 < sum(shares) / 10 < 0.4


@pytest.mark.parametrize(
    ("options", "augment", "is_cached", "message"),
    [
        ({"scale": [0.5, 1]}, "pad-crop", False, "--scale needs --augment rrc, and this run uses pad-crop"),
        ({"reprob": 0.1}, "none", False, "--reprob has no effect with --augment none"),
        ({"auto_augment": "v0"}, "pad-crop", True, "--auto-augment needs the images one by one, and --cache true"),
        ({"color_jitter": 0.4}, "pad-crop", True, "--color-jitter needs the images one by one, and --cache true"),
    ],
)
def test_augmentation_that_the_crop_or_the_cache_cannot_give_is_refused(options, augment, is_cached, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(**options).check_use(augment, is_cached)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": [1, 0.5]}, "--scale must be two increasing numbers"),
        ({"ratio": [1.0]}, "--ratio must be two increasing numbers"),
        ({"train_interpolation": "cubic"}, "unknown --train-interpolation 'cubic'"),
        ({"auto_augment": "random"}, "--auto-augment 'random' is no policy of timm"),
        ({"auto_augment": "v0", "color_jitter": 0.4}, "timm leaves out colour jitter with --auto-augment v0"),
        ({"mixup_mode": "pair"}, "--mixup-mode needs --mixup or --cutmix"),
        ({"reprob": 1.5}, "--reprob must be 0 to 1, got 1.5"),
        ({"aug_repeats": 2, "data": "pipe:cat x.tar", "epoch_images": 9}, "--aug-repeats needs images .* is a stream"),
    ],
)
def test_bad_options_of_augmentation_are_one_line(options, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(**options)


def mixed(seed: int = 0, epoch: int = 0, labels: list[int] | None = None, **options: object) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(4, 3, 8, 8, generator=generator)
    mixing = Mixing(TrainConfig(**options), classes=5)
    return images.clone(), *mixing(images, torch.tensor(labels or [0, 1, 2, 3]), epoch, seed)


def test_mixup_is_the_weighted_mean_of_an_image_and_its_partner():
    before, images, targets, labels = mixed(mixup=1.0, label_smoothing=0.1)
    share = (targets[0, 0].item() - 0.02) / 0.9
    assert 0 < share < 1
    torch.testing.assert_close(images, share * before + (1 - share) * before.flip(0))
    smoothed = torch.full((4, 5), 0.02) + 0.9 * torch.eye(5)[:4]
    torch.testing.assert_close(targets, share * smoothed + (1 - share) * smoothed.flip(0))
    assert labels.tolist() == ([0, 1, 2, 3] if share > 0.5 else [3, 2, 1, 0])


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_cutmix_pastes_a_rectangle_and_counts_its_area(mode):
    before, images, targets, _ = mixed(seed=2, cutmix=1.0, mixup_mode=mode)
    for index in range(4):
        is_own = (images[index] == before[index]).all(0)
        assert torch.equal(images[index], torch.where(is_own, before[index], before[3 - index]))
        torch.testing.assert_close(targets[index, index], is_own.float().mean())


def test_mixing_is_a_function_of_the_seed_and_ends_when_asked():
    options = {"mixup": 0.8, "cutmix": 1.0, "mixup_off_epoch": 3}
    first = mixed(seed=1, epoch=2, **options)
    assert all(torch.equal(a, b) for a, b in zip(first, mixed(seed=1, epoch=2, **options), strict=True))
    assert not torch.equal(first[1], mixed(seed=2, epoch=2, **options)[1])
    before, images, targets, labels = mixed(seed=1, epoch=3, **options)
    assert torch.equal(images, before)
    assert torch.equal(targets, torch.eye(5)[:4])
    assert labels.tolist() == [0, 1, 2, 3]


def test_neither_a_bad_image_nor_the_one_it_is_mixed_into_counts():
    assert mixed(labels=[IGNORED, 1, 2, 3], mixup=1.0)[3].tolist().count(IGNORED) == 2
    assert mixed(labels=[IGNORED, 1, 2, 3], mixup=1.0, mixup_off_epoch=1, epoch=1)[3].tolist() == [IGNORED, 1, 2, 3]


@pytest.mark.parametrize(("repeats", "ranks", "accumulate"), [(3, 1, 1), (3, 2, 1), (2, 2, 2), (4, 2, 3)])
def test_repeated_augmentation_gives_the_images_of_timms_sampler(repeats, ranks, accumulate, monkeypatch):
    images, batch = 50, 12
    orders = [TrainingOrder(images, batch, 0, rank, ranks, accumulate, repeats) for rank in range(ranks)]
    permutation = torch.randperm(images)
    monkeypatch.setattr(torch, "randperm", lambda *arguments, **options: permutation)
    for rank, order in enumerate(orders):
        own = [item for batches in order for item in batches]
        theirs = list(RepeatAugSampler(range(images), ranks, rank, num_repeats=repeats))
        assert [index for _, index, _ in own] == theirs[: len(own)]
        assert len(own) == images // batch * batch // ranks
    keys = [item for order in orders for batches in order for item in batches]
    assert len(set(keys)) == len(keys)  # no copy twice
    assert {copy for _, _, copy in keys} == set(range(repeats))
    whole = list(orders[0])
    orders[0].start = 2
    assert list(orders[0]) == whole[2 * accumulate :]


def test_cached_copies_of_an_image_are_cropped_differently():
    order = TrainingOrder(10, 10, seed=0, repeats=5)
    loader = CachedLoader(Noise(), PREPROCESSING, batch_size=10, order=order, augment="pad-crop", hflip=0.5)
    (first,), (second,) = list(loader), list(loader)
    assert torch.equal(first[0], second[0])
    assert sorted(first[1].tolist()) == sorted([*[first[1][0].item()] * 5, *[first[1][5].item()] * 5])
    assert len({tuple(image.flatten().tolist()) for image in first[0]}) == 10
