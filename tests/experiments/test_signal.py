"""What weights depend on, and how clear the gradients of routing are: the third table of `dgnet experiment similarity`."""

from __future__ import annotations

import pytest
import scipy.stats
import torch

import dgnet
from dgnet.experiments._signal import _Gradients, _share_between, compare_signal, measure_signal, measure_spread

TINY = {"channels": [4, 4, 4]}


def signal_to_noise(gradients: torch.Tensor) -> float | None:
    """The ratio that sums give, of gradients (K, n)."""
    sums = _Gradients()
    for gradient in gradients:
        sums.add(gradient)
    return sums.signal_to_noise()


def twin(gradients: torch.Tensor) -> float:
    """The same from all gradients at once."""
    noise = gradients.var(0).sum()
    signal = gradients.mean(0).square().sum() - noise / len(gradients)
    return float((signal.clamp(min=0) / (noise * 8 / 64)).sqrt())


def test_the_share_between_classes_is_that_of_an_analysis_of_variance():
    torch.manual_seed(0)
    labels = torch.arange(5).repeat(6)
    values = torch.randn(30, 1, dtype=torch.float64) + 0.7 * labels[:, None]
    f = scipy.stats.f_oneway(*(values[labels == one, 0].numpy() for one in range(5))).statistic
    assert _share_between(values, labels) == pytest.approx((f - 1) / (f - 1 + 6))


def test_weights_that_the_class_decides_and_weights_that_it_does_not():
    torch.manual_seed(0)
    labels = torch.arange(50).repeat(8)
    assert _share_between(torch.randn(50, 3)[labels].double(), labels) == pytest.approx(1)
    assert _share_between(torch.randn(400, 30).double(), labels) < 0.02
    assert _share_between(torch.ones(400, 3).double(), labels) is None
    assert _share_between(torch.randn(400, 3).double(), torch.arange(400)) is None
    assert _share_between(torch.randn(400, 3).double(), torch.zeros(400, dtype=torch.long)) is None


def test_signal_and_noise_are_those_of_the_distribution():
    torch.manual_seed(0)
    mean, deviation = torch.tensor([3.0, 4.0, 0.0]), 2.0
    gradients = mean + deviation * torch.randn(20_000, 3)
    noise_of_64 = (3 * deviation**2 * 8 / 64) ** 0.5
    assert signal_to_noise(gradients) == pytest.approx(5 / noise_of_64, rel=0.02)
    assert signal_to_noise(gradients[:7].double()) == pytest.approx(twin(gradients[:7].double()))
    few = torch.stack([torch.tensor(signal_to_noise(gradients[start : start + 4]) ** 2) for start in range(0, 20_000, 4)])
    assert few.mean().sqrt() > 0.9 * 5 / noise_of_64  # four mini-batches are not taken for four times the signal
    assert signal_to_noise(torch.randn(20_000, 3)) < 0.1
    assert signal_to_noise(torch.zeros(4, 0)) is None


def test_the_gradients_are_those_of_routing_and_of_convolutions():
    torch.manual_seed(0)
    network = dgnet.create_model("dg_resnet20", **TINY).eval()
    images, labels = torch.randn(16, 3, 8, 8), torch.arange(16) % 10
    found = measure_signal(network, images, labels)
    stage = network.stages[1]
    gradients = []
    for part in (slice(0, 8), slice(8, 16)):  # by hand
        network.zero_grad()
        stage.weighting.train()
        torch.nn.functional.cross_entropy(network(images[part]), labels[part]).backward()
        gradients.append(torch.cat([one.grad.flatten() for one in stage.weighting.parameters()]))
    assert found[1][0] == pytest.approx(twin(torch.stack(gradients)), rel=1e-4)
    assert all(convolutions is not None for _, convolutions in found)
    assert measure_signal(network, images[:15], labels[:15]) == [(None, None)] * 3
    fixed = dgnet.create_model("dg_resnet20", weighting="fixed", **TINY).eval()
    assert [routing for routing, _ in measure_signal(fixed, images, labels)] == [None] * 3


def test_rows_have_a_dash_where_there_is_nothing_to_tell():
    torch.manual_seed(0)
    start, trained = (dgnet.create_model("dg_resnet20", weighting=name, **TINY).eval() for name in ("fixed", "routed"))
    images, labels = torch.randn(16, 3, 8, 8), torch.arange(16) % 4
    row = compare_signal("run", start, trained, images, labels)[0]
    assert row[:3] == ["run", "1", "0.000"]
    assert measure_spread(trained, images, labels)[0][0] > 0
    assert row[5] == "–"
    assert measure_spread(start, images, labels) == [(0.0, None)] * 3
