from __future__ import annotations

import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import dgnet
from dgnet.errors import UsageError
from dgnet.graph import record_connectivity
from dgnet.inference import _compile, compile_network, measure_speed, set_mode, set_threshold_offset, time_alternating


def test_steps_take_turns_and_each_round_is_a_figure():
    calls: list[str] = []

    def step(name: str) -> None:
        calls.append(name)
        time.sleep(0.15)  # longer than a round must be: one call a round

    seconds = time_alternating({name: partial(step, name) for name in "ab"}, rounds=3)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert all(value > 0 for values in seconds.values() for value in values)
    assert "".join(calls) == "aabb" + "ba" + "ab" + "ba"  # to warm up, then the rounds


def test_a_short_step_repeats_until_its_round_is_long_enough(monkeypatch):
    calls: list[str] = []
    now = [0.0]

    def step() -> None:
        calls.append("step")
        now[0] += 0.01

    monkeypatch.setattr("dgnet.inference._timing.time", SimpleNamespace(perf_counter=lambda: now[0]))
    seconds = time_alternating({"a": step}, rounds=2, round_seconds=0.05, after_round=lambda: calls.append("round"))
    turns = "".join(call[0] for call in calls[2:]).split("r")
    assert [len(turn) for turn in turns] == [pytest.approx(5, abs=1)] * 2 + [0]
    assert seconds["a"] == pytest.approx([0.01] * 2)  # of one call


def test_all_modes_are_measured_and_the_network_stays_as_it_is(tiny):
    network = set_mode(tiny(node_gate="hard", node_gate_bias=0.3).eval(), "sparse")
    images = torch.randn(4, 3, 12, 10)
    with torch.no_grad():
        before = network(images)
    speeds = measure_speed(network, images, dgnet.create_model("resnet20").eval(), rounds=1)
    assert list(speeds) == ["static", "dense", "sparse"]
    assert min(speeds.values()) > 0
    with torch.no_grad():
        torch.testing.assert_close(network(images), before)
    assert list(measure_speed(dgnet.create_model("resnet20").eval(), images, rounds=1)) == ["dense"]


@torch.no_grad()
def test_compiled_the_sparse_mode_takes_any_batch(tiny):
    network = tiny(node_gate="hard", node_gate_bias=0.3).eval()
    images = torch.randn(7, 3, 12, 10)
    expected = network(images)
    compiled = compile_network(network, "sparse")
    for part in (slice(7), slice(1), slice(2, 5), slice(0)):
        torch.testing.assert_close(compiled(images[part]), expected[part], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_offset_closes_more_or_fewer_blocks_and_edges(tiny):
    images = torch.randn(6, 3, 12, 10)
    network = tiny(node_gate="hard", node_gate_bias=0.0).eval()
    ran = []
    for offset in (-0.5, 0.0, 0.5):
        with record_connectivity(set_threshold_offset(network, offset)) as record:
            network(images)
        ran.append(sum(int(matrix.sum()) for matrix in record.ran))
    assert ran[0] > ran[1] > ran[2]
    routed = tiny().eval()
    closed = []
    for offset in (-1.0, 0.5):
        with record_connectivity(set_threshold_offset(routed, offset)) as record:
            routed(images)
        closed.append(sum(int((matrix == 0).sum()) for matrix in record.adjacency))
    assert closed[0] < closed[1]
    with pytest.raises(UsageError, match="has no edge or block that can close"):
        set_threshold_offset(tiny(weighting="learned"), 0.1)


@pytest.mark.slow
def test_any_number_of_networks_of_one_class_can_be_compiled():
    """Without `allow_many_graphs` the compiler refuses the ninth."""
    torch._dynamo.reset()
    for size in range(1, 11):
        network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval()
        images = torch.randn(size, 3, 2, 2)
        torch.testing.assert_close(compile_network(network)(images), network(images), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.slow
@torch.no_grad()
def test_compiled_networks_have_constant_weights():
    """The compiler folds normalisations into the convolutions before them, which it can do with constants only."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    network = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()).eval()
    images = torch.randn(2, 3, 8, 8)
    output, (code,) = run_and_get_code(compile_network(network), images)
    torch.testing.assert_close(output, network(images))
    assert "batch_norm" not in code
    torch._dynamo.reset()


def test_auto_takes_the_mode_that_is_faster_on_the_images(tiny, monkeypatch, capsys):
    network, images = tiny(node_gate="hard"), torch.randn(4, 3, 12, 12)
    built = []
    monkeypatch.setattr(_compile, "compile_for", lambda network, mode, size: built.append((mode, size)) or (lambda _: mode))
    for dense, sparse, chosen in [(2.0, 1.0, "sparse"), (1.0, 1.25, "dense")]:
        seconds = {"dense": [dense] * 3, "sparse": [sparse] * 3}
        monkeypatch.setattr(_compile, "time_alternating", lambda steps, device, seconds=seconds: seconds)
        assert compile_network(network, "auto", images)(images) == chosen
        printed = capsys.readouterr().err
        assert f"mode {chosen}: on batches of 4 the sparse mode is {dense / sparse:.2f} times as fast" in printed
    assert built == [("dense", 4), ("sparse", 4)] * 2
    monkeypatch.delattr(_compile, "time_alternating")  # nothing to choose from: nothing is timed
    assert compile_network(tiny(weighting="fixed"), "auto", images)(images) == "dense"
    assert "mode dense: the network has no block that can be skipped" in capsys.readouterr().err
    with pytest.raises(UsageError, match="unknown mode 'fast'; allowed: dense, sparse, auto"):
        compile_network(network, "fast")
    with pytest.raises(UsageError, match="images are for mode 'auto'"):
        compile_network(network, "dense", images)
    for missing in (None, images[0], images[:0]):
        with pytest.raises(UsageError, match="mode 'auto' times the network: give a batch of images"):
            compile_network(network, "auto", missing)
