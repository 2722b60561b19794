"""Each meter equals a slow, obvious count."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from dgnet._cost import cost_model
from dgnet.data import IGNORED
from dgnet.evaluation import Accuracy, Batch, ExecutedCost, ImageByImage, WiringStatistics, flatten_edges, observe_batch
from dgnet.evaluation._accuracy import accuracy_figures
from dgnet.evaluation._controls import OtherAdjacency
from dgnet.evaluation._means import Means, build_means
from dgnet.graph import record_connectivity
from dgnet.models.cifar_resnet import CifarResNet
from tests.helpers.networks import close_some

LABELS = torch.tensor([0, 1, IGNORED, 3, 4, 0, 1])


@pytest.fixture
def network(tiny):
    built = tiny(node_gate="hard", node_gate_bias=0.3)
    close_some(built, torch.randn(7, 3, 12, 10))
    return built


@pytest.fixture
def images():
    return torch.randn(7, 3, 12, 10)


@torch.no_grad()
def observe(network, images, *meters):
    """In batches of 3."""
    for start in range(0, len(images), 3):
        indices = range(start, min(start + 3, len(images)))
        observe_batch(network, images[start : start + 3], LABELS[start : start + 3], meters, indices=indices)


@torch.no_grad()
def run_one(network, image):
    with record_connectivity(network) as record:
        return network(image[None])[0], record


def test_accuracy_counts_images_with_a_label(network, images):
    meter = Accuracy()
    observe(network, images, meter)
    hits = hits5 = 0
    losses = []
    for image, label in zip(images, LABELS.tolist(), strict=True):
        if label == IGNORED:
            continue
        logits, _ = run_one(network, image)
        hits += int(logits.argmax()) == label
        hits5 += label in logits.topk(5).indices.tolist()
        losses.append(-float(logits.log_softmax(0)[label]))
    found = meter.summary()
    assert (found["top1"], found["top5"], found["images"]) == (100 * hits / 6, 100 * hits5 / 6, 7)
    assert found["loss"] == pytest.approx(sum(losses) / 6, rel=1e-5)


def test_accuracy_of_no_labels_is_no_number():
    meter = Accuracy()
    meter.update(Batch(None, torch.tensor([IGNORED]), torch.zeros(1, 3)))
    found = meter.summary()
    assert found["images"] == 1
    assert all(math.isnan(found[name]) for name in ("top1", "top5", "loss"))


def test_an_image_without_a_label_does_not_count_whatever_its_figures_are():
    logits, labels = torch.randn(4, 6), torch.tensor([0, IGNORED, 2, IGNORED])
    logits[1] = math.inf
    means = build_means("", ("loss", "top1", "top5"))
    meter = Means(means, lambda batch: (accuracy_figures(batch.outputs, batch.targets), batch.targets != IGNORED), False)
    exact = Accuracy()
    for each in (meter, exact):
        each.update(Batch(None, labels, logits))
    found = exact.summary()
    assert {name: float(value) for name, value in means.compute().items()} == pytest.approx(
        {"loss": found["loss"], "top1": found["top1"] / 100, "top5": found["top5"] / 100}
    )
    assert math.isfinite(found["loss"])


def test_executed_cost_is_that_of_each_image(network, images):
    costs = cost_model(network, (12, 10))
    meter = ExecutedCost(costs, ["a", "b", "c", "d", "e"])
    observe(network, images, meter)
    executed = []
    for image in images:
        _, record = run_one(network, image)
        executed.append(float(costs.executed(record.ran, [matrix != 0 for matrix in record.adjacency])))
    found = meter.summary()
    ordered = sorted(executed)
    mean = sum(executed) / 7
    assert found["executed_multiply_adds"] == pytest.approx(mean)
    assert found["executed_std"] == pytest.approx(math.sqrt(sum((value - mean) ** 2 for value in executed) / 7))
    assert found["executed_percentiles"]["50"] == ordered[3]
    assert found["executed_percentiles"]["25"] == pytest.approx((ordered[1] + ordered[2]) / 2)
    assert found["executed_by_class"] == pytest.approx(
        {"a": (executed[0] + executed[5]) / 2, "b": (executed[1] + executed[6]) / 2, "d": executed[3], "e": executed[4]}
    )
    assert len(set(executed)) > 1  # not a trivial case


def test_a_static_network_executes_the_dense_cost(images):
    network = CifarResNet((1, 1, 1), num_classes=5).eval()
    costs = cost_model(network, (12, 10))
    cost, wiring = ExecutedCost(costs, []), WiringStatistics([])
    observe(network, images, cost, wiring)
    found = cost.summary()
    assert (found["executed_multiply_adds"], found["executed_std"]) == (costs.dense, 0)
    assert wiring.summary()["distinct_wirings"] == 1


def test_wiring_statistics_equal_all_matrices_in_memory(network, images):
    meter, bounded = WiringStatistics(network.stages), WiringStatistics(network.stages, most_wirings=2)
    observe(network, images, meter, bounded)
    records = [run_one(network, image)[1].adjacency for image in images]
    for stage, own in enumerate(network.stages):
        matrices = torch.cat([adjacency[stage] for adjacency in records]).double()
        near = {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(meter.mean()[stage], matrices.mean(0), **near)
        torch.testing.assert_close(meter.std()[stage], matrices.std(0, correction=0), **near)
        torch.testing.assert_close(meter.open_share()[stage], (matrices != 0).double().mean(0), check_dtype=False)
        assert own.topology.mask.shape == matrices.shape[1:]
    wirings = {tuple(bool(value) for matrix in adjacency for value in matrix.flatten()) for adjacency in records}
    assert meter.summary()["distinct_wirings"] == len(wirings) > 2
    assert len(bounded.wirings) == 2


def test_figures_of_single_images_equal_a_run_of_each(network, images):
    costs = cost_model(network, (12, 10))
    meter = ImageByImage(costs)
    observe(network, images, meter)
    found = meter.summary()
    assert found.indices.tolist() == list(range(7))
    assert torch.equal(found.labels, LABELS)
    for index, image in enumerate(images):
        logits, record = run_one(network, image)
        assert int(found.predictions[index]) == int(logits.argmax())
        assert float(found.confidences[index]) == pytest.approx(float(logits.softmax(0).max()), rel=1e-5)
        if LABELS[index] == IGNORED:
            assert found.losses[index].isnan()
        else:
            assert float(found.losses[index]) == pytest.approx(-float(logits.log_softmax(0)[LABELS[index]]), rel=1e-4)
        assert float(found.executed[index]) == float(costs.executed_in(record))
        torch.testing.assert_close(found.weights[index], flatten_edges(record.adjacency, record.topology)[0])


@torch.no_grad()
def test_another_images_weights_are_those_of_the_image_before(network, images):
    other = OtherAdjacency(network)
    records = [run_one(network, image)[1].adjacency for image in images]
    for start in (0, 3, 6):
        observe_batch(network, images[start : start + 3], None, [other])
        for place, index in enumerate(range(start, min(start + 3, 7))):
            before = 2 if index == 0 else index - 1  # before the first image: the last of its batch
            for stage in range(3):
                torch.testing.assert_close(other.shifted[stage][place], records[before][stage][0])
        with other.impose(), record_connectivity(network) as record:
            network(images[start : start + 3])
        torch.testing.assert_close(record.adjacency[0], other.shifted[0])


def test_means_leave_out_what_does_not_count():
    means = build_means("val_", ("figure",))
    meter = Means(means, lambda batch: ({"figure": batch.outputs}, batch.targets), needs_connectivity=False)
    meter.update(Batch(None, torch.tensor([True, False]), torch.tensor([2.0, math.inf])))
    meter.update(SimpleNamespace(targets=torch.tensor([True, True]), outputs=torch.tensor([3.0, 7.0])))
    assert float(means.compute()["val_figure"]) == 4
