from __future__ import annotations

import json

import pytest
import torch

import dgnet
from dgnet.bench._memory import measure_tensors
from dgnet.cli import main
from tests.helpers.command import ask, refuse

QUICK = ["--batch-size", 4, "--image-size", 16, "--rounds", 2]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["train", "infer"])
def test_a_measurement(capsys, task):
    result = json.loads(ask(capsys, "bench", "dg_resnet20", "--task", task, *QUICK, "--json"))
    assert (result["model"], result["against"], result["task"]) == ("dg_resnet20", "resnet20", task)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert (result["batch_size"], result["image_size"], result["device"], result["dtype"]) == (4, 16, device, "float32")
    assert result["ratio_quartiles"][0] <= result["ratio"] <= result["ratio_quartiles"][1]
    for side in ("model", "against"):
        measured = result[f"{side}_side"]
        assert measured["seconds"] == result[f"{side}_seconds"] > 0
        assert measured["peak_memory"] is None or measured["peak_memory"] > 2**20
        assert measured["images_per_second"] == pytest.approx(4 / measured["seconds"])
    assert {"dgnet", "python", "torch", "torchvision", "timm"} <= result["versions"].keys()
    assert result["hardware"]


@pytest.mark.slow
def test_any_two_networks_and_the_table(capsys):
    options = ["--against", "dg_resnet20", "--task", "infer", "--model-kwargs", "{weighting: fixed}"]
    text = ask(capsys, "bench", "dg_resnet20", *options, *QUICK)
    assert "dg_resnet20 / dg_resnet20: time " in text
    assert "images/s" in text


@pytest.mark.slow
def test_peak_memory_grows_with_the_batch_by_what_the_backward_pass_needs(capsys):
    sides = []
    for batch_size in (8, 40):
        text = ask(capsys, "bench", "resnet20", "--against", "resnet20", "--batch-size", batch_size, "--rounds", 1, "--json")
        sides.append(json.loads(text)["model_side"])
    # resnet20 at 32×32: each convolution's output, and each normalisation's, whose ReLU works in place.
    per_image = 2 * 4 * (7 * 16 * 32**2 + 6 * 32 * 16**2 + 6 * 64 * 8**2)
    assert 0.9 < (sides[1]["peak_tensors"] - sides[0]["peak_tensors"]) / (32 * per_image) < 1.3
    if None in (sides[0]["peak_memory"], sides[1]["peak_memory"]):
        pytest.skip("this system does not tell the peak memory of a process")
    assert 0.8 < (sides[1]["peak_memory"] - sides[0]["peak_memory"]) / (32 * per_image) < 1.6


@pytest.mark.slow
def test_compiled_training_needs_less_memory_with_our_options():
    torch.manual_seed(0)
    network = dgnet.create_model("dg_resnet32", channels=[8, 8, 8]).train()
    stage = network.stages[0]
    x = torch.randn(8, 8, 16, 16)
    peaks = []
    for options in ({}, dgnet.compile_options(network)):
        torch._dynamo.reset()
        run = torch.compile(stage, fullgraph=True, options=options)

        def step(run=run):
            run(x).square().mean().backward()
            stage.zero_grad()

        step()
        peaks.append(measure_tensors(step, torch.device("cpu"), [], None))
    assert peaks[1] <= peaks[0] - x.nbytes  # at least one feature


def test_our_options_are_for_dynamic_networks_on_a_cpu():
    network = dgnet.create_model("dg_resnet20")
    assert dgnet.compile_options(network) == {"realize_reads_threshold": 8}
    assert dgnet.compile_options(network, "cuda") == dgnet.compile_options(dgnet.create_model("resnet20")) == {}


def test_the_peak_of_tensors_is_the_most_that_live_at_once():
    kept = torch.empty(2**20)

    def step():
        one = torch.empty(2**20)
        two = torch.empty(2**19)
        del one
        return torch.empty(2**18), two

    assert measure_tensors(step, torch.device("cpu"), [kept], None) == 4 * (2**20 + 2**20 + 2**19)
    assert measure_tensors(step, torch.device("meta"), [], 5) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dg_resnet19"], "unknown model 'dg_resnet19'; did you mean"),
        (["resnet20"], "name the other model with --against"),
        (["dg_resnet20", "--against", "resnet2"], "unknown model 'resnet2'"),
        (["dg_resnet20", "--task", "fly"], "unknown --task 'fly'; allowed: train, infer"),
        (["dg_resnet20", "--dtype", "int8"], "unknown --dtype 'int8'"),
        (["dg_resnet20", "--batch-size", 0], "--batch-size must be at least 1, got 0"),
        (["dg_resnet20", "--batch-size", 1], "--batch-size 2 or more"),
        (["dg_resnet20", "--rounds", 0], "--rounds must be at least 1, got 0"),
        (["dg_resnet20", "--cuda-graphs", "true", "--device", "cpu"], "--cuda-graphs needs --compile true and a CUDA device"),
        (["dg_resnet20", "--model-kwargs", "{router_bias: x}"], "router_bias must be a number"),
    ],
    ids=str,
)
def test_refusals(capsys, arguments, message):
    assert message in refuse(capsys, "bench", *arguments)


def test_a_network_that_cannot_take_the_size_is_named(capsys):
    words = ["bench", "dg_resnet20", "--against", "vit_tiny_patch16_224", "--task", "infer", "--batch-size", "2"]
    assert main(words) == 2
    assert "dgnet: vit_tiny_patch16_224 cannot run infer here" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["detect-train", "detect-infer"])
def test_detectors_are_measured_too(task, capsys):
    small = ["--batch-size", 1, "--image-size", 48, "--rounds", 1]
    result = json.loads(ask(capsys, "bench", "dg_resnet18", "--task", task, *small, "--json"))
    assert (result["task"], result["against"], result["image_size"]) == (task, "resnet18", 48)
    assert result["ratio"] > 0
    assert "48×80 pixels" in ask(capsys, "bench", "dg_resnet18", "--task", task, *small)
    assert "a detector is no single graph" in refuse(capsys, "bench", "dg_resnet18", "--task", task, "--compile", "true")
