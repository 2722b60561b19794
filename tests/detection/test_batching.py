from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dgnet.data import EvaluationOrder
from dgnet.detection import AspectRatioOrder, CocoDetection, DetectionItems, collate, flip
from dgnet.training._loading import TrainingLoader
from tests.helpers.boxes import box_entry, image_entry, random_set, write_set

RATIOS = np.random.default_rng(0).choice([0.5, 0.75, 1.0, 1.5], 101, p=[0.1, 0.15, 0.25, 0.5]).tolist()


def epoch_of(number: int, rank: int = 0, ranks: int = 1, accumulate: int = 1, seed: int = 0, start: int = 0) -> list[list[int]]:
    """The batches of an epoch, in order."""
    order = AspectRatioOrder(RATIOS, 12, seed, rank, ranks, accumulate)
    order.epoch, order.start = number, start
    batches = list(order)
    assert {epoch for batch in batches for epoch, _ in batch} == {number}
    return [[index for _, index in batch] for batch in batches]


def is_mixed(batch: list[int]) -> bool:
    return len({RATIOS[index] >= 1 for index in batch}) == 2


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_are_of_one_kind_and_no_image_comes_twice(ranks, accumulate):
    mixed, kinds = 0, set()
    for number in range(20):
        parts = [epoch_of(number, rank, ranks, accumulate) for rank in range(ranks)]
        assert {len(part) for part in parts} == {8 * accumulate}  # always: a run goes on by step
        images = [index for part in parts for batch in part for index in batch]
        assert len(set(images)) == len(images) == 96
        bad = [batch for part in parts for batch in part if is_mixed(batch)]
        assert len(bad) <= 1
        mixed += len(bad)
        kinds |= {RATIOS[batch[0]] >= 1 for part in parts for batch in part}
    assert kinds == {True, False}
    assert mixed or ranks * accumulate > 1


def test_both_kinds_come_in_every_part_of_an_epoch():
    firsts = [[RATIOS[batch[0]] >= 1 for batch in epoch_of(number)] for number in range(40)]
    shares = np.mean(firsts, axis=0)
    assert ((shares > 0.4) & (shares < 1)).all()


def test_each_image_is_left_out_as_often():
    taken = np.zeros(101)
    for number in range(400):
        taken[np.concatenate(epoch_of(number))] += 1
    assert abs(taken / 400 - 96 / 101).max() < 0.06  # five standard deviations


def test_few_images_of_a_kind_are_trained_on():
    order = AspectRatioOrder([1.5] * 20 + [0.5], 4, seed=0)
    taken = 0
    for order.epoch in range(40):
        taken += any(index == 20 for batch in order for _, index in batch)
    assert taken > 30


@pytest.mark.parametrize(("ranks", "accumulate"), [(2, 1), (1, 3), (2, 2)])
def test_a_step_is_the_same_images_however_it_is_divided(ranks, accumulate):
    parts = [torch.tensor(epoch_of(3, rank, ranks, accumulate)).view(8, -1) for rank in range(ranks)]
    assert torch.equal(torch.cat(parts, dim=1).sort().values, torch.tensor(epoch_of(3)).sort().values)


def test_epochs_differ_and_a_seed_repeats_them():
    assert epoch_of(2) == epoch_of(2)
    assert epoch_of(2) != epoch_of(1)
    assert epoch_of(2) != epoch_of(2, seed=1)
    assert epoch_of(2, start=5) == epoch_of(2)[5:]


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_goes_on_in_the_middle_of_an_epoch_with_the_same_images_and_flips(tmp_path, workers):
    dataset = CocoDetection(*random_set(tmp_path), is_training=True)

    def batches(step: int, seed: int = 4) -> list[tuple[list[torch.Tensor], list[dict]]]:
        order = AspectRatioOrder(dataset.aspect_ratios, 3, seed)
        items = DetectionItems(dataset, hflip=0.5, seed=seed)
        loader = DataLoader(items, batch_sampler=order, num_workers=workers, collate_fn=collate)
        return list(TrainingLoader(loader, order, lambda: step))

    steps = len(dataset) // 3
    whole, rest = batches(steps), batches(steps + 2)  # the second epoch
    assert len(whole) == steps
    assert len(rest) == steps - 2 > 0
    for (images, targets), (again, targets_again) in zip(whole[2:], rest, strict=True):
        assert isinstance(images, list)
        for image, target, other, other_target in zip(images, targets, again, targets_again, strict=True):
            assert torch.equal(image, other)
            assert torch.equal(target["boxes"], other_target["boxes"])


def test_a_flip_is_a_function_of_seed_epoch_and_index(tmp_path):
    dataset = CocoDetection(*write_set(tmp_path, [image_entry(i) for i in range(8)], [box_entry(1, 0, [1, 2, 30, 40])]))
    plain = [dataset[index][0] for index in range(8)]

    def flips(epoch: int, seed: int = 0, hflip: float = 0.5) -> list[bool]:
        items = DetectionItems(dataset, hflip, seed)
        images = [items[epoch, index][0] for index in reversed(range(8))][::-1]  # in whatever order they are loaded
        assert all(torch.equal(a, b) or torch.equal(a, b.flip(2)) for a, b in zip(images, plain, strict=True))
        return [not torch.equal(a, b) for a, b in zip(images, plain, strict=True)]

    assert flips(0) == flips(0)
    assert flips(0) != flips(1)
    assert flips(0) != flips(0, seed=1)
    assert 150 < sum(sum(flips(epoch)) for epoch in range(50)) < 250
    assert flips(0, hflip=0.0) == [False] * 8
    assert flips(0, hflip=1.0) == [True] * 8
    assert torch.equal(DetectionItems(dataset, 1.0)[0, 0][1]["boxes"], flip(*dataset[0])[1]["boxes"])


def test_what_evens_processes_out_is_the_first_image_without_an_id(tmp_path):
    dataset = CocoDetection(*write_set(tmp_path, [image_entry(i) for i in range(3)], []))
    loaders = [
        DataLoader(DetectionItems(dataset), batch_sampler=EvaluationOrder(3, 2, rank, 2), collate_fn=collate)
        for rank in range(2)
    ]
    ids = [[target["image_id"] for _, targets in loader for target in targets] for loader in loaders]
    assert ids == [[0, 2], [1, None]]
