"""Every caller runs a network once for each batch and variant, and loads each image once."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dgnet._cost import cost_model
from dgnet.analysis._analyze import gather_statistics
from dgnet.analysis._explorer_page import collect
from dgnet.analysis._sweep import sweep_thresholds
from dgnet.data import IGNORED, EvaluationLoader
from dgnet.detection import CocoDetection, evaluate_detector
from dgnet.errors import UsageError
from dgnet.evaluation import Batch, Variant, evaluate, find_image_size, observe_batch, run_pass
from dgnet.graph import find_stages, use_connectivity
from dgnet.models.cifar_resnet import CifarResNet
from dgnet.training import TrainConfig
from dgnet.training._module import Classifier
from tests.helpers.boxes import box_entry, image_entry, write_set
from tests.helpers.data import Counted, Images, Pictures
from tests.helpers.networks import close_some


class Kept:
    """A meter that keeps the batches."""

    def __init__(self, needs_connectivity: bool = False) -> None:
        self.needs_connectivity = needs_connectivity
        self.batches: list[Batch] = []

    def update(self, batch: Batch) -> None:
        self.batches.append(batch)


@pytest.fixture
def calls():
    """Counts the forwards of networks that it is shown; copies of them do not count."""

    def count(network: nn.Module) -> SimpleNamespace:
        counted = SimpleNamespace(forwards=0)

        def note(module: nn.Module, *_: object) -> None:
            counted.forwards += module is network

        network.register_forward_hook(note)
        return counted

    return count


LABELS = [0, 1, 2, 3, 4, 0, 1]


def data() -> Counted:
    return Counted(torch.randn(7, 3, 12, 10), LABELS)


def test_evaluate_runs_a_network_once_for_each_batch(tiny, calls):
    network, dataset = tiny(), data()
    counted = calls(network)
    evaluate(network, dataset, batch_size=3)
    assert counted.forwards == 3
    assert dataset.loaded == list(range(7))
    evaluate(network, dataset, batch_size=3, adjacency_controls=True)
    assert counted.forwards == 3 + 3 * 3
    assert sorted(dataset.loaded[7:]) == sorted([*range(7), *range(7)])


def test_analyze_runs_a_network_once_for_each_batch(tiny, calls):
    network, dataset = tiny(), data()
    counted = calls(network)
    gather_statistics(network, dataset, batch_size=3)
    assert counted.forwards == 3
    assert dataset.loaded == list(range(7))


def test_the_sweep_runs_a_network_once_for_each_batch_and_offset(tiny, calls):
    network, dataset = tiny(node_gate="hard"), data()
    counted = calls(network)
    sweep_thresholds(network, dataset, [-0.5, 0.0, 0.5], batch_size=3)
    assert counted.forwards == 3 * 3  # what is timed is a copy
    assert dataset.loaded == list(range(7))


def test_the_explorer_runs_a_network_once_for_each_batch_and_offset(tiny, calls, monkeypatch):
    network, read = tiny(node_gate="hard"), []
    load = Pictures.load
    monkeypatch.setattr(Pictures, "load", lambda self, index: (read.append(index), load(self, index))[1])
    counted = calls(network)
    collect(network, Pictures([0, 1, 2, 3, 4]), batch_size=2, offsets=[-0.5, 0.0])
    assert counted.forwards == 3 * 2
    assert read == list(range(5))


def test_detection_runs_a_detector_once_for_each_batch(calls, tmp_path):
    class Detector(nn.Module):
        def forward(self, images):
            return [
                {"boxes": torch.tensor([[0.0, 0, 9, 9]]), "scores": torch.ones(1), "labels": torch.ones(1, dtype=torch.long)}
                for _ in images
            ]

    detector = Detector()
    counted = calls(detector)
    dataset = CocoDetection(*write_set(tmp_path, [image_entry(i) for i in range(5)], [box_entry(1, 0, [0, 0, 9, 9])]))
    found = evaluate_detector(detector, dataset, batch_size=2)
    assert counted.forwards == 3
    assert [result["image_id"] for result in found.results] == list(range(5))


@torch.no_grad()
def test_validation_runs_a_network_once_for_each_batch_and_leaves_out_what_fills_up(tiny, calls):
    network = tiny()
    images = torch.randn(6, 3, 12, 10)
    close_some(network, images)
    module = Classifier(network, TrainConfig(), {}).eval()
    counted = calls(network)
    module.validation_step((images[:4], torch.tensor([0, 1, 2, IGNORED])), 0)
    module.validation_step((images[4:], torch.tensor([3, IGNORED])), 1)
    assert counted.forwards == 2
    found = {name: float(value) for name, value in module.val_metrics.compute().items()}
    result = evaluate(network, Images(images[[0, 1, 2, 4]], [0, 1, 2, 3]))
    assert 100 * found["val_top1"] == pytest.approx(result.top1)
    assert found["val_loss"] == pytest.approx(result.loss, rel=1e-5)
    edges = [int(stage.topology.mask.sum()) for stage in find_stages(network)]
    closed = [found[f"val_stage{number}_closed_edges"] for number in (1, 2, 3)]
    share = sum(count * part for count, part in zip(edges, closed, strict=True)) / sum(edges)
    assert share == pytest.approx(result.closed_edges, abs=1e-6)
    assert share > 0


def test_connectivity_is_recorded_if_a_meter_needs_it(tiny):
    network, images = tiny().eval(), torch.randn(2, 3, 12, 10)
    for needs in (False, True):
        meter, other = Kept(needs), Kept()
        observe_batch(network, images, None, [meter, other])
        assert (other.batches[0].record is not None) == needs
        assert len(other.batches[0].adjacency) == 3 * needs
    static = Kept(needs_connectivity=True)
    observe_batch(CifarResNet((1, 1, 1)).eval(), images, None, [static])
    assert static.batches[0].record is None
    assert static.batches[0].adjacency == []


@torch.no_grad()
def test_variants_run_in_their_context_after_the_plain_run(tiny):
    network = tiny()
    images = torch.randn(5, 3, 12, 10)
    ones = [stage.topology.mask.float() for stage in network.stages]
    order = []

    @contextmanager
    def imposed():
        order.append(len(plain.batches))
        with use_connectivity(network, ones):
            yield

    plain, other = Kept(), Kept(needs_connectivity=True)
    network.train()
    loader = EvaluationLoader(Images(images, LABELS[:5]), 2)
    run_pass(network, loader, [plain], variants=[Variant([other], imposed)])
    assert not network.training
    assert order == [1, 2, 3]
    for meter in (plain, other):
        assert [index for batch in meter.batches for index in batch.indices] == list(range(5))
        assert torch.cat([batch.targets for batch in meter.batches]).tolist() == LABELS[:5]
    torch.testing.assert_close(torch.cat([batch.outputs for batch in plain.batches]), network(images))
    with use_connectivity(network, ones):
        torch.testing.assert_close(torch.cat([batch.outputs for batch in other.batches]), network(images))
    assert all(torch.equal(batch.adjacency[0][0], ones[0]) for batch in other.batches)


def test_progress_is_on_stderr(tiny, capfd):
    run_pass(tiny(), EvaluationLoader(data(), 3), [Kept()], desc="a pass")
    out, err = capfd.readouterr()
    assert out == ""
    assert "a pass: 100%" in err


def test_the_size_of_the_images_is_read_from_the_first_batch(tiny):
    dataset = data()
    loader = EvaluationLoader(dataset, 3)
    assert find_image_size(loader) == (12, 10)
    assert dataset.loaded == [0, 1, 2]
    assert cost_model(tiny(), (12, 10)).dense == evaluate(tiny(), dataset).dense_multiply_adds
    with pytest.raises(UsageError, match="holds no images"):
        evaluate(tiny(), Images(torch.randn(0, 3, 8, 8), []))
