from __future__ import annotations

import random
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from dgnet.data import IGNORED, EvaluationOrder, ImageDataset, Preprocessing, mix_seed
from dgnet.training import TrainConfig
from dgnet.training._data_module import ImageDataModule
from dgnet.training._loading import TrainingOrder

PREPROCESSING = Preprocessing((4, 4), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Numbers(ImageDataset):
    """Image i has the label i; its transform draws from both generators."""

    def __init__(self, count: int) -> None:
        self.class_names = [str(label) for label in range(count)]
        self.transform = lambda image: torch.rand(3, 4, 4) + random.random()

    def __len__(self) -> int:
        return len(self.class_names)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (4, 4)), index

    def name(self, index: int) -> str:
        return f"image {index}"


def loaders(images: int, rank: int = 0, ranks: int = 1, step: int = 0, **options: Any) -> tuple[Any, Any]:
    """The training and the evaluation loader of one process, as a run makes them."""
    config = TrainConfig(**{"batch_size": 6, **options})
    data = ImageDataModule(Numbers(images), Numbers(images), config, PREPROCESSING, folder=None)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=ranks, global_step=step)
    return data.train_dataloader(), data.val_dataloader()


def labels(loader: Any) -> list[int]:
    return [label for _, batch in loader for label in batch.tolist()]


WITH_WORKERS = [pytest.param(*case, marks=() if case == (3, 1) else pytest.mark.slow) for case in product([1, 2, 3], [1, 2])]


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 0), (3, 0), *WITH_WORKERS])
def test_each_image_is_evaluated_once_and_trained_on_at_most_once(ranks, workers):
    images = 23
    trained, evaluated, lengths = [], [], set()
    for rank in range(ranks):
        training, evaluation = loaders(images, rank, ranks, workers=workers)
        trained += labels(training)
        evaluated += labels(evaluation)
        lengths.add((len(training), len(evaluation), len(list(evaluation))))
    assert len(lengths) == 1  # processes that wait for each other take equally many steps
    assert sorted(label for label in evaluated if label != IGNORED) == list(range(images))
    assert evaluated.count(IGNORED) == -images % ranks
    assert len(set(trained)) == len(trained) == 18  # 5 are left out, fewer than a step


@pytest.mark.parametrize("accumulate", [1, 3])
def test_epochs_differ_in_order_and_remainder_and_a_seed_repeats_them(accumulate):
    def epoch(number: int, seed: int = 0) -> list[int]:
        order = TrainingOrder(23, 6, seed, accumulate=accumulate)
        order.epoch = number
        batches = list(order)
        assert len(batches) == len(order) == 3 * accumulate
        assert {e for batch in batches for e, _ in batch} == {number}
        return [index for batch in batches for _, index in batch]

    epochs = [epoch(number) for number in range(4)]
    assert len({tuple(order) for order in epochs}) == 4
    assert len({tuple(sorted(order)) for order in epochs}) == 4
    assert epoch(2) == epochs[2]
    assert epoch(2, seed=1) != epochs[2]


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_step_is_the_same_images_however_it_is_divided(ranks):
    whole = TrainingOrder(23, 6, seed=0).indices()
    parts = [TrainingOrder(23, 6, 0, rank, ranks, accumulate=2).indices() for rank in range(ranks)]
    divided = torch.cat([part.view(3, -1) for part in parts], dim=1)
    assert torch.equal(divided.sort().values, whole.sort().values)


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_goes_on_in_the_middle_of_an_epoch_with_the_same_images(workers):
    def batches(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        training, _ = loaders(23, step=step, workers=workers, accumulate=2)
        return list(training)

    whole = batches(step=3)  # the second epoch
    rest = batches(step=4)
    assert len(rest) == 4
    for (images, numbers), (again, numbers_again) in zip(whole[2:], rest, strict=True):
        assert torch.equal(images, again)
        assert torch.equal(numbers, numbers_again)


def test_what_is_drawn_for_an_image_is_a_function_of_seed_epoch_and_index():
    def drawn(step: int, workers: int, **options: Any) -> dict[int, torch.Tensor]:
        training, _ = loaders(23, step=step, workers=workers, batch_size=23, **options)
        (images, numbers), *_ = training
        return dict(zip(numbers.tolist(), images, strict=True))

    first, workers = drawn(1, 0), drawn(1, 2)
    assert all(torch.equal(first[index], workers[index]) for index in first)
    assert not torch.equal(first[5], drawn(2, 0)[5])
    assert not torch.equal(first[5], drawn(1, 0, seed=1)[5])


def test_seeds_of_neighbours_have_nothing_in_common():
    seeds = [mix_seed(*key) for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0), (0, 2**40))]
    assert len(set(seeds)) == len(seeds)
    bits = torch.tensor([[seed >> place & 1 for place in range(64)] for seed in map(mix_seed, range(500))]).float()
    assert bits.mean(0).sub(0.5).abs().max() < 0.1
    assert torch.corrcoef(bits.T).fill_diagonal_(0).abs().max() < 0.25


def test_waiting_is_measured():
    training, _ = loaders(23)
    list(training)
    assert training.waited > 0


def test_an_evaluation_order_of_fewer_images_than_processes():
    orders = [list(EvaluationOrder(2, 4, rank, 3)) for rank in range(3)]
    assert orders == [[[(0, 0)]], [[(0, 1)]], [[(0, -1)]]]
