from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from dgnet.cli.command import print_json
from dgnet.errors import UsageError
from dgnet.evaluation import evaluate
from dgnet.graph import FixedWeighting, record_connectivity, use_connectivity
from dgnet.models.cifar_resnet import CifarResNet
from tests.helpers.data import Images
from tests.helpers.networks import close_some


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [3, 7])
def test_figures_equal_a_count_image_by_image(tiny, batch_size):
    network = tiny()
    images = torch.randn(7, 3, 12, 10)
    images[6] = images[5]  # two images with one wiring
    close_some(network, images)
    labels = [0, 1, 2, 3, 4, 0, 1]
    result = evaluate(network, Images(images, labels), batch_size=batch_size)

    edges = closed = nodes = dead = empty = hits = hits5 = 0
    loss = 0.0
    wirings = set()
    for image, label in zip(images, labels, strict=True):
        with record_connectivity(network) as record:
            logits = network(image[None])[0]
        hits += int(logits.argmax()) == label
        hits5 += label in logits.topk(5).indices.tolist()
        loss -= float(logits.log_softmax(0)[label])
        wiring = []
        for matrix, stage in zip(record.adjacency, network.stages, strict=True):
            last = stage.topology.num_nodes - 1
            for j in range(1, last + 1):
                weights = [float(matrix[0, j, i]) for i in stage.topology.senders(j)]
                edges += len(weights)
                closed += weights.count(0.0)
                nodes += j != last
                dead += j != last and not any(weights)
                empty += j == last and not any(weights)
                wiring += [weight != 0 for weight in weights]
        wirings.add(tuple(wiring))

    assert result.images == 7
    assert result.top1 == pytest.approx(100 * hits / 7)
    assert result.top5 == pytest.approx(100 * hits5 / 7)
    assert result.loss == pytest.approx(loss / 7, rel=1e-4)
    assert result.closed_edges == pytest.approx(closed / edges)
    assert result.skippable_nodes == pytest.approx(dead / nodes)
    assert result.distinct_wirings == len(wirings)
    assert result.empty_outputs == empty
    assert 0 < closed < edges  # not a trivial case
    assert 0 < dead < nodes
    assert 1 < len(wirings) < 7


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_adjacency_controls_give_every_image_the_mean_and_anothers_weights(tiny, batch_size):
    network = tiny()
    images = torch.randn(7, 3, 12, 10)
    close_some(network, images)
    labels = [0, 1, 2, 3, 4, 0, 1]
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0)).tolist()
    shown, logits = [], {}
    for index in order:
        with record_connectivity(network) as record:
            logits[index] = network(images[index : index + 1])
        shown.append(record.adjacency)
    mean = [torch.cat([adjacency[stage] for adjacency in shown]).mean(0) for stage in range(3)]
    hits = {"mean": 0, "other": 0}
    for place, index in enumerate(order):
        before = shown[place - 1] if place else shown[batch_size - 1]  # before the first: the last of its batch
        for name, adjacency in (("mean", mean), ("other", before)):
            with use_connectivity(network, adjacency):
                hits[name] += int(network(images[index : index + 1]).argmax()) == labels[index]
    result = evaluate(network, Images(images, labels), batch_size=batch_size, adjacency_controls=True)
    assert result.top1_mean_adjacency == pytest.approx(100 * hits["mean"] / 7)
    assert result.top1_other_adjacency == pytest.approx(100 * hits["other"] / 7)
    assert result.top1 == pytest.approx(100 * sum(int(logits[i].argmax()) == labels[i] for i in range(7)) / 7)

    weights = [torch.cat([adjacency[stage] for adjacency in shown]).double() for stage in range(3)]
    masks = [stage.topology.mask for stage in network.stages]
    spreads = torch.cat([w.std(0, correction=0)[mask] for w, mask in zip(weights, masks, strict=True)])
    assert result.weight_std == pytest.approx(float(spreads.mean()), abs=1e-6)
    assert result.weight_std > 0.01  # not a trivial case


def test_classes_of_one_name_keep_a_cost_each(tiny):
    dataset = Images(torch.randn(6, 3, 12, 10), [0, 1, 2, 0, 1, 2])
    dataset.class_names = ["crane", "fox", "crane"]
    assert list(evaluate(tiny(), dataset).executed_by_class) == ["crane (0)", "fox", "crane (2)"]


def test_controls_need_dynamic_stages():
    with pytest.raises(UsageError, match="has no dynamic stages"):
        evaluate(CifarResNet((1, 1, 1)), Images(torch.randn(2, 3, 8, 8), [0, 1]), adjacency_controls=True)


@torch.no_grad()
def test_outputs_without_an_open_in_edge_are_counted(tiny):
    class Closed(FixedWeighting):
        def find_open(self, node, alpha, offset):
            return torch.ones_like(alpha, dtype=torch.bool) & (node != self.topology.num_nodes - 1)

    result = evaluate(tiny(weighting=Closed), Images(torch.randn(4, 3, 8, 8), [0, 1, 2, 3]))
    assert result.empty_outputs == 3 * 4
    assert result.skippable_nodes == 0
    assert result.distinct_wirings == 1


def test_a_static_network_has_one_wiring():
    result = evaluate(CifarResNet((1, 1, 1), num_classes=5), Images(torch.randn(4, 3, 8, 8), [0, 1, 2, 3]))
    assert (result.closed_edges, result.skippable_nodes, result.distinct_wirings, result.empty_outputs) == (0, 0, 1, 0)


def test_accuracy_is_an_exact_share():
    class Always(nn.Module):
        def forward(self, images):
            return torch.nn.functional.one_hot(torch.zeros(len(images), dtype=torch.long), 10).float()

    result = evaluate(Always(), Images(torch.randn(7, 3, 2, 2), [0, 0, 1, 1, 1, 1, 1], classes=10))
    assert result.top1 == 100 * 2 / 7


def test_counts_that_make_no_sense():
    images = Images(torch.randn(1, 3, 8, 8), [0])
    with pytest.raises(UsageError, match="--batch-size must be at least 1, got 0"):
        evaluate(nn.Identity(), images, batch_size=0)
    with pytest.raises(UsageError, match="--workers must be 0 to 1024, got -1"):
        evaluate(nn.Identity(), images, workers=-1)


def test_json_has_no_nan(capsys):
    print_json({"loss": float("nan"), "top1": 1.5})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "top1": 1.5}
