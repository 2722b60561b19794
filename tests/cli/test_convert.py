"""Converted networks on the command line, from `dgnet convert` to export: maps, maps with channels last, tokens."""

from __future__ import annotations

import json
import shlex
import signal
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn

import dgnet
from dgnet.analysis._photo import PhotoInspector, open_photo
from dgnet.checkpoint import describe_network, load_checkpoint, read_tensors, save_tensors
from dgnet.data import Preprocessing
from dgnet.graph import find_stages
from dgnet.models import ConvertedNetwork, Increment
from dgnet.training import Interrupted, TrainConfig, read_run, train
from dgnet.training._checkpointing import Checkpointing
from tests.helpers.command import ask, refuse
from tests.helpers.networks import close_some, spread_routers

NETWORKS = ["test_convnext", "test_mambaout", "test_vit"]
"""(B, C, H, W), (B, H, W, C) and (B, L, C)."""
BY_LAYOUT = [NETWORKS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS[1:])]
SIZE = ["--image-size", "32"]
TUNE = ["--batch-size", "4", "--epochs", "1", "--optimizer", "adamw", "--lr", "2e-4", *SIZE]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """For each network a file of static weights for two classes, without dgnet's description."""
    folder = tmp_path_factory.mktemp("weights")
    for name in NETWORKS:
        torch.manual_seed(0)
        options = {"img_size": 32} if name == "test_vit" else {}
        network = timm.create_model(name, num_classes=2, **options)
        for scale in (parameter for name, parameter in network.named_parameters() if "gamma" in name):
            torch.nn.init.uniform_(scale, 0.5, 1.5)  # layer scale, with which untrained blocks add next to nothing
        save_file(network.state_dict(), folder / f"{name}.safetensors")
    return {name: str(folder / f"{name}.safetensors") for name in NETWORKS}


@pytest.fixture(scope="module", params=BY_LAYOUT)
def tuned(request, weights, images, tmp_path_factory):
    """A run that fine-tuned a converted network to a budget. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("tuned") / request.param
    words = ["train", "--model", request.param, "--dynamic", "true", "--weights", weights[request.param]]
    assert dgnet.cli.main([*words, "--data", str(images), "--budget", "0.8", *TUNE, "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def varied(tuned, tmp_path):
    """The run's network as a file, with routers that differ between images, and edges that close."""
    checkpoint = load_checkpoint(tuned)
    network = checkpoint.build_network()
    for stage in find_stages(network):
        spread_routers(stage)
    close_some(network, torch.randn(12, 3, 32, 32))
    carried = describe_network(
        checkpoint.model, checkpoint.model_kwargs, checkpoint.class_names, checkpoint.preprocessing, checkpoint.config
    )
    save_tensors(network.state_dict(), tmp_path / "varied.safetensors", carried)
    return tmp_path / "varied.safetensors"


@pytest.mark.parametrize("name", BY_LAYOUT)
def test_conversion_on_the_command_line_changes_no_prediction(name, weights, images, tmp_path, capsys):
    run = tmp_path / "converted"
    words = ["convert", name, "--weights", weights[name], *SIZE]
    found = json.loads(ask(capsys, *words, "--check", images, "--output", run, "--json"))
    agreement = found["agreement"]
    assert (agreement["images"], agreement["same_class"]) == (6, 100)
    assert agreement["top1"] == agreement["top1_static"]
    assert agreement["difference"] < 1e-5
    network = load_checkpoint(run).build_network()
    assert isinstance(network, ConvertedNetwork)
    assert [stage["name"] for stage in found["stages"]] == list(network.graph_names)
    photos = sorted((images / "val" / "dark").iterdir())
    static = json.loads(ask(capsys, "predict", "--model", name, "--weights", weights[name], *SIZE, *photos, "--json"))
    for one, other in zip(static, json.loads(ask(capsys, "predict", run, *photos, "--json")), strict=True):
        assert one["classes"] == other["classes"]
        assert one["probabilities"] == pytest.approx(other["probabilities"], rel=1e-4)
    # The command that it names is one that works.
    command = shlex.split(found["next_command"].replace("DATA", str(images)))
    assert command[:4] == ["dgnet", "train", "--model", name]
    assert str(run) in command
    ask(capsys, *command[1:], "--epochs", 1, "--batch-size", 4, "--output", tmp_path / "next")
    assert load_checkpoint(tmp_path / "next").model_kwargs["dynamic"] is True


def test_what_is_printed(weights, images, capsys):
    words = ["convert", "test_convnext", "--weights", weights["test_convnext"], *SIZE]
    text = ask(capsys, *words, "--check", images / "val" / "dark" / "0.jpg")
    assert "DynamicConvNeXt: 3 dynamic stages of 8 blocks" in text
    assert "on 1 photo the logits differ" in text
    assert "top-1" not in text
    assert f"next: dgnet train --model test_convnext --dynamic true --weights {weights['test_convnext']} " in text
    assert "a rate of 1e-4 to 5e-4 suits trained weights" in text


def test_photos_of_other_classes_are_compared_without_labels(images, capsys):
    capsys.readouterr()
    words = ["convert", "test_convnext", "--num-classes", "7", *SIZE, "--check", str(images), "--json"]
    assert dgnet.cli.main(words) == 0
    output, errors = capsys.readouterr()
    assert json.loads(output)["agreement"]["top1"] is None
    assert json.loads(output)["agreement"]["images"] == 18  # all photos below the folder
    assert "use data with the network's classes; top-1 is left out\n" in errors


@pytest.mark.slow
def test_a_converted_file_says_with_which_command_it_is_used(weights, images, tmp_path, capsys):
    run, options = tmp_path / "run", ["--weighting", "learned", "--node-gate", "hard", "--stages", "stages.2"]
    ask(capsys, "convert", "test_convnext", "--weights", weights["test_convnext"], *SIZE, *options, "--output", run)
    line = refuse(capsys, "convert", "test_convnext", "--weights", run)
    _, _, command = line.strip().partition("was converted already; fine-tune it with: dgnet ")
    missing = '--dynamic true --weighting learned --model-kwargs \'{"node_gate": "hard", "stages": ["stages.2"]}\''
    assert command == f"train --model test_convnext {missing} --weights {run / 'model.safetensors'} --data DATA"
    line = refuse(capsys, "train", "--model", "test_convnext", "--weights", run, "--data", images, "--batch-size", 4, *SIZE)
    assert line.startswith(f"dgnet: {run / 'model.safetensors'} is of test_convnext with other options (it lacks ")
    assert line.endswith(f"); add: {missing}\n")
    words = shlex.split(command.replace("DATA", str(images)))
    ask(capsys, *words, *TUNE, "--output", tmp_path / "next")


@pytest.mark.slow
def test_weights_of_another_image_size_are_resampled_as_timm_does(weights, tmp_path, capsys):
    own = timm.create_model("test_vit", num_classes=2, img_size=64)
    state = read_tensors(Path(weights["test_vit"]))[0]
    expected = checkpoint_filter_fn(state, own)
    words = ["convert", "test_vit", "--image-size", 64, "--weights"]
    ask(capsys, *words, weights["test_vit"], "--output", tmp_path / "a")
    checkpoint = load_checkpoint(tmp_path / "a")
    assert (checkpoint.preprocessing.image_size, checkpoint.model_kwargs["img_size"]) == ((64, 64), 64)
    torch.testing.assert_close(checkpoint.state_dict["pos_embed"], expected["pos_embed"], rtol=0, atol=0)
    # A run says its own size, which --image-size replaces.
    preprocessing = Preprocessing.of(own.pretrained_cfg, 32)
    carried = describe_network("test_vit", {"img_size": 32}, ["a", "b"], preprocessing, {})
    save_tensors(state, tmp_path / "run.safetensors", carried)
    figures = json.loads(ask(capsys, *words, tmp_path / "run.safetensors", "--output", tmp_path / "b", "--json"))
    assert figures["image_size"] == [64, 64]
    found = load_checkpoint(tmp_path / "b")
    torch.testing.assert_close(found.state_dict["pos_embed"], expected["pos_embed"], rtol=0, atol=0)
    assert (found.class_names, found.preprocessing.image_size) == (["a", "b"], (64, 64))


def test_a_network_that_computes_something_else_is_refused_and_leaves_nothing_behind(
    weights, images, tmp_path, monkeypatch, capsys
):
    forward = Increment.forward
    monkeypatch.setattr(Increment, "forward", lambda self, x: forward(self, x) + 1)
    monkeypatch.setattr("dgnet.models._convert.find_difference", lambda *of_networks: "")  # which refuses before the photos
    capsys.readouterr()
    words = ["convert", "test_convnext", "--weights", weights["test_convnext"], *SIZE, "--check", str(images)]
    assert dgnet.cli.main([*words, "--output", str(tmp_path / "run")]) == 2
    errors = capsys.readouterr().err
    assert "the converted network differs from test_convnext by" in errors.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_weights_of_a_static_run_keep_its_classes_and_preprocessing(images, tmp_path, capsys):
    words = ["train", "--model", "test_convnext", "--data", images, *TUNE, "--output", tmp_path / "static"]
    ask(capsys, *words, "--crop-pct", 0.5)
    ask(capsys, "convert", "test_convnext", "--weights", tmp_path / "static", "--output", tmp_path / "run")
    static, converted = load_checkpoint(tmp_path / "static"), load_checkpoint(tmp_path / "run")
    assert (converted.class_names, converted.preprocessing) == (["dark", "light"], static.preprocessing)
    assert converted.preprocessing.crop_pct == 0.5
    figures = [
        json.loads(ask(capsys, "evaluate", run, "--data", images, "--json")) for run in (tmp_path / "static", tmp_path / "run")
    ]
    assert figures[0]["top1"] == figures[1]["top1"]
    assert figures[0]["loss"] == pytest.approx(figures[1]["loss"], rel=1e-5)
    assert "is a checkpoint of test_convnext, not of test_vit" in refuse(
        capsys, "convert", "test_vit", "--weights", tmp_path / "static"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["test_byobnet"], "ByobNet has no run of blocks that could become a stage (stages.0.0: it changes the shape"),
        (
            ["resnet18", "--stages", "layer3"],
            "(layer3.0: it changes the shape; layer3.1: it is one block only, and has no gate)",
        ),
        (["dg_resnet18"], "dg_resnet18 is dynamic already; train it with: dgnet train --model dg_resnet18"),
        (["test_vti"], "unknown model 'test_vti'; did you mean 'test_vit"),
        (["test_vit", "--stages", "block"], "stages names 'block', which VisionTransformer does not have"),
        (
            ["test_vit", "--topology", "chain"],
            "compute another function: in stage 1, blocks.0, it lacks edges; only --topology complete keeps it",
        ),
        (["test_vit", "--weighting", "no"], "unknown weighting 'no'; allowed: routed, signed, linear, softmax, learned, fixed"),
        (["test_vit", "--model-kwargs", "{num_classes: 3}"], "--model-kwargs cannot set num_classes"),
        (["test_vit", "--output", "run"], "--output needs --weights FILE or --pretrained true"),
        (["test_vit", "--check", "nowhere"], "data source 'nowhere' does not exist"),
        (["test_vit", "--num-classes", "0"], "--num-classes must be at least 1, got 0"),
        (["test_vit", "--num-classes", "-3"], "--num-classes must be at least 1, got -3"),
        (["test_vit", "--image-size", "0"], "--image-size must be 1 to 10000, got 0"),
        (["test_vit", "--check", "nowhere", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["test_vit", "--weights", "WEIGHTS", "--output", "run"], "does not hold the weights of test_vit"),
        (["test_convnext", "--weights", "WEIGHTS", "--num-classes", "3"], "--num-classes follows from --weights"),
        (["test_convnext", "--weights", "WEIGHTS", "--pretrained", "true"], "both give weights; leave one out"),
        (["test_convnext", "--weights", "WEIGHTS", "--output", "full"], "--output full is not empty; name another folder"),
    ],
)
def test_mistakes_of_a_conversion(words, message, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").touch()
    words = [weights["test_convnext"] if word == "WEIGHTS" else word for word in words]
    assert message in refuse(capsys, "convert", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "test_byobnet"], "ByobNet has no run of blocks that could become a stage"),
        (
            ["--model", "dg_resnet18"],
            "--dynamic true converts a static network, and dg_resnet18 is dynamic already; leave it out",
        ),
        (
            ["--model", "test_convnext", "--model-kwargs", "{stages: [nope]}"],
            "stages names 'nope', which ConvNeXt does not have",
        ),
        (["--model", "test_convnext", "--weights", "WEIGHTS"], "does not hold the weights of test_convnext"),
        (["--model", "test_convnext", "--shortcut", "node"], "--shortcut node is not possible"),
        (["--model", "test_convnext", "--budget", "0.01"], "--budget 0.01 is less than what always runs"),
    ],
)
def test_mistakes_of_training_leave_nothing_behind(words, message, weights, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [weights["test_vit"] if word == "WEIGHTS" else word for word in words]
    assert message in refuse(capsys, "train", "--dynamic", "true", "--data", images, "--batch-size", 4, *SIZE, *words)
    assert list(tmp_path.iterdir()) == []


def test_a_fine_tuned_network_is_evaluated(tuned, varied, capsys):
    run = json.loads(ask(capsys, "evaluate", tuned, "--json"))
    assert run["images"] == 6
    figures = [json.loads(ask(capsys, "evaluate", varied, "--mode", mode, "--json")) for mode in ("dense", "sparse")]
    assert figures[0]["closed_edges"] == figures[1]["closed_edges"] > 0
    assert figures[0]["executed_multiply_adds"] == figures[1]["executed_multiply_adds"] < run["dense_multiply_adds"]
    assert figures[0]["top1"] == figures[1]["top1"]
    assert figures[0]["loss"] == pytest.approx(figures[1]["loss"], rel=1e-4)


@pytest.mark.slow
def test_speeds_controls_and_a_sweep_of_a_fine_tuned_network(tuned, varied, tmp_path, capsys):
    found = json.loads(ask(capsys, "evaluate", tuned, "--speed", "--adjacency-controls", "--json"))
    assert set(found["images_per_second"]) == {"static", "dense", "sparse"}
    assert found["top1_mean_adjacency"] is not None
    points = json.loads(
        ask(capsys, "evaluate", varied, "--sweep-threshold", "--offsets", "[-1, 0.3]", "--output", tmp_path / "s", "--json")
    )
    assert points[0]["executed_multiply_adds"] > points[1]["executed_multiply_adds"]


@pytest.mark.slow
def test_a_fine_tuned_network_is_explored(varied, images, tmp_path, capsys):
    photo = images / "val" / "light" / "0.jpg"
    (prediction,) = json.loads(ask(capsys, "predict", varied, photo, "--json"))
    report = PhotoInspector(load_checkpoint(varied)).inspect(open_photo(photo, 1))
    assert [name for name, _ in report.classes] == prediction["classes"]
    assert report.executed < report.dense
    found = json.loads(
        ask(capsys, "analyze", varied, "--explorer", 2, "--extremes", 1, "--output", tmp_path / "analysis", "--json")
    )
    assert found["model"] == load_checkpoint(varied).model
    assert {"mean.svg", "graphs_easiest.svg", "explorer.html", "edges.csv"} <= {
        p.name for p in (tmp_path / "analysis").iterdir()
    }


@pytest.mark.slow
@pytest.mark.parametrize("tuned", ["test_mambaout"], indirect=True)
def test_a_fine_tuned_network_is_exported(varied, tmp_path, capsys):
    """Networks of each layout are exported in each form in tests/inference/test_converted.py."""
    words = ["--format", "torch", "--mode", "dense", "--output", tmp_path / "net.pt2"]
    found = json.loads(ask(capsys, "export", varied, *words, "--json"))
    assert found["difference"] < 1e-4


def test_a_run_that_was_interrupted_goes_on_with_the_same_result(tuned, tmp_path, monkeypatch):
    save = Checkpointing.on_train_batch_end

    def interrupt(self, trainer, *arguments):
        if trainer.global_step == 2:
            self.signum = signal.SIGTERM
        save(self, trainer, *arguments)

    config = TrainConfig(**{**yaml.safe_load((tuned / "config.yaml").read_text()), "output": str(tmp_path / "run")})
    monkeypatch.setattr(Checkpointing, "on_train_batch_end", interrupt)
    with pytest.raises(Interrupted):
        train(config)
    monkeypatch.undo()
    train(read_run(tmp_path / "run", {}, TrainConfig)[0], tmp_path / "run")
    expected, found = (read_tensors(folder / "model.safetensors")[0] for folder in (tuned, tmp_path / "run"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.slow
def test_a_converted_network_is_timed_against_itself_as_it_is(capsys):
    words = ["bench", "test_convnext", "--dynamic", "true", "--task", "infer", *SIZE, "--batch-size", 2, "--rounds", 2]
    text = ask(capsys, *words)
    assert "test_convnext (dynamic) / test_convnext: time " in text
    assert "--against, or use --dynamic true" in refuse(capsys, "bench", "test_convnext")
