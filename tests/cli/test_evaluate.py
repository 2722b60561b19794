"""Evaluation, export and prediction as a user types them: what they print and write."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
from PIL import Image

from dgnet.checkpoint import load_checkpoint
from dgnet.cli import main
from dgnet.evaluation import evaluate, open_evaluation_data
from dgnet.files import read_table
from dgnet.graph import find_stages
from tests.helpers.command import ask, refuse
from tests.helpers.data import jpeg, write_folder, write_shard
from tests.helpers.processes import free_port


def test_evaluate_gives_the_accuracy_of_the_last_epoch(run, capsys):
    row = read_table(run / "metrics.csv")[-1]
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


@pytest.mark.slow
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
    for executor in ("plain", "native"):
        words = ["evaluate", file, "--mode", "sparse", "--executor", executor, "--json"]
        assert json.loads(ask(capsys, *words))["executed_multiply_adds"] == pytest.approx(chosen["executed_multiply_adds"])
    speeds = json.loads(ask(capsys, "evaluate", run, "--speed", "--json"))["images_per_second"]
    assert set(speeds) == {"static", "dense", "sparse"}


def test_an_open_edge_weighs_what_evaluate_is_asked_for(run, tmp_path, capsys):
    gated, raw = (
        json.loads(ask(capsys, "evaluate", run, "--inference-weight", weight, "--json")) for weight in ("gated", "raw")
    )
    assert gated == json.loads(ask(capsys, "evaluate", run, "--json"))
    network = load_checkpoint(run).build_network()
    for stage in find_stages(network):
        stage.weighting.options = replace(stage.weighting.options, inference_weight="raw")
    dataset = open_evaluation_data(load_checkpoint(run))
    assert raw == json.loads(json.dumps(asdict(evaluate(network, dataset))))
    assert raw["loss"] != gated["loss"]
    file = tmp_path / "raw.safetensors"
    ask(capsys, "evaluate", run, "--inference-weight", "raw", "--write", file)
    assert json.loads(ask(capsys, "evaluate", file, "--json")) == raw


def test_a_sweep_that_cannot_be_written_is_refused_before_it_begins(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    line = refuse(capsys, "evaluate", run, "--sweep-threshold", "--output", tmp_path / "file")
    assert "file cannot be written: File exists; name another with --output" in line


def test_evaluate_refuses_what_does_not_go_together(run, capsys):
    for words, message in (
        (["--write", "x.safetensors"], "--write needs --threshold-offset or --inference-weight"),
        (["--inference-weight", "plain"], "unknown inference_weight 'plain'"),
        (["--offsets", "[0]"], "--offsets needs --sweep-threshold"),
        (["--compile"], "--compile needs --speed"),
        (["--sweep-threshold", "--speed"], "--sweep-threshold cannot be combined with --speed"),
        (
            ["--sweep-threshold", "--inference-weight", "raw", "--write", "x.safetensors"],
            "--sweep-threshold cannot be combined with --write",
        ),
        (["--threshold-offset", "0.1", "--write", "x.ckpt"], "must end in .safetensors"),
        (["--mode", "fast"], "unknown --mode 'fast'"),
        (["--executor", "fast"], "unknown --executor 'fast'; allowed: recommended, plain, native"),
        (["--executor", "plain"], "--executor plain needs --mode sparse, --speed or --sweep-threshold"),
    ):
        assert message in refuse(capsys, "evaluate", run, *words)


def test_adjacency_controls_are_printed(run, capsys):
    output = ask(capsys, "evaluate", run, "--adjacency-controls")
    assert "top-1 with the mean adjacency " in output
    result = json.loads(ask(capsys, "evaluate", run, "--adjacency-controls", "--json"))
    assert f"{result['top1_mean_adjacency']:.2f} %, with another image's {result['top1_other_adjacency']:.2f} %" in output
    assert json.loads(ask(capsys, "evaluate", run, "--json"))["top1_mean_adjacency"] is None


def test_curves_of_connectivity_are_those_of_evaluation(run, capsys):
    row = read_table(run / "metrics.csv")[-1]
    result = json.loads(ask(capsys, "evaluate", run, "--json"))
    network = load_checkpoint(run).build_network()
    edges = [int(stage.topology.mask.sum()) for stage in network.stages]
    closed = [float(row[f"val_stage{number}_closed_edges"]) for number in (1, 2, 3)]
    share = sum(count * part for count, part in zip(edges, closed, strict=True)) / sum(edges)
    assert share == pytest.approx(result["closed_edges"], abs=1e-6)
    for number, stage in enumerate(network.stages, start=1):
        assert 0 < float(row[f"val_stage{number}_edge_weight"]) < 1
        assert float(row[f"stage{number}_threshold"]) == pytest.approx(float(stage.weighting.tau.detach().mean()), abs=1e-7)


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
        (["--output", tmp_path / "no" / "x.onnx"], "does not exist; create it first"),
    ):
        assert message in refuse(capsys, "export", run, *words)


def test_predict_names_classes_from_the_checkpoint(run, images, capsys):
    image = images / "val" / "dark" / "0.jpg"
    (prediction,) = json.loads(ask(capsys, "predict", run, image, "--json"))
    assert prediction["image"] == str(image)
    assert set(prediction["classes"]) == {"dark", "light"}
    assert sum(prediction["probabilities"]) == pytest.approx(1)
    assert ask(capsys, "predict", run, image, image, "--top-k", 1).count("\n") == 2


def test_each_prediction_is_one_line_whatever_the_name_is(run, images, tmp_path, capsys):
    odd = tmp_path / os.fsdecode(b"a\nb\xff.jpg")
    shutil.copy(images / "val" / "dark" / "0.jpg", odd)
    line = ask(capsys, "predict", run, odd)
    assert "a\\nb\\xff.jpg: " in line
    assert line.count("\n") == 1


def test_predict_refuses_what_is_no_image(run, tmp_path, capsys):
    (tmp_path / "x.jpg").write_text("no image")
    assert "x.jpg does not decode" in refuse(capsys, "predict", run, tmp_path / "x.jpg")
    assert "y.jpg does not exist" in refuse(capsys, "predict", run, tmp_path / "y.jpg")
    assert "x.jpg does not decode" in refuse(capsys, "predict", run, tmp_path)
    Image.new("RGB", (9, 9)).save(tmp_path / "z.png")
    assert "--top-k must be at least 1" in refuse(capsys, "predict", run, tmp_path / "z.png", "--top-k", 0)


def test_a_shards_image_is_named_with_shard_and_key(run, tmp_path, capsys):
    write_shard(tmp_path / "a.tar", [{"jpg": jpeg(0), "cls": b"0"}, {"jpg": b"no image", "cls": b"1"}])
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data", str(tmp_path / "a.tar")]) == 2
    assert f"{tmp_path}/a.tar, sample 0001 does not decode" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_two_processes_print_the_figures_of_one(run, capsys):
    alone = json.loads(ask(capsys, "evaluate", run, "--json"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    command += ["-m", "dgnet", "evaluate", str(run), "--json", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == alone.keys()
    for name, value in alone.items():
        assert found[name] == (value if value is None else pytest.approx(value, rel=1e-5))
