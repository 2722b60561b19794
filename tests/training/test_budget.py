from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dgnet
from dgnet._cost import cost_model
from dgnet.errors import UsageError
from dgnet.graph import record_connectivity
from dgnet.training._budget import Budget


def count_by_hand(network: nn.Module, ran: list[torch.Tensor], size: tuple[int, int]) -> list[int]:
    """Multiply-adds for each sample with a loop over nodes and edges, for blocks of two 3×3 convolutions."""
    counts = []
    for b in range(len(ran[0])):
        height, width = size
        total = height * width * 9 * 3 * 4 + 8 * 5  # stem and head
        before = 4
        for index, (stage, alive) in enumerate(zip(network.stages, ran, strict=True)):
            channels = (4, 6, 8)[index]
            raw = before * height * width
            if index:
                height, width = height // 2, width // 2
                total += height * width * before * channels
            last = stage.topology.num_nodes - 1
            for j in range(last + 1):
                if not alive[b, j]:
                    continue
                if 0 < j < last:
                    total += height * width * 9 * channels * ((before if j == 1 else channels) + channels)
                if j < last:
                    blocks = last - 1 - j
                    total += channels * (blocks + 1) + channels * blocks * (stage.node_gates is not None)
                senders = sum(bool(alive[b, i]) for i in range(j)) if j != 1 else 1
                total += senders * (raw if j == 1 else channels * height * width) if j else 0
            before = channels
        counts.append(total)
    return counts


@pytest.mark.parametrize("training", [True, False])
def test_what_is_executed_equals_a_count_by_hand(tiny, training):
    network = tiny(node_gate="hard", node_gate_bias=0.3).train(training)
    budget = Budget(network, (12, 8), 0.6)
    with record_connectivity(network) as record, budget.watch():
        network(torch.randn(6, 3, 12, 8))
    costs = cost_model(network, (12, 8))
    expected = torch.tensor(count_by_hand(network, record.ran, (12, 8)))
    assert len(expected.unique()) > 1
    torch.testing.assert_close(costs.executed(record.ran), expected.double())
    torch.testing.assert_close(budget.executed().detach(), (expected / costs.dense).float())
    all_run = [torch.ones_like(ran) for ran in record.ran]
    assert costs.executed(all_run).tolist() == [costs.dense] * 6 == count_by_hand(network, all_run, (12, 8))
    cost = dgnet.cost(network, (12, 8))
    outside_routers = cost.multiply_adds + cost.linear_multiply_adds
    assert costs.dense == outside_routers + cost.router_multiply_adds + cost.aggregation_multiply_adds


@pytest.mark.slow
@pytest.mark.parametrize("per", ["batch", "sample"])
def test_training_ends_at_the_budget(tiny, per):
    network = tiny(node_gate="hard")
    budget = Budget(network, (12, 8), 0.6, per=per, warmup=0.5, strength=30.0)
    images, labels = torch.randn(32, 3, 12, 8), torch.arange(32) % 5
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    # Without a decay, the last step decides what is seen.
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=120)
    for step in range(120):
        with budget.watch():
            logits = network(images)
        loss = F.cross_entropy(logits, labels) + budget.penalty(budget.executed(), step / 120)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    executed = budget.executed().detach()
    assert executed.mean().item() == pytest.approx(0.6, abs=0.06)
    if per == "sample":
        assert (executed - 0.6).abs().mean() < 0.1


def test_evaluation_executes_what_training_did(tiny):
    """With the same statistics and no closed edges: gates decide as in training."""
    network = tiny(node_gate="hard", node_gate_bias=0.3)
    for stage in network.stages:
        nn.init.constant_(stage.weighting.tau, -1.0)
    budget = Budget(network, (12, 8), 0.6)
    images = torch.randn(32, 3, 12, 8)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    with torch.no_grad(), budget.watch():
        in_training = network(images)
    executed = budget.executed()
    assert len(executed.unique()) > 1
    network.eval()
    with torch.no_grad(), budget.watch():
        in_evaluation = network(images)
    torch.testing.assert_close(budget.executed(), executed)
    torch.testing.assert_close(in_evaluation, in_training)


def test_the_target_falls_to_the_budget_over_the_warm_up(tiny):
    budget = Budget(tiny(node_gate="hard"), 12, 0.5, strength=2.0, warmup=0.4)
    executed = torch.tensor([0.7, 0.9])
    assert budget.penalty(executed, 0.0).item() == pytest.approx(2 * 0.2**2)
    assert budget.penalty(executed, 0.2).item() == pytest.approx(2 * 0.05**2, rel=1e-4)
    assert budget.penalty(executed, 1.0).item() == pytest.approx(2 * 0.3**2)
    budget.per = "sample"
    assert budget.penalty(executed, 1.0).item() == pytest.approx(2 * (0.2**2 + 0.4**2) / 2)


def test_a_stage_without_gates_runs_in_training(tiny):
    """Its thresholds close edges in evaluation only."""
    network = tiny(node_gate="hard")
    network.stages[0].node_gates = None
    costs = cost_model(network, 12)
    always = (costs.least + costs.stages[0].dense - costs.stages[0].least) / costs.dense
    assert Budget(network, 12, always + 0.001).share > always
    with pytest.raises(UsageError, match=f"is less than what always runs, {always:.3f}"):
        Budget(network, 12, always - 0.001)


def test_budgets_that_cannot_be(tiny):
    for network, share, message in [
        (tiny(), 0.5, "needs gates on blocks"),
        (dgnet.create_model("resnet20"), 0.5, "needs a network with dynamic stages; CifarResNet has none"),
        (tiny(node_gate="hard"), 0.0, "must be above 0 and at most 1, got 0.0; what always runs costs 0"),
        (tiny(node_gate="hard"), 1.1, "must be above 0 and at most 1"),
        (tiny(node_gate="hard"), 0.01, r"is less than what always runs, 0\.\d+ of the dense cost"),
    ]:
        with pytest.raises(UsageError, match=message):
            Budget(network, 12, share)


@pytest.mark.parametrize("rule", ["penalty", "exact"])
def test_the_exact_rule_ends_at_the_budget_where_the_penalty_ends_above_it(tiny, rule):
    """A task that would rather execute everything: its loss falls by 1 with the share that is executed."""
    budget, steps = Budget(tiny(node_gate="hard"), 12, 0.5, strength=10.0, warmup=0.1, rule=rule), 400
    logit = torch.tensor(3.0, requires_grad=True)
    optimizer = torch.optim.SGD([logit], lr=0.5)
    for step in range(steps):
        executed = logit.sigmoid().expand(4)
        loss = budget.penalty(executed, step / steps) - executed.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        budget.adapt(executed.mean(), step / steps, steps)
    share = float(logit.detach().sigmoid())
    expected = 0.5 + 1 / 20 if rule == "penalty" else 0.5  # where the slope of the penalty is that of the task
    assert share == pytest.approx(expected, abs=2e-3)
    assert float(budget.multiplier) == pytest.approx(0.0 if rule == "penalty" else 1.0, abs=0.05)


def test_the_multiplier_grows_with_steps_not_with_the_batches_that_they_accumulate(tiny):
    multipliers = []
    for accumulate in (1, 4):
        budget = Budget(tiny(node_gate="hard"), 12, 0.5, warmup=0.0, rule="exact")
        for batch in range(100 * accumulate):
            budget.adapt(torch.tensor(0.6), batch / (100 * accumulate), 100 * accumulate)
        multipliers.append(float(budget.multiplier))
    assert multipliers[0] > 0
    assert multipliers[1] == pytest.approx(multipliers[0], rel=1e-4)


def test_a_batch_of_bad_images_only_changes_nothing(tiny):
    budget = Budget(tiny(node_gate="hard"), 12, 0.5, warmup=0.0, rule="exact")
    budget.adapt(torch.tensor(0.6), 0.5, 100)
    before = float(budget.multiplier)
    assert float(budget.penalty(torch.empty(0))) == 0
    budget.adapt(torch.tensor(torch.nan), 0.5, 100)
    assert float(budget.multiplier) == before > 0
