"""Statistics of one pass equal those of everything held in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dgnet._cost import cost_model
from dgnet.analysis import _statistics as module
from dgnet.analysis._analyze import gather_statistics
from dgnet.analysis._statistics import Extremes, ImageResult, list_edges
from dgnet.data import IGNORED
from dgnet.evaluation import flatten_edges
from dgnet.graph import RandomGraphOptions, build_topology, record_connectivity
from tests.helpers.data import Images
from tests.helpers.networks import close_some

COUNT = 23
LABELS = [index * 7 % 4 for index in range(COUNT)]  # class 4 has no image


def build_result(index: int) -> ImageResult:
    return ImageResult(index, None, 0, 1.0, None, 0.0, [])


@pytest.fixture
def images() -> Tensor:
    return torch.randn(COUNT, 3, 12, 10)


@torch.no_grad()
def run_all(network, images):
    """Everything in memory: logits, each stage's (images, N, N), which nodes ran; a forward an image."""
    with record_connectivity(network) as record:
        logits = torch.cat([network(image[None]) for image in images]).double()
    return logits, [matrix.double() for matrix in record.adjacency], record.ran


@pytest.mark.parametrize("batch_size", [1, 5, 23, 40])
def test_one_pass_equals_all_matrices_in_memory(tiny, images, batch_size):
    network = tiny()
    close_some(network, images)
    logits, adjacency, ran = run_all(network, images)
    found = gather_statistics(network, Images(images, LABELS), 4, [22, 3], batch_size)
    masks = [stage.topology.mask for stage in network.stages]
    weights = torch.cat([matrix[:, mask] for matrix, mask in zip(adjacency, masks, strict=True)], dim=1)
    near = {"rtol": 1e-4, "atol": 1e-6}

    assert found.images == found.labelled == COUNT
    torch.testing.assert_close(found.mean(), weights.mean(0), **near)
    torch.testing.assert_close(found.std(), weights.std(0, correction=0), **near)
    torch.testing.assert_close(found.open_share(), (weights != 0).double().mean(0), check_dtype=False)
    assert 0 < (weights == 0).double().mean() < 1  # not a trivial case

    labels = torch.tensor(LABELS)
    assert found.classes == [0, 1, 2, 3]
    means = torch.stack([weights[labels == label].mean(0) for label in range(4)])
    torch.testing.assert_close(found.class_mean(), means, **near)
    for first in range(4):
        for second in range(4):
            distance = (means[first] - means[second]).square().mean().sqrt()
            assert float(found.class_distance()[first, second]) == pytest.approx(float(distance), abs=1e-5)

    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    executed = cost_model(network, (12, 10)).executed(ran, [matrix != 0 for matrix in adjacency])
    assert found.top1 == pytest.approx(100 * float((logits.argmax(1) == labels).double().mean()))
    assert found.loss == pytest.approx(float(losses.mean()), rel=1e-4)
    assert found.executed_mean == pytest.approx(float(executed.mean()))
    assert found.executed_std == pytest.approx(float(executed.std(correction=0)), rel=1e-6)
    assert (found.executed_least, found.executed_most) == (float(executed.min()), float(executed.max()))

    for extremes, values, largest in (
        (found.easiest, losses, False),
        (found.hardest, losses, True),
        (found.cheapest, executed, False),
        (found.dearest, executed, True),
    ):
        order = sorted(range(COUNT), key=lambda i, v=values, sign=-1 if largest else 1: (sign * float(v[i]), i))
        assert [image.index for image in extremes.images] == order[:4]
    assert list(found.chosen) == [22, 3]
    for index, image in found.chosen.items():
        assert image.index == index
        assert image.label == LABELS[index]
        assert image.prediction == int(logits[index].argmax())
        assert image.confidence == pytest.approx(float(logits[index].softmax(0).max()), rel=1e-4)
        assert image.loss == pytest.approx(float(losses[index]), rel=1e-3)
        assert image.executed == float(executed[index])
        torch.testing.assert_close([m.double() for m in image.adjacency], [m[index] for m in adjacency], **near)

    sample = found.sample  # of so few images, all
    assert sample.indices.tolist() == list(range(COUNT))
    torch.testing.assert_close(sample.weights.double(), weights, **near)
    torch.testing.assert_close(sample.losses, losses, **near)
    torch.testing.assert_close(sample.executed, executed)
    assert sample.labels.tolist() == LABELS


def test_a_sample_is_drawn_by_seed_and_holds_its_images(tiny, images, monkeypatch):
    monkeypatch.setattr("dgnet.analysis._analyze.SAMPLED", 6)
    network = tiny().eval()
    weights = flatten_edges(run_all(network, images)[1], [stage.topology for stage in network.stages])
    drawn = []
    for seed in (0, 0, 1):
        sample = gather_statistics(network, Images(images, LABELS), batch_size=5, seed=seed).sample
        torch.testing.assert_close(sample.weights.double(), weights[sample.indices], rtol=1e-4, atol=1e-6)
        assert sample.labels.tolist() == [LABELS[index] for index in sample.indices]
        drawn.append(sample.indices.tolist())
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(indices == sorted(set(indices)) and len(indices) == 6 for indices in drawn)


def test_memory_does_not_grow_with_the_data_set(tiny, images, monkeypatch):
    """The numbers that are kept are as many after thrice the images."""
    monkeypatch.setattr("dgnet.analysis._analyze.SAMPLED", 6)
    monkeypatch.setattr(module, "MOST_WIRINGS", 2)
    network = tiny()
    close_some(network, images)

    def size(value: object) -> int:
        if isinstance(value, Tensor):
            return value.numel()
        if isinstance(value, dict):
            return sum(map(size, value.values())) + len(value)
        if isinstance(value, list | tuple):
            return sum(map(size, value))
        return size(vars(value)) if hasattr(value, "__dict__") else 1

    sizes = []
    for times in (1, 3):
        found = gather_statistics(network, Images(images.repeat(times, 1, 1, 1), LABELS * times), 2, [0], 5)
        kept = vars(found) | {"topologies": None}  # as large as the network
        sizes.append(size(kept))
        assert len(found.wiring.wirings) == 2
        assert found.wiring.wirings.total() < found.images
    assert sizes[0] == sizes[1]


def test_images_without_labels_count_where_none_is_needed(tiny, images):
    network = tiny()
    close_some(network, images)
    labels = [label if index % 2 else IGNORED for index, label in enumerate(LABELS)]
    whole = gather_statistics(network, Images(images, LABELS), 3)
    half = gather_statistics(network, Images(images, labels), 3, [0], batch_size=4)
    none = gather_statistics(network, Images(images, [IGNORED] * COUNT), 3)
    for found in (half, none):
        torch.testing.assert_close(found.mean(), whole.mean())
        assert [image.index for image in found.cheapest.images] == [image.index for image in whole.cheapest.images]
    odd = gather_statistics(network, Images(images[1::2], LABELS[1::2]), 3)
    assert (half.labelled, half.top1) == (11, odd.top1)
    assert half.loss == pytest.approx(odd.loss, rel=1e-5)
    torch.testing.assert_close(half.class_mean(), odd.class_mean(), rtol=1e-4, atol=1e-6)
    assert [image.index for image in half.easiest.images] == [2 * image.index + 1 for image in odd.easiest.images]
    assert half.chosen[0].label is half.chosen[0].loss is None
    assert (none.top1, none.loss, none.classes, none.easiest.images) == (None, None, [], [])


def test_weights_that_are_all_the_same_have_no_spread(tiny, images):
    network = tiny(weighting="learned", learned_start=0.3)
    found = gather_statistics(network, Images(images, LABELS), batch_size=4)
    assert not found.std().any()
    torch.testing.assert_close(found.mean(), torch.full_like(found.mean(), 0.3), rtol=1e-6, atol=0)


def test_extremes_take_the_first_of_equals_and_never_what_is_not_a_number():
    nan = float("nan")
    batches = ([2.0, 1.0, nan], [1.0, nan, 0.0], [1.0, 5.0])
    smallest, largest = Extremes(3), Extremes(3, largest=True)
    start = 0
    for batch in batches:
        for extremes in (smallest, largest):
            extremes.update(torch.tensor(batch), lambda place, start=start: build_result(start + place))
        start += len(batch)
    assert [image.index for image in smallest.images] == [5, 1, 3]
    assert [image.index for image in largest.images] == [7, 0, 1]


def test_edges_are_listed_in_the_order_of_their_weights():
    topologies = [build_topology("complete", 4), build_topology("er", 6, RandomGraphOptions(er_p=0.9))]
    edges = list_edges(topologies)
    matrices = [torch.zeros(len(topology.mask), len(topology.mask)) for topology in topologies]
    for place, edge in enumerate(edges):
        matrices[edge.stage - 1][edge.receiver, edge.sender] = place
        assert edge.is_free == (edge.receiver not in topologies[edge.stage - 1].pinned)
    assert flatten_edges(matrices, topologies).tolist() == list(range(len(edges)))
    assert not all(edge.is_free for edge in edges)


def test_the_data_set_is_read_once(tiny, images, monkeypatch):
    read = []
    dataset = Images(images, LABELS)
    take = dataset.__class__.__getitem__
    monkeypatch.setattr(dataset.__class__, "__getitem__", lambda self, index: (read.append(index), take(self, index))[1])
    gather_statistics(tiny(), dataset, 2, [5], batch_size=7)
    assert read == list(range(COUNT))
    assert isinstance(DataLoader(dataset).dataset, Images)
