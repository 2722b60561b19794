"""Training, evaluating and applying detectors as a user types it."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch
import yaml
from PIL import Image

import dgnet
import dgnet.cli
from dgnet.checkpoint import read_tensors
from dgnet.detection import DetectConfig, load_detector, read_annotations, train_detector
from dgnet.training import Interrupted, read_run
from dgnet.training._checkpointing import Checkpointing
from tests.helpers.boxes import box_entry, image_entry, write_set
from tests.helpers.command import ask, refuse
from tests.helpers.processes import free_port

QUICK = ["--short-side", "32", "--long-side", "64", "--fpn-channels", "8", "--batch-size", "2", "--warmup-iterations", "1"]
RUN = ["--model", "dg_resnet18", "--iterations", "4", "--evaluate-every", "2", "--lr-steps", "[3]", "--lr", "0.01", *QUICK]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    """Five training images and three to evaluate on, as options."""
    options = {}
    for prefix, count in (("", 5), ("val_", 3)):
        folder = tmp_path_factory.mktemp(f"{prefix}set")
        images = [image_entry(id, *((48, 32), (32, 48))[id % 2]) for id in range(1, count + 1)]
        boxes = [box_entry(id, id, [4.0, 4.0, 20.0, 16.0], (7, 3)[id % 2]) for id in range(1, count + 1)]
        annotations, folder = write_set(folder, images, boxes)
        options |= {f"{prefix}data": str(annotations), f"{prefix}images": str(folder)}
    return options


def words(data: dict[str, str]) -> list[str]:
    return [word for name, value in data.items() for word in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "a"
    assert dgnet.cli.main(["detect", "train", *words(data), *RUN, "--output", str(folder)]) == 0
    return folder


def test_a_run_folder_holds_what_is_promised(run):
    names = {path.name for path in run.iterdir()}
    assert names == {"config.yaml", "data.json", "metrics.csv", "tensorboard", "checkpoints", "model.safetensors"}
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["topology"] == "complete"
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["1", "3"]
    losses = ("classifier", "box_reg", "objectness", "rpn_box_reg")
    parts = sum(float(rows[0][f"train_loss_{name}"]) for name in losses)
    assert float(rows[0]["train_loss"]) == pytest.approx(parts, rel=1e-4)
    assert {"val_ap", "val_ap50", "val_stage1_closed_edges", "stage1_threshold", "lr"} <= set(rows[0])
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.01, 0.001])


@pytest.mark.slow
def test_a_run_that_was_interrupted_goes_on_with_the_same_result(run, data, tmp_path, monkeypatch):
    save = Checkpointing.on_train_batch_end

    def interrupt(self, trainer, *arguments):
        if trainer.global_step == 1:
            self.signum = signal.SIGTERM
        save(self, trainer, *arguments)

    config = DetectConfig(**{**yaml.safe_load((run / "config.yaml").read_text()), "output": str(tmp_path / "b")})
    monkeypatch.setattr(Checkpointing, "on_train_batch_end", interrupt)
    with pytest.raises(Interrupted):
        train_detector(config)
    monkeypatch.undo()
    train_detector(read_run(tmp_path / "b", {}, DetectConfig)[0], tmp_path / "b")
    expected, found = (read_tensors(folder / "model.safetensors")[0] for folder in (run, tmp_path / "b"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert (tmp_path / "b" / "metrics.csv").read_text() == (run / "metrics.csv").read_text()


@pytest.mark.slow
def test_evaluation_repeats_that_of_training(run, data, tmp_path, capsys):
    (*_, last) = csv.DictReader((run / "metrics.csv").read_text().splitlines())
    written = {}
    for mode in ("dense", "sparse"):
        output = ask(capsys, "detect", "evaluate", run, "--mode", mode, "--output", tmp_path / "results.json")
        assert "AP50" in output
        assert "distinct wirings" in output
        written[mode] = [tuple(result.values()) for result in json.loads((tmp_path / "results.json").read_text())]
    assert len(written["dense"]) > 10
    for dense, sparse in zip(*written.values(), strict=True):
        assert dense[:2] == sparse[:2]
        assert [*dense[2], dense[3]] == pytest.approx([*sparse[2], sparse[3]], abs=1e-2)
    for options in ((), ("--mode", "sparse"), ("--backend", "faster-coco-eval")):
        found = json.loads(ask(capsys, "detect", "evaluate", run, "--json", *options))
        assert found["ap"] == pytest.approx(float(last["val_ap"]), abs=0.05)
        assert found["by_class"].keys() == {"plate", "cell", "never seen"}
        shares = [float(value) for name, value in last.items() if name.endswith("closed_edges")]
        assert found["closed_edges"] == pytest.approx(fmean(shares), abs=1e-6)  # each stage has as many edges
    again = json.loads(ask(capsys, "detect", "evaluate", tmp_path / "results.json", "--data", data["val_data"], "--json"))
    assert again["ap"] == pytest.approx(found["ap"])


def test_results_are_evaluated_without_a_detector(data, tmp_path, capsys):
    annotations = read_annotations(data["val_data"])
    truth = [
        {"image_id": image.id, "category_id": annotations.category_ids[int(label)], "bbox": box.tolist(), "score": 1.0}
        for index, image in enumerate(annotations.images)
        for box, label in zip(
            annotations.boxes[annotations.offsets[index] : annotations.offsets[index + 1]],
            annotations.labels[annotations.offsets[index] : annotations.offsets[index + 1]],
            strict=True,
        )
    ]
    for results, expected in ((truth, 100.0), ([], 0.0)):
        (tmp_path / "results.json").write_text(json.dumps(results))
        found = json.loads(ask(capsys, "detect", "evaluate", tmp_path / "results.json", "--data", data["val_data"], "--json"))
        assert found["ap"] == pytest.approx(expected)


def test_predictions_are_drawn_and_written(run, data, tmp_path, capsys):
    output = ask(capsys, "detect", "predict", run, data["val_images"], "--output", tmp_path / "drawn", "--score", 0)
    assert len(output.splitlines()) == 3
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {"1.jpg", "2.jpg", "3.jpg", "results.json"}
    with Image.open(tmp_path / "drawn" / "1.jpg") as image:
        assert image.size == (32, 48)
    results = json.loads((tmp_path / "drawn" / "results.json").read_text())
    assert len(results) > 10
    assert {result["category_id"] for result in results} <= {7, 3, 90}
    assert {Path(result["file_name"]).name for result in results} <= {"1.png", "2.png", "3.png"}


def test_a_classifiers_weights_start_the_backbone(run, data, tmp_path, capsys):
    network = dgnet.create_model("dg_resnet18", num_classes=5)
    torch.save(network.state_dict(), tmp_path / "classifier.pth")
    short = ["--iterations", 1, "--evaluate-every", 1, "--lr", 1e-9, "--frozen-norm", "true", "--frozen-stages", 2]
    ask(
        capsys,
        "detect",
        "train",
        *words(data),
        *RUN,
        *short,
        "--weights",
        tmp_path / "classifier.pth",
        "--output",
        tmp_path / "b",
    )
    found = load_detector(tmp_path / "b").state_dict
    torch.testing.assert_close(
        found["backbone.body.layer1.nodes.0.conv1.weight"], network.layer1.nodes[0].conv1.weight.detach()
    )
    torch.testing.assert_close(found["backbone.body.bn1.running_mean"], network.bn1.running_mean)


def test_a_detectors_weights_start_one_of_other_classes(run, data, tmp_path, capsys):
    images = [image_entry(1), image_entry(2)]
    annotations, folder = write_set(
        tmp_path, images, [box_entry(1, 1, [1, 1, 20, 20], 1), box_entry(2, 2, [1, 1, 9, 9], 1)], [{"id": 1, "name": "other"}]
    )
    own = {"data": str(annotations), "images": str(folder), "val_data": str(annotations)}
    short = ["--iterations", 1, "--evaluate-every", 1, "--lr", 1e-9]
    ask(capsys, "detect", "train", *words(own), *RUN, *short, "--weights", run, "--output", tmp_path / "b")
    expected, found = load_detector(run).state_dict, load_detector(tmp_path / "b").state_dict
    name = "roi_heads.box_head.fc6.weight"
    torch.testing.assert_close(found[name], expected[name])
    assert found["roi_heads.box_predictor.cls_score.weight"].shape[0] == 2
    assert "other" in refuse(capsys, "detect", "evaluate", run, "--data", annotations, "--images", folder)


def test_checkpoints_of_the_other_task_say_so(run, data, tmp_path, capsys):
    assert "use it with: dgnet detect evaluate" in refuse(capsys, "evaluate", run)
    assert "not from a run of dgnet train" in refuse(capsys, "train", "--resume", run)
    (tmp_path / "weights.pth").write_bytes(b"")
    assert "is empty" in refuse(capsys, "detect", "evaluate", tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train"], "--data is needed"),
        (["train", "--data", "no.json", "--images", "x", "--val-data", "y"], "annotations no.json cannot be read"),
        (
            ["train", "--data", "a", "--images", "b", "--val-data", "c", "--warmup-iterations", "99999"],
            "--warmup-iterations must",
        ),
        (["trian"], "unknown command 'detect trian'; did you mean 'train'?"),
        (["evaluate", "results.json"], "name its annotations with --data"),
        (
            ["train", "--lr-step", "3"],
            "unknown option --lr-step; did you mean '--lr-steps'?; options: dgnet detect train --help",
        ),
    ],
)
def test_mistakes_end_in_one_line(arguments, expected, capsys):
    assert expected in refuse(capsys, "detect", *arguments)


def test_predict_refuses_what_is_no_image(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.jpg").write_bytes(b"no image")
    for path, expected in (("gone.jpg", "does not exist"), ("empty", "holds no images"), ("a.jpg", "does not decode")):
        assert expected in refuse(capsys, "detect", "predict", run, tmp_path / path, "--output", tmp_path / "out")


def test_predictions_lose_nothing(run, data, tmp_path, capsys):
    image = Path(data["val_images"]) / "1.png"
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.open(image).convert("RGB").save(photos / "1.jpg")
    (photos / "1.png").write_bytes(image.read_bytes())
    (photos / "broken.png").write_bytes(b"no image")
    before = (photos / "1.jpg").read_bytes()
    assert "holds the images themselves" in refuse(capsys, "detect", "predict", run, photos, "--output", photos)
    assert (photos / "1.jpg").read_bytes() == before
    for _ in range(2):  # drawings of the first call are not detected on by the second
        line = refuse(capsys, "detect", "predict", run, photos, "--output", photos / "drawn")
        assert "1 of 3 images do not decode; the other 2 are drawn in" in line
        assert {path.name for path in (photos / "drawn").iterdir()} == {"1.jpg", "1.png.jpg", "results.json"}


def test_one_image_that_cannot_be_processed_stops_no_other(run, data, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "b.png").write_bytes((Path(data["val_images"]) / "1.png").read_bytes())
    Image.new("RGB", (100_000, 1)).save(photos / "a.png")
    os.mkfifo(photos / "c.png")
    (photos / ".hidden.png").write_bytes(b"")
    line = refuse(capsys, "detect", "predict", run, photos, "--output", tmp_path / "out")
    assert "a.png is 100000 × 1 pixels; one side is more than 2,000 times the other" in line
    assert "2 of 3 images do not decode; the other 1 are drawn" in line
    assert "left out: 1 hidden file or folder (.hidden.png)" in line
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"b.jpg", "results.json"}


def test_half_precision_detects_in_full(data, tmp_path, capsys):
    short = ["--iterations", 1, "--evaluate-every", 1, "--precision", "bf16"]
    assert ask(capsys, "detect", "train", *words(data), *RUN, *short, "--output", tmp_path / "b").startswith("AP ")


def test_help_lists_the_commands_of_the_group(capsys):
    with pytest.raises(SystemExit):
        dgnet.cli.main(["detect", "--help"])
    assert {"train", "evaluate", "predict"} <= set(capsys.readouterr().out.split())


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one(data, tmp_path):
    def command(*arguments: object) -> str:
        done = subprocess.run([sys.executable, "-m", "dgnet", "detect", *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    two = ["--accelerator", "cpu", "--devices", 2]
    assert command("train", *words(data), *RUN, *two, "--output", tmp_path / "two").startswith("AP ")
    rows = list(csv.DictReader((tmp_path / "two" / "metrics.csv").read_text().splitlines()))
    assert len(rows) == 2
    alone = json.loads(command("evaluate", tmp_path / "two", "--json"))
    assert alone["ap"] == pytest.approx(float(rows[-1]["val_ap"]), abs=0.05)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    done = subprocess.run(
        [*torchrun, "-m", "dgnet", "detect", "evaluate", str(tmp_path / "two"), "--json", "--device", "cpu"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ap"] == pytest.approx(alone["ap"])
