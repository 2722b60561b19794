"""`dgnet experiment report` and `similarity`."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import scipy.stats
import torch

import dgnet
from dgnet.experiments import collect, difference, read_grid, save_figures
from dgnet.experiments._edges import compare_edges, find_gradients
from dgnet.experiments._figures import draw_accuracy, read_curves
from dgnet.experiments._similarity import similarity
from tests.helpers.command import refuse

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["cifar10", "cifar10_choices"])
def test_the_rows_of_the_shipped_grids_are_found(name):
    grid = read_grid(ROOT / "experiments" / f"{name}.yaml")
    arms = collect(grid)
    assert len(arms) >= 10
    assert read_curves(grid, arms)


def test_an_arm_far_below_the_others_does_not_squeeze_the_picture(folder):
    grid = read_grid(folder / "grid.yaml")
    arms = {name: {3: {"top1": str(top1)}} for name, top1 in (("static", 80.0), ("dynamic", 81.0), ("raw", 30.0))}
    (axes,) = draw_accuracy(grid, arms).axes
    assert axes.get_xlim()[0] > 75
    assert [text.get_text() for text in axes.texts] == ["← 30.00"]
    assert len(axes.lines) == 2 * 2


def test_figures_are_drawn_in_the_formats_asked_for(folder):
    grid = read_grid(folder / "grid.yaml")
    arms = {"static": {3: {"top1": "80", "digest": "a"}, 4: {"top1": "81", "digest": "b"}}}
    grid.table.parent.mkdir()
    (pdf,) = save_figures(grid, arms, ["pdf"])
    first = pdf.read_bytes()
    assert first.startswith(b"%PDF")
    save_figures(grid, arms, ["pdf"])
    assert pdf.read_bytes() == first  # no date in it
    assert [path.suffix for path in save_figures(grid, arms)] == [".png", ".svg"]


def test_the_interval_is_that_of_a_paired_t_test():
    first = {seed: {"top1": str(value)} for seed, value in enumerate([80.0, 81.0, 79.5, 80.2])}
    second = {seed: {"top1": str(value)} for seed, value in enumerate([80.9, 81.2, 80.6, 80.1, 99.0])}
    pairs, mean, half = difference(first, second)
    ours = [80.9, 81.2, 80.6, 80.1]
    expected = scipy.stats.ttest_rel(ours, [80.0, 81.0, 79.5, 80.2]).confidence_interval(0.95)
    assert pairs == 4
    assert (mean - half, mean + half) == pytest.approx(tuple(expected))


def test_nodes_that_read_the_same_are_alike_and_others_less():
    mask = torch.zeros(5, 5, dtype=torch.bool)
    for sender, receiver in [(0, 1), (1, 2), (1, 3), (2, 4), (3, 4)]:
        mask[receiver, sender] = True
    torch.manual_seed(0)
    network = dgnet.create_model("dg_resnet20", channels=[4, 4, 4], topology=mask, weighting="fixed").eval()
    first, *others = similarity(network, torch.randn(3, 3, 8, 8))
    assert others == [pytest.approx((1, 1))] * 2  # the third reads what the second does; the first reads a larger map
    assert 0 < first[1] < first[0] < 0.999
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_what_is_no_run_has_no_similarity(tmp_path, capsys):
    assert "nothing does not exist" in refuse(capsys, "experiment", "similarity", tmp_path / "nothing")
    assert "--images must be at least 2, got 1" in refuse(capsys, "experiment", "similarity", tmp_path, "--images", 1)


def test_edges_that_open_and_close_are_counted():
    torch.manual_seed(0)
    start = dgnet.create_model("dg_resnet20", channels=[4, 4, 4]).eval()
    trained = copy.deepcopy(start)
    with torch.no_grad():
        trained.stages[0].weighting.tau[4] = 2.0  # all four in-edges of the output node close
        for router in start.stages[1].weighting.routers.values():
            router.bias.fill_(-5.0)
        start.stages[1].weighting.tau.fill_(0.5)  # all edges closed
    images, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2])
    rows = compare_edges("run", start, trained, images, labels)
    assert [row[2:6] for row in rows] == [
        ["100.0", "60.0", "0.0", "40.0"],
        ["0.0", "100.0", "100.0", "0.0"],
        ["100.0", "100.0", "0.0", "0.0"],
    ]
    assert all(float(cell) > 0 for row in rows for cell in row[6:])


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ("weighting.routers.1.weight", "weighting.routers.1.bias")),
        ({"weighting": "signed"}, ("weighting.routers.1.weight", "weighting.routers.1.bias", "weighting.static")),
        ({"weighting": "learned"}, ("weighting.alpha",)),
    ],
    ids=["routed", "signed", "learned"],
)
def test_the_gradient_of_an_edge_is_that_of_its_own_parameters(options, names):
    torch.manual_seed(0)
    network = dgnet.create_model("dg_resnet20", channels=[4, 4, 4], **options).eval()
    images, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2])
    found = find_gradients(network, images, labels)[0]
    stage = network.stages[0]
    # By hand, for the edge from node 1 to node 3: its row of the router of node 1, or its entry among the static weights.
    stage.weighting.train()
    torch.nn.functional.cross_entropy(network(images), labels).backward()
    total = 0.0
    for name in names:
        gradient = stage.get_parameter(name).grad
        if "routers" in name:
            total += float(gradient[stage.topology.receivers(1).index(3)].square().sum())
        else:
            total += float(stage.weighting.order.row(gradient, 3)[stage.topology.senders(3).index(1)] ** 2)
    assert float(found[3, 1]) == pytest.approx(total**0.5, rel=1e-4)
    assert find_gradients(dgnet.create_model("dg_resnet20", weighting="fixed"), torch.randn(2, 3, 8, 8), labels[:2])[0] is None
