"""§6.5's criteria on weights made so that the answer is known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dgnet._cost import cost_model
from dgnet.analysis._observations import explained_share, judge, rank_correlation
from dgnet.analysis._statistics import Statistics
from dgnet.data import IGNORED
from dgnet.evaluation import Batch

COUNT = 40


def observe(network, mean, std, closes=None, labelled=True):
    """The observations for weights of `mean` ± `std`, functions of stage and order; `closes`: images without the last block."""
    statistics = Statistics(network, 5, cost_model(network, 8), sampled=range(COUNT))
    sign = torch.tensor([1.0, -1.0]).repeat(COUNT // 2)
    adjacency, ran = [], []
    for number, topology in enumerate(statistics.topologies, start=1):
        matrix = torch.zeros(COUNT, topology.num_nodes, topology.num_nodes)
        for receiver in range(topology.num_nodes):
            for sender in topology.senders(receiver):
                order = sender / (topology.num_nodes - 1)
                matrix[:, receiver, sender] = mean(number, order) + sign * std(number, order)
        alive = torch.ones(COUNT, topology.num_nodes, dtype=torch.bool)
        if closes is not None:
            matrix[closes, -1, -2] = 0
            alive[closes, -2] = False
        adjacency.append(matrix)
        ran.append(alive)
    logits = torch.zeros(COUNT, 5)
    logits[:, 0] = torch.arange(COUNT) / 10.0  # the later, the smaller the loss
    record = SimpleNamespace(adjacency=adjacency, ran=ran, topology=statistics.topologies)
    labels = torch.full((COUNT,), 0 if labelled else IGNORED)
    statistics.update(Batch(None, labels, logits, record, range(COUNT)))
    return judge(statistics)


def verdicts(observations):
    return [observation.holds for observation in observations]


def test_all_hold_where_weights_do_as_the_paper_says(tiny):
    easy = torch.arange(COUNT) >= COUNT - 4
    found = observe(tiny(), lambda stage, order: 0.8 - 0.3 * order, lambda stage, order: 0.02 * (stage + order), easy)
    assert verdicts(found) == [True] * 5
    assert [observation.number for observation in found] == [1, 2, 3, 4, 5]
    assert all(": holds. " in str(observation) for observation in found)
    assert found[4].figures["other_wiring"] == pytest.approx(0.1)


def test_none_holds_the_other_way_round(tiny):
    hard = torch.arange(COUNT) < 4
    found = observe(tiny(), lambda stage, order: 0.5 + 0.3 * order, lambda stage, order: 0.02 * (5 - stage - order), hard)
    assert verdicts(found) == [True, False, True, False, False]
    assert "% more (needed" in found[4].because
    assert ": does not hold. " in str(found[1])


def test_depth_alone_is_half_of_the_fourth(tiny):
    within = observe(tiny(), lambda stage, order: 0.5, lambda stage, order: 0.02 * (4 - stage) + 0.005 * order)
    assert within[3].figures["correlation"] > 0.9
    assert within[3].figures["stage_correlation"] < -0.5
    assert within[3].holds is False
    assert within[0].holds is False  # the means are all the same


def test_weights_that_follow_no_image(tiny):
    found = observe(tiny(), lambda stage, order: 0.8 - 0.3 * order, lambda stage, order: 0.0)
    assert verdicts(found) == [True, True, False, False, False]
    assert found[2].because == found[3].because == "No weight depends on the image."


def test_without_labels_nothing_says_what_is_easy(tiny):
    easy = torch.arange(COUNT) >= COUNT // 2
    weights = (lambda stage, order: 0.8 - 0.3 * order, lambda stage, order: 0.02 * (stage + order))
    assert observe(tiny(), *weights, easy, labelled=False)[4].holds is None
    assert observe(tiny(), *weights, None, labelled=False)[4].holds is False  # one wiring


def test_too_few_edges_decide_nothing(tiny):
    network = tiny(layers=(1, 1, 1), topology="chain")  # two edges a stage
    found = observe(network, lambda stage, order: 0.5 + order, lambda stage, order: 0.01)
    assert found[0].holds is not None
    assert explained_share(np.arange(4.0), np.ones((4, 3))) is None


def test_ranks_and_explained_share():
    ties = np.array([1.0, 2.0, 2.0, 5.0])
    assert rank_correlation(ties, np.array([1.0, 2.5, 2.5, 4.0])) == pytest.approx(1)
    assert rank_correlation(ties, -ties) == pytest.approx(-1)
    assert rank_correlation(ties, np.ones(4)) is None
    scipy = pytest.importorskip("scipy.stats")
    first, second = np.random.default_rng(0).integers(0, 5, (2, 30)).astype(float)
    assert rank_correlation(first, second) == pytest.approx(scipy.spearmanr(first, second).statistic)
    positions = np.random.default_rng(1).normal(size=(30, 2))
    assert explained_share(positions @ [1.0, -2.0] + 3, positions) == pytest.approx(1)
    assert explained_share(np.random.default_rng(2).normal(size=30), positions) < 0.2
    assert explained_share(np.ones(30), positions) == 0
