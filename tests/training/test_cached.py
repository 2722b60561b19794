from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dgnet.data import ImageDataset, Preprocessing
from dgnet.errors import UsageError
from dgnet.training._cached import CachedLoader
from dgnet.training._loading import TrainingOrder

PREPROCESSING = Preprocessing((16, 24), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


class Noise(ImageDataset):
    """Images whose pixels are all different; the label is the index."""

    def __init__(self, height: int = 16, width: int = 24) -> None:
        self.class_names = [str(label) for label in range(11)]
        pixels = torch.randint(256, (11, height, width, 3), dtype=torch.uint8)
        self.images = [Image.fromarray(image.numpy()) for image in pixels]
        self.transform = PREPROCESSING.evaluation_transform()

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index], index


@pytest.mark.parametrize("size", [(16, 24), (40, 31)], ids=["as they are", "resized"])
def test_evaluation_batches_are_those_of_the_slow_loader(size):
    dataset = Noise(*size)
    fast = list(CachedLoader(dataset, PREPROCESSING, batch_size=4))
    slow = list(DataLoader(dataset, batch_size=4))
    assert len(fast) == len(slow) == len(CachedLoader(dataset, PREPROCESSING, batch_size=4)) == 3
    for (images, labels), (expected, expected_labels) in zip(fast, slow, strict=True):
        torch.testing.assert_close(images, expected, rtol=1e-6, atol=1e-6)
        assert labels.tolist() == expected_labels.tolist()


def test_training_batches_are_full_and_in_a_new_order_each_epoch():
    order = TrainingOrder(11, batch_size=4, seed=0)
    loader = CachedLoader(Noise(), PREPROCESSING, batch_size=4, order=order)
    assert len(loader) == 2
    epochs = []
    for order.epoch in range(3):
        epochs.append([label for _, labels in loader for label in labels.tolist()])
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize(("augment", "padding"), [("pad-crop", "constant"), ("reflect-crop", "reflect")])
def test_every_crop_is_one_of_the_padded_image_and_all_places_come(augment, padding):
    dataset = Noise()
    order = TrainingOrder(11, batch_size=11, seed=0)
    loader = CachedLoader(dataset, PREPROCESSING, batch_size=11, order=order, augment=augment, hflip=0.5)
    mean, std = (torch.tensor(values)[:, None, None] for values in (PREPROCESSING.mean, PREPROCESSING.std))
    seen = set()
    for order.epoch in range(200):
        for images, labels in loader:
            pixels = ((images * std + mean) * 255).round().to(torch.uint8)
            for image, label in zip(pixels, labels.tolist(), strict=True):
                source = (dataset[label][0] * std + mean).mul(255).round().to(torch.uint8)
                padded = torch.nn.functional.pad(source.float(), (3, 3, 2, 2), padding).to(torch.uint8)
                places = [
                    (top, left, flip)
                    for top in range(5)
                    for left in range(7)
                    for flip in (False, True)
                    if torch.equal(padded[:, top : top + 16, left : left + 24].flip(2 if flip else ()), image)
                ]
                assert len(places) == 1
                seen.add(places[0])
        if len(seen) == 5 * 7 * 2:
            break
    assert len(seen) == 5 * 7 * 2


def test_what_is_drawn_is_a_function_of_seed_epoch_and_image():
    def epoch(number: int, start: int = 0, seed: int = 0) -> list[torch.Tensor]:
        order = TrainingOrder(11, batch_size=2, seed=seed)
        order.epoch, order.start = number, start
        loader = CachedLoader(dataset, PREPROCESSING, batch_size=2, order=order, augment="pad-crop", hflip=0.5)
        return [images for images, _ in loader]

    dataset = Noise()
    whole = epoch(3)
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], epoch(3, start=2), strict=True))
    assert not torch.equal(whole[0], epoch(4)[0])
    assert not torch.equal(whole[0], epoch(3, seed=1)[0])


def test_no_flip_where_none_is_asked_for():
    dataset = Noise()
    loader = CachedLoader(dataset, PREPROCESSING, batch_size=11, order=TrainingOrder(11, batch_size=11, seed=0))
    for images, labels in loader:
        for image, label in zip(images, labels.tolist(), strict=True):
            torch.testing.assert_close(image, dataset[label][0], rtol=1e-6, atol=1e-6)


def test_an_image_that_does_not_decode_is_named():
    class Broken(Noise):
        def read(self, index: int) -> tuple[object, int]:
            return (b"no image" if index == 3 else self.images[index]), index

        def name(self, index: int) -> str:
            return f"image {index}"

    with pytest.raises(UsageError, match="image 3 does not decode as an image"):
        CachedLoader(Broken(), PREPROCESSING, batch_size=4)
