"""Training, evaluation, prediction and export as a user types them: what they print, write and return."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch import nn

import dgnet
from dgnet.checkpoint import load_checkpoint
from dgnet.cli import main
from dgnet.data import TRAIN, hold_out, open_dataset
from dgnet.errors import UsageError
from dgnet.graph import find_stages
from dgnet.tables import TABLES
from dgnet.training import TrainConfig, evaluate, open_evaluation_data
from dgnet.training.module import Classifier
from tests.command import ask, refuse
from tests.data.test_sources import jpeg, write_folder, write_shard

QUICK = ["--model-kwargs", "{channels: [4, 4, 4]}", "--image-size", "8", "--batch-size", "4", "--lr", "0.05"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A divided folder of two classes, dark and light."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 6), ("val", 3)):
        for name, colour in (("dark", 0), ("light", 200)):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                (root / split / name / f"{index}.jpg").write_bytes(jpeg(colour + 5 * index))
    return root


@pytest.fixture(scope="module")
def run(images, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "a"
    assert main(["train", "--data", str(images), "--epochs", "2", "--output", str(folder), *QUICK]) == 0
    return folder


def read_metrics(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))


def test_a_run_folder_holds_what_is_promised(run):
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "metrics.csv",
        "tensorboard",
        "checkpoints",
        "model.safetensors",
    }
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["epochs"] == 2
    resolved = {"weight_decay": 5e-4, "augment": "pad-crop", "image_size": 8, "topology": "complete", "weighting": "routed"}
    assert {name: config[name] for name in resolved} == resolved  # not only what was typed
    assert config["model_kwargs"]["router_bias"] == 3.0
    assert "learned_start" not in config["model_kwargs"]  # of another weighting
    rows = read_metrics(run)
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert {"train_loss", "train_top1", "val_loss", "val_top1", "lr"} <= set(rows[0])
    assert float(rows[0]["lr"]) == pytest.approx(0.05 * 7 / 9)  # of the third of three warm-up steps from a third of it
    assert list((run / "tensorboard").glob("events*"))


def test_training_says_how_it_went_and_how_to_evaluate(images, tmp_path, capsys):
    output = ask(capsys, "train", "--data", images, "--epochs", 1, "--output", tmp_path / "b", *QUICK)
    assert output.startswith("top-1 ")
    assert output.splitlines()[-1] == f"evaluate it: dgnet evaluate {tmp_path / 'b'}"


def test_a_run_can_be_repeated_from_its_configuration(run, tmp_path, capsys):
    ask(capsys, "train", "--config", run / "config.yaml", "--output", tmp_path / "again")
    first, second = load_checkpoint(run), load_checkpoint(tmp_path / "again")
    assert first.state_dict.keys() == second.state_dict.keys()
    assert all(torch.equal(first.state_dict[name], second.state_dict[name]) for name in first.state_dict)


def test_the_seed_matters(run, tmp_path, capsys):
    ask(capsys, "train", "--config", run / "config.yaml", "--seed", 1, "--output", tmp_path / "other")
    first, second = load_checkpoint(run), load_checkpoint(tmp_path / "other")
    assert not torch.equal(first.state_dict["conv1.weight"], second.state_dict["conv1.weight"])


def test_evaluate_gives_the_accuracy_of_the_last_epoch(run, capsys):
    row = read_metrics(run)[-1]
    for path in (run, run / "checkpoints" / "last.ckpt", run / "model.safetensors"):
        result = json.loads(ask(capsys, "evaluate", path, "--json"))
        assert set(result) == {
            "top1",
            "top5",
            "loss",
            "images",
            "closed_edges",
            "skippable_nodes",
            "distinct_wirings",
            "empty_outputs",
            "weight_std",
            "dense_multiply_adds",
            "executed_multiply_adds",
            "executed_std",
            "executed_percentiles",
            "executed_by_class",
            "images_per_second",
            "top1_mean_adjacency",
            "top1_other_adjacency",
        }
        assert result["images"] == 6
        assert result["top1"] == pytest.approx(float(row["val_top1"]))
        assert result["loss"] == pytest.approx(float(row["val_loss"]), rel=1e-4)
        assert (result["closed_edges"], result["skippable_nodes"], result["distinct_wirings"]) == (0, 0, 1)
    assert "closed edges 0.00 %" in ask(capsys, "evaluate", run)


def test_evaluate_on_other_data(run, images, tmp_path, capsys):
    assert json.loads(ask(capsys, "evaluate", run, "--data", images / "train", "--json"))["images"] == 12
    write_folder(tmp_path, {"light": 2})
    assert json.loads(ask(capsys, "evaluate", run, "--data", tmp_path, "--json"))["images"] == 2
    write_folder(tmp_path, {"green": 2})
    assert "class 'green' is not one of the 2 classes" in refuse(capsys, "evaluate", run, "--data", tmp_path)


def test_an_operating_point_is_chosen_and_written(run, tmp_path, capsys):
    points = json.loads(
        ask(capsys, "evaluate", run, "--sweep-threshold", "--offsets", "[-0.5, 2]", "--output", tmp_path / "sweep", "--json")
    )
    assert [point["threshold_offset"] for point in points] == [-0.5, 2]
    assert points[0]["closed_edges"] == 0 < points[1]["closed_edges"]
    assert (tmp_path / "sweep" / "threshold_sweep.png").stat().st_size > 1000
    file = tmp_path / "chosen.safetensors"
    chosen = json.loads(ask(capsys, "evaluate", run, "--threshold-offset", 2, "--write", file, "--json"))
    assert chosen["closed_edges"] == points[1]["closed_edges"]
    assert json.loads(ask(capsys, "evaluate", file, "--json")) == chosen
    assert json.loads(ask(capsys, "evaluate", file, "--mode", "sparse", "--json"))["executed_multiply_adds"] == pytest.approx(
        chosen["executed_multiply_adds"]
    )
    speeds = json.loads(ask(capsys, "evaluate", run, "--speed", "--json"))["images_per_second"]
    assert set(speeds) == {"static", "dense", "sparse"}


def test_an_open_edge_weighs_what_evaluate_is_asked_for(run, tmp_path, capsys):
    gated, raw = (
        json.loads(ask(capsys, "evaluate", run, "--inference-weight", weight, "--json")) for weight in ("gated", "raw")
    )
    assert gated == json.loads(ask(capsys, "evaluate", run, "--json"))
    network = load_checkpoint(run).build_network()
    for stage in find_stages(network):
        stage.weighting.inference_weight = "raw"
    dataset = open_evaluation_data(load_checkpoint(run))
    assert raw == json.loads(json.dumps(asdict(evaluate(network, dataset))))
    assert raw["loss"] != gated["loss"]
    file = tmp_path / "raw.safetensors"
    ask(capsys, "evaluate", run, "--inference-weight", "raw", "--write", file)
    assert json.loads(ask(capsys, "evaluate", file, "--json")) == raw


def test_evaluate_refuses_what_does_not_go_together(run, capsys):
    for words, message in (
        (["--write", "x.safetensors"], "--write needs --threshold-offset or --inference-weight"),
        (["--inference-weight", "plain"], "unknown inference_weight 'plain'"),
        (["--offsets", "[0]"], "--offsets needs --sweep-threshold"),
        (["--compile"], "--compile needs --speed"),
        (["--sweep-threshold", "--speed"], "--sweep-threshold does not go with --speed"),
        (["--threshold-offset", "0.1", "--write", "x.ckpt"], "must end in .safetensors"),
        (["--mode", "fast"], "unknown mode 'fast'"),
    ):
        assert message in refuse(capsys, "evaluate", run, *words)


@pytest.mark.slow
def test_export_writes_a_file_that_agrees(run, tmp_path, capsys):
    path = tmp_path / "network.onnx"
    found = json.loads(ask(capsys, "export", run, "--mode", "sparse", "--output", path, "--json"))
    assert found["difference"] < 1e-4
    import onnx

    (carried,) = (prop.value for prop in onnx.load(path).metadata_props if prop.key == "dgnet")
    assert json.loads(carried)["class_names"] == ["dark", "light"]
    for words, message in (
        (["--format", "tf"], "unknown --format 'tf'; allowed: onnx, torch"),
        (["--output", tmp_path / "x.pt2"], "must end in .onnx for --format onnx"),
        (["--output", tmp_path / "no" / "x.onnx"], "does not exist; make it first"),
    ):
        assert message in refuse(capsys, "export", run, *words)


@pytest.mark.slow
def test_a_trained_network_is_fine_tuned_to_a_budget(run, images, tmp_path, capsys):
    budgeted = tmp_path / "budgeted"
    options = ["--epochs", 1, "--batch-size", 6, "--image-size", 8, "--model-kwargs", '{"channels": [4, 4, 4]}']
    weights = run / "model.safetensors"
    assert (
        main(list(map(str, ["train", "--data", images, "--weights", weights, "--budget", 0.7, "--output", budgeted, *options])))
        == 0
    )
    assert "stayed as initialised: layer1.node_gates.bias" in capsys.readouterr().err
    assert "executed multiply-adds" in ask(capsys, "evaluate", budgeted, "--mode", "sparse")
    words = ["train", "--data", images, "--output", tmp_path / "other", *options]
    assert "what always runs costs" in refuse(capsys, *words, "--budget", 1.5)
    assert "is less than what always runs" in refuse(capsys, *words, "--budget", 0.001)
    assert "needs a network with dynamic stages" in refuse(capsys, *words, "--budget", 0.5, "--model", "resnet20")


def test_predict_names_classes_from_the_checkpoint(run, images, capsys):
    image = images / "val" / "dark" / "0.jpg"
    (prediction,) = json.loads(ask(capsys, "predict", run, image, "--json"))
    assert prediction["image"] == str(image)
    assert set(prediction["classes"]) == {"dark", "light"}
    assert sum(prediction["probabilities"]) == pytest.approx(1)
    assert ask(capsys, "predict", run, image, image, "--top-k", 1).count("\n") == 2


def test_the_safetensors_file_loads_by_name(run):
    model = dgnet.create_model("dg_resnet20", num_classes=2, channels=(4, 4, 4), checkpoint_path=str(run / "model.safetensors"))
    state = load_checkpoint(run).state_dict
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_checkpoints_hold_tensors_and_plain_values(run):
    for path in (run / "checkpoints").iterdir():
        assert torch.load(path, weights_only=True)["dgnet"]["class_names"] == ["dark", "light"]


def test_weights_start_a_run_and_reset_another_head(run, images, tmp_path, capsys):
    options = ["--epochs", 1, "--lr", 1e-9, *QUICK[:-2], "--weights", run]
    ask(capsys, "train", "--data", images, "--output", tmp_path / "same", *options)
    before, after = load_checkpoint(run).state_dict, load_checkpoint(tmp_path / "same").state_dict
    torch.testing.assert_close(before["fc.weight"], after["fc.weight"])
    write_folder(tmp_path / "three", {"a": 4, "b": 4, "c": 4})
    three = ["--data", tmp_path / "three", "--val-data", tmp_path / "three"]
    capsys.readouterr()
    assert main([str(a) for a in ["train", *three, "--output", tmp_path / "other", *options]]) == 0
    assert "reset fc.weight, fc.bias to 3 classes" in capsys.readouterr().err
    after = load_checkpoint(tmp_path / "other").state_dict
    torch.testing.assert_close(before["conv1.weight"], after["conv1.weight"])
    assert after["fc.weight"].shape == (3, 4)


def test_weights_of_the_static_network_start_a_dynamic_one(images, tmp_path, capsys):
    options = ["--data", images, "--epochs", 1, "--lr", 1e-9, *QUICK[:-2]]
    ask(capsys, "train", "--model", "resnet20", "--output", tmp_path / "static", *options)
    arguments = ["train", "--weights", tmp_path / "static", "--output", tmp_path / "dynamic", *options]
    assert main([str(argument) for argument in arguments]) == 0
    assert "stayed as initialised: layer1.weighting.tau, layer1.weighting" in capsys.readouterr().err
    static, dynamic = (load_checkpoint(tmp_path / name).state_dict for name in ("static", "dynamic"))
    torch.testing.assert_close(dynamic["layer2.nodes.1.conv1.weight"], static["layer2.1.conv1.weight"])
    line = refuse(capsys, "train", "--model", "dg_resnet32", "--weights", tmp_path / "static", *options)
    assert "is a checkpoint of resnet20, not of dg_resnet32 as asked for (these are not the weights of the static" in line


def test_a_random_graph_travels_with_its_checkpoint(images, tmp_path, monkeypatch, capsys):
    kwargs = "{num_blocks: 5, channels: 4, head_channels: 8, topology_seed: 3}"
    options = ["--epochs", 1, "--image-size", 32, "--batch-size", 4, "--model-kwargs", kwargs, "--output", tmp_path / "run"]
    ask(capsys, "train", "--data", images, "--model", "randwire_small_er", *options)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["topology"] == "er"
    assert config["model_kwargs"]["topology_seed"] == 3
    monkeypatch.setattr("networkx.erdos_renyi_graph", None)  # another version may draw another graph
    assert json.loads(ask(capsys, "evaluate", tmp_path / "run", "--json"))["images"] == 6


def test_images_held_out_of_training_are_those_evaluated(run, images, tmp_path, capsys):
    options = ["--data", images / "train", "--holdout", 5, "--epochs", 1, *QUICK]
    ask(capsys, "train", *options, "--output", tmp_path / "a")
    (row,) = read_metrics(tmp_path / "a")
    result = json.loads(ask(capsys, "evaluate", tmp_path / "a", "--json"))
    assert result["images"] == 5
    assert result["loss"] == pytest.approx(float(row["val_loss"]), rel=1e-4)
    assert f"on 5 held-out images of {images / 'train'}, 5 images" in ask(capsys, "evaluate", tmp_path / "a")
    assert json.loads(ask(capsys, "evaluate", tmp_path / "a", "--data", images, "--json"))["images"] == 6
    # The same images, whatever the seed: what is chosen on them is chosen on one set.
    train, held = hold_out(open_dataset(str(images / "train"), TRAIN), 5)
    assert (len(train), len(held)) == (7, 5)
    assert {train.name(i) for i in range(7)} | {held.name(i) for i in range(5)} == {
        str(path) for path in (images / "train").rglob("*.jpg")
    }
    again = hold_out(open_dataset(str(images / "train"), TRAIN), 5)[1]
    assert [again.name(i) for i in range(5)] == [held.name(i) for i in range(5)]


def test_evaluation_may_wait_for_the_last_epoch(images, tmp_path, capsys):
    options = ["--data", images, "--epochs", 4, *QUICK]
    for every in (1, 2, 4):
        ask(capsys, "train", *options, "--evaluate-every", every, "--output", tmp_path / str(every))
    each, second, last = (read_metrics(tmp_path / str(every)) for every in (1, 2, 4))
    assert [[row["val_loss"] != "" for row in rows] for rows in (each, second, last)] == [
        [True] * 4,
        [False, True] * 2,
        [False] * 3 + [True],
    ]
    for rows in (second, last):  # training goes the same way, and each epoch's figures are its own
        assert [row["train_loss"] for row in rows] == [row["train_loss"] for row in each]
        assert rows[-1]["val_loss"] == each[-1]["val_loss"]
    assert (tmp_path / "4" / "checkpoints" / "best.ckpt").exists()


def test_decoding_once_trains_as_well(images, tmp_path, capsys):
    options = ["--data", images, "--epochs", 20, *QUICK, "--augment", "pad-crop", "--hflip", 0.5]
    output = ask(capsys, "train", *options, "--cache", "true", "--output", tmp_path / "run")
    assert float(output.split()[1]) == 100
    row = read_metrics(tmp_path / "run")[-1]
    result = json.loads(ask(capsys, "evaluate", tmp_path / "run", "--json"))  # through the ordinary loader
    assert result["loss"] == pytest.approx(float(row["val_loss"]), rel=1e-3)


def test_adjacency_controls_are_printed(run, capsys):
    output = ask(capsys, "evaluate", run, "--adjacency-controls")
    assert "top-1 with the mean adjacency " in output
    result = json.loads(ask(capsys, "evaluate", run, "--adjacency-controls", "--json"))
    assert f"{result['top1_mean_adjacency']:.2f} %, with another image's {result['top1_other_adjacency']:.2f} %" in output
    assert json.loads(ask(capsys, "evaluate", run, "--json"))["top1_mean_adjacency"] is None


@pytest.mark.slow
def test_a_moving_average_is_what_is_evaluated_and_saved(images, tmp_path, capsys):
    run = tmp_path / "run"
    ask(capsys, "train", "--data", images, "--epochs", 3, "--ema", 0.5, "--clip-grad", 1, "--output", run, *QUICK)
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    averaged, current = checkpoint["state_dict"], checkpoint["current_model_state"]
    saved = load_checkpoint(run / "model.safetensors").state_dict
    assert all(torch.equal(averaged[f"network.{name}"], tensor) for name, tensor in saved.items())
    assert any(not torch.equal(averaged[name], current[name]) for name in current)
    result = json.loads(ask(capsys, "evaluate", run, "--json"))
    assert result["loss"] == pytest.approx(float(read_metrics(run)[-1]["val_loss"]), abs=1e-5)


def test_curves_of_connectivity_are_those_of_evaluation(run, capsys):
    row = read_metrics(run)[-1]
    result = json.loads(ask(capsys, "evaluate", run, "--json"))
    network = load_checkpoint(run).build_network()
    edges = [int(stage.topology.mask.sum()) for stage in network.stages]
    closed = [float(row[f"val_stage{number}_closed_edges"]) for number in (1, 2, 3)]
    share = sum(count * part for count, part in zip(edges, closed, strict=True)) / sum(edges)
    assert share == pytest.approx(result["closed_edges"], abs=1e-6)
    for number, stage in enumerate(network.stages, start=1):
        assert 0 < float(row[f"val_stage{number}_edge_weight"]) < 1
        assert float(row[f"stage{number}_threshold"]) == pytest.approx(float(stage.weighting.tau.detach().mean()), abs=1e-7)


def test_lightnings_loggers_come_from_the_recipe(images, tmp_path, capsys):
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path / "mine")}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"loggers": [logger], "epochs": 1, "data": str(images), "output": str(tmp_path / "run")}))
    ask(capsys, "train", "--config", recipe, *QUICK)
    assert "val_top1" in next((tmp_path / "mine").rglob("metrics.csv")).read_text()
    for path, why in (("lightning.Trainer", "is no Lightning logger"), ("nowhere.Logger", "No module named 'nowhere'")):
        recipe.write_text(yaml.safe_dump({"loggers": [{"class_path": path}], "data": str(images)}))
        line = refuse(capsys, "train", "--config", recipe, "--output", tmp_path / "other", *QUICK)
        assert f"--loggers: {path} cannot be made" in line
        assert why in line


def test_digits_are_learned(tmp_path, capsys):
    """The default run in a third of its epochs."""
    output = ask(capsys, "train", "--epochs", 6, "--output", tmp_path / "digits")
    assert float(output.split()[1]) > 90


# Bad input: exit status 2, one line that says what to do, nothing lost.


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("trian", "unknown command 'trian'; did you mean 'train'?"),
        ("train --modle x", "unknown option --modle; did you mean '--model'?"),
        ("train extra", "unrecognized arguments: extra"),
        ("train --model dg_resnt20", "unknown model 'dg_resnt20'; did you mean 'dg_resnet20'?"),
        ("train --model resnet20 --weighting fixed", "resnet20 is static and has no option 'weighting'; use dg_resnet20"),
        ("train --model resnet18 --weighting fixed", "resnet18 is static and has no option 'weighting'; use dg_resnet18"),
        ('train --model resnet18 --model-kwargs {"foo":1}', "resnet18 has no option 'foo'"),
        ('train --model-kwargs {"layers":[1,1,1]}', "dg_resnet20 cannot be built with"),
        ('train --model-kwargs {"channels":[4]}', "dg_resnet20 cannot be built with"),
        ('train --model-kwargs {"drop_rate":2}', "drop_rate must be 0 to 1, got 2"),
        ('train --model-kwargs {"router":"x"}', "router must be a class or callable, got 'x'"),
        ('train --model-kwargs {"router_std":-1}', "router_std must be at least 0, got -1"),
        ("train --output FILE/sub", "the run folder FILE/sub cannot be written: Not a directory"),
        ("train --output FILE", "--output FILE is a file"),
        ("train --weighting foo", "unknown weighting 'foo'; allowed: routed, learned, fixed"),
        ('train --model-kwargs {"router_bas":1}', "has no option 'router_bas'; did you mean 'router_bias'?"),
        ('train --model-kwargs {"num_classes":3}', "cannot set num_classes: it follows from the data"),
        ("train --epochs 0", "--epochs must be at least 1, got 0"),
        ("train --epochs many", "--epochs: "),
        ("train --batch-size -1", "--batch-size must be at least 1"),
        ("train --batch-size 100000", "is more than the 1442 training images"),
        ("train --seed 5000000000", "--seed must be 0 to 4294967295"),
        ("train --warmup-epochs 30 --epochs 10", "--warmup-epochs must be 0 to 10, got 30"),
        ("train --evaluate-every 3 --epochs 10", "--evaluate-every 3 leaves out the last of 10 epochs; use a divisor"),
        ("train --holdout -1", "--holdout must be at least 0, got -1"),
        ("train --holdout 5000", "--holdout 5000 leaves none of the 1442 training images; hold out fewer"),
        ("train --holdout 5 --val-data digits", "--holdout takes the place of --val-data; leave one out"),
        (
            "train --cache true --workers 1",
            "--cache true needs --devices 1, --nodes 1, --workers 0 and another --augment than rrc",
        ),
        (
            "train --cache true --image-size 96",
            "--cache true augments with pad-crop or none, and images of (96, 96) call for rrc",
        ),
        ("train --data a-{0..4.tar", "cannot be expanded"),
        ("train --lr inf", "--lr: Expected a 'float'. Got value: inf"),
        ("train --lr 0", "--lr must be above 0"),
        ("train --hflip 2", "--hflip must be 0 to 1, got 2"),
        ("train --precision fp8", "unknown --precision 'fp8'"),
        ("train --optimizer sdg", "unknown --optimizer 'sdg'; did you mean 'sgd'?"),
        ("train --accelerator tpuu", "--accelerator tpuu"),
        ("train --config nowhere.yaml", "nowhere.yaml"),
        ("train --batch-size 9 --accumulate 2", "--batch-size 9 cannot be divided by --accumulate 2"),
        ("train --ema 1", "--ema must be below 1"),
        ("train --epoch-images 9", "--epoch-images is for streams"),
        ("train --sync-bn true --accelerator cpu", "--sync-bn needs CUDA devices"),
        ("train --checkpoint-every sometimes", "--checkpoint-every must be like '500 steps'"),
        ("train --on-bad-image ignore", "unknown --on-bad-image 'ignore'"),
        ("train --loggers [{name:x}]", "--loggers"),
        ("train --resume nowhere", "nowhere is no run folder"),
        ("train --data nowhere", "data source 'nowhere' does not exist"),
        ("train --data no-{0..1}.tar --val-data digits", "no-0.tar does not exist"),
        ("train --weights nowhere.ckpt", "nowhere.ckpt does not exist"),
        ("evaluate nowhere", "nowhere does not exist"),
        ("evaluate", "checkpoint"),
        ("predict nowhere x.jpg", "nowhere does not exist"),
        ("train --model dla34 --grad-checkpointing true", "dla34 has no gradient checkpointing; leave out"),
        ("cost --table 6", "unknown --table '6'; allowed: 1, 2, 4, 5"),
        ("cost dg_resnet5", "unknown model 'dg_resnet5'"),
        ("cost dg_resnet18 --image-size 0 3", "at least 1 pixel"),
        ("cost vit_tiny_patch16_224 --image-size 32 32", "cannot take an image of 32×32"),
        ("cost --image-size 3", "expected 2 arguments"),
    ],
)
def test_mistakes_end_in_one_line(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    assert expected in refuse(capsys, *arguments.split())
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]  # nothing was begun


def test_a_recipe_with_a_misspelt_option(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("epochz: 3\n")
    assert "epochz" in refuse(capsys, "train", "--config", tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("{epochs: [\n")
    assert f"--config {tmp_path}/r.yaml is no valid YAML" in refuse(capsys, "train", "--config", tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("lr: .inf\n")
    assert "--lr must be a number, got inf" in refuse(capsys, "train", "--config", tmp_path / "r.yaml")


ALL = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(recipe for task in ("cifar10", "imagenet") for recipe in (ALL / task).glob("*.yaml"))


def test_every_dynamic_network_of_the_papers_tables_has_a_recipe():
    dynamic = {name: [row.model for row in TABLES[name].rows if row.model.startswith("dg_")] for name in ("1", "4", "5")}
    expected = {
        # model: rate, decay (§4.1, §6.1), by the epochs of its table
        **{(model, 100): (0.4, 1e-4) for model in dynamic["1"] if "resne" in model},
        **{(model, 100): (0.8, 5e-5) for model in dynamic["1"] if "regnet" in model},
        **{(model, 250): (0.8, 5e-5) for model in dynamic["5"]},
        **{(model, 100): (0.4, 5e-5) for model in dynamic["4"]},
        ("dg_mobilenetv2_100", 200): (0.4, 4e-5),
    }
    recipes = [yaml.safe_load(recipe.read_text(encoding="utf-8")) for recipe in RECIPES if recipe.parent.name == "imagenet"]
    assert {(r["model"], r["epochs"]): (r["lr"], r["weight_decay"]) for r in recipes} == expected
    assert {name for name, *_ in expected} == {model for models in dynamic.values() for model in models}
    for recipe in recipes:
        common = (recipe["batch_size"], recipe["warmup_epochs"], recipe["momentum"], recipe["label_smoothing"])
        assert common == (1024, 5, 0.9, 0.1)
        assert recipe.get("model_kwargs") == ({"drop_rate": 0.2} if "mobilenet" in recipe["model"] else None)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.parent.name}-{recipe.stem}")
def test_a_recipe_takes_a_step_on_a_tiny_fake_imagenet(recipe, tmp_path, capsys):
    write_folder(tmp_path / "data", {"ant": 2, "cat": 2})
    data = ["--data", tmp_path / "data", "--val-data", tmp_path / "data"]
    small = ["--image-size", 64, "--batch-size", 4, "--epochs", 1, "--warmup-epochs", 0]
    options = [*data, *small, "--compile", "false", "--precision", 32, "--output", tmp_path / "run"]
    ask(capsys, "train", "--config", recipe, *options)
    trained = load_checkpoint(tmp_path / "run")
    assert trained.model == yaml.safe_load(recipe.read_text(encoding="utf-8"))["model"]
    assert all(tensor.isfinite().all() for tensor in trained.state_dict.values())
    trained.build_network()
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1


def test_a_recipes_switches(tmp_path, capsys):
    """The static baseline, Table 6's α, Fig. 4's bias: options beside a recipe, whose own model options stay."""
    write_folder(tmp_path / "data", {"ant": 2, "cat": 2})
    recipe = next(recipe for recipe in RECIPES if "mobilenetv2" in recipe.name)
    data = ["--data", tmp_path / "data", "--val-data", tmp_path / "data"]
    small = ["--image-size", 32, "--batch-size", 4, "--epochs", 1, "--warmup-epochs", 0]
    for number, (switches, expected) in enumerate(
        (
            (["--model", "mobilenetv2_100"], {"drop_rate": 0.2}),
            (["--weighting", "learned"], {"drop_rate": 0.2, "learned_start": 1.0}),
            (["--model-kwargs.router_bias", 0], {"drop_rate": 0.2, "router_bias": 0}),
        )
    ):
        ask(capsys, "train", "--config", recipe, *data, *small, *switches, "--output", tmp_path / str(number))
        kwargs = load_checkpoint(tmp_path / str(number)).model_kwargs
        assert {name: kwargs[name] for name in expected} == expected


def test_a_run_is_never_overwritten(run, images, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    line = refuse(capsys, "train", "--data", images, "--output", run, *QUICK)
    assert "already holds a run; name another folder" in line
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_the_default_run_folder_is_the_next_free_one(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        assert f"runs/dg_resnet20-{number}" in ask(capsys, "train", "--data", images, "--epochs", 1, *QUICK)


def test_an_image_that_does_not_decode_ends_training(images, tmp_path, capsys):
    write_folder(tmp_path / "data", {"a": 4, "b": 4})
    (tmp_path / "data" / "a" / "2.jpg").write_bytes(b"no image")
    data = ["--data", tmp_path / "data", "--val-data", tmp_path / "data"]
    capsys.readouterr()
    assert main([str(a) for a in ["train", *data, "--output", tmp_path / "run", *QUICK]]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{tmp_path}/data/a/2.jpg does not decode as an image (no known image format)" in last
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()  # an empty folder of the user's own stays
    assert main([str(a) for a in ["train", *data, "--output", tmp_path / "mine", *QUICK]]) == 2
    assert list((tmp_path / "mine").iterdir()) == []


def test_interrupted_training_ends_with_130(images, tmp_path, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Classifier, "training_step", interrupt)
    try:
        assert main([str(a) for a in ["train", "--data", images, "--output", tmp_path / "run", *QUICK]]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().err.endswith("dgnet: interrupted\n")


@pytest.mark.slow
def test_two_processes_write_one_run(images, tmp_path):
    options = ["--epochs", "2", "--accelerator", "cpu", "--devices", "2", "--output", str(tmp_path / "run")]
    command = [sys.executable, "-m", "dgnet", "train", "--data", str(images), *options, *QUICK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("top-1") == 1
    assert [row["epoch"] for row in read_metrics(tmp_path / "run")] == ["0", "1"]
    assert load_checkpoint(tmp_path / "run").config["devices"] == "2"


def test_a_batch_is_divided_among_devices(images, tmp_path, capsys):
    options = ["--accelerator", "cpu", "--devices", 2, "--output", tmp_path / "run", *QUICK, "--batch-size", 3]
    line = refuse(capsys, "train", "--data", images, *options)
    assert "--batch-size 3 cannot be divided among 2 devices" in line
    assert not (tmp_path / "run").exists()


def test_model_options_that_a_checkpoint_cannot_carry():
    for value in (nn.Identity, (4, 4, 4), [torch.zeros(1)]):
        with pytest.raises(UsageError, match="a checkpoint carries plain values only"):
            TrainConfig(model_kwargs={"router": value})


def test_a_shards_image_is_named_with_shard_and_key(run, tmp_path, capsys):
    write_shard(tmp_path / "a.tar", [{"jpg": jpeg(0), "cls": b"0"}, {"jpg": b"no image", "cls": b"1"}])
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data", str(tmp_path / "a.tar")]) == 2
    assert f"{tmp_path}/a.tar, sample 0001 does not decode" in capsys.readouterr().err.splitlines()[-1]


def test_predict_refuses_what_is_no_image(run, tmp_path, capsys):
    (tmp_path / "x.jpg").write_text("no image")
    assert "x.jpg does not decode" in refuse(capsys, "predict", run, tmp_path / "x.jpg")
    assert "y.jpg does not exist" in refuse(capsys, "predict", run, tmp_path / "y.jpg")
    Image.new("RGB", (9, 9)).save(tmp_path / "z.png")
    assert "--top-k must be at least 1" in refuse(capsys, "predict", run, tmp_path / "z.png", "--top-k", 0)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_truncated_checkpoint(run, tmp_path, suffix, capsys):
    source = run / "model.safetensors" if suffix == ".safetensors" else run / "checkpoints" / "last.ckpt"
    path = tmp_path / f"cut{suffix}"
    for share in (0.0, 0.3, 0.9):
        path.write_bytes(source.read_bytes()[: int(share * source.stat().st_size)])
        assert "is truncated or no checkpoint" in refuse(capsys, "evaluate", path)


def test_a_checkpoint_that_carries_code_is_not_run(tmp_path, capsys):
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    torch.save({"state_dict": {}, "dgnet": Attack()}, tmp_path / "evil.ckpt")
    for arguments in (["evaluate", tmp_path / "evil.ckpt"], ["train", "--weights", tmp_path / "evil.ckpt"]):
        assert "carries pickled code and was not loaded" in refuse(capsys, *arguments)
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_whose_description_is_damaged(run, tmp_path, capsys):
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    for damage, expected in (
        ({"dgnet": {}}, "lacks 'model'"),
        ({"dgnet": "x"}, "is no dict"),
        ({"state_dict": None}, "holds no state dict"),
        ({"dgnet": {**content["dgnet"], "preprocessing": {"image_size": "ab"}}}, "cannot be read"),
        ({"dgnet": {**content["dgnet"], "model": "dg_resnet32"}}, "its weights are not those of dg_resnet32"),
    ):
        torch.save({**content, **damage}, tmp_path / "damaged.ckpt")
        assert expected in refuse(capsys, "evaluate", tmp_path / "damaged.ckpt")


def test_weights_of_another_model(run, images, tmp_path, capsys):
    line = refuse(
        capsys, "train", "--data", images, "--model", "dg_resnet32", "--weights", run, "--output", tmp_path / "x", *QUICK
    )
    assert "is a checkpoint of dg_resnet20, not of dg_resnet32 as asked for" in line
    options = ["--weighting", "learned", "--output", tmp_path / "x", *QUICK]
    line = refuse(capsys, "train", "--data", images, "--weights", run, *options)
    assert "is of dg_resnet20 with other options" in line
    torch.save({"a": torch.zeros(1)}, tmp_path / "raw.pth")
    line = refuse(capsys, "train", "--data", images, "--weights", tmp_path / "raw.pth", "--output", tmp_path / "x", *QUICK)
    assert "not of dg_resnet20 as asked for" in line
    assert "holds weights only" in refuse(capsys, "evaluate", tmp_path / "raw.pth")
    assert not (tmp_path / "x").exists()
