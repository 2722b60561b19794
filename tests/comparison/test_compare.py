"""`dgnet compare`: what it measures is what `evaluate` measures, and table, files and picture agree."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

import dgnet
from dgnet._cost import cost_model
from dgnet.checkpoint import describe_network, load_checkpoint, save_tensors
from dgnet.cli import main
from dgnet.comparison import compare
from dgnet.comparison._report import find_front
from dgnet.data import Preprocessing
from dgnet.detection import (
    CocoAnnotations,
    CocoDetection,
    Detector,
    describe_detector,
    evaluate_detector,
    load_detector,
    read_annotations,
)
from dgnet.evaluation import evaluate, open_evaluation_data
from dgnet.graph import find_stages
from dgnet.models.cifar_resnet import CifarResNet, DynamicCifarResNet
from tests.helpers.boxes import box_entry, image_entry, write_set
from tests.helpers.command import ask, refuse

FAST = ["--batch-sizes", "1", "4", "--rounds", "2", "--compile", "false"]
SMALL = {"channels": [4, 4, 4]}
CLASSES = [str(digit) for digit in range(10)]


def save(path: Path, model: str, size: int = 8, classes: list[str] = CLASSES, **options: object) -> Path:
    """Save a checkpoint of a small network that has seen no image."""
    kind = DynamicCifarResNet if model.startswith("dg_") else CifarResNet
    network = kind((3, 3, 3), num_classes=len(classes), **SMALL, **options).eval()
    for stage in find_stages(network):
        if stage.node_gates is not None:
            stage.node_gates.bias.data[2] = -9.0  # the second block never runs
    preprocessing = Preprocessing((size, size), (0.5,) * 3, (0.5,) * 3)
    described = describe_network(model, {**SMALL, **options}, classes, preprocessing, config={})
    save_tensors(network.state_dict(), path, described)
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pair")
    return [
        save(folder / "static.safetensors", "resnet20"),
        save(folder / "dynamic.safetensors", "dg_resnet20", node_gate="hard", weighting="fixed"),
    ]


def test_two_networks(pair, tmp_path, capsys):
    words = ["compare", f"plain={pair[0]}", pair[1], "--data", "digits", *FAST, "--output", tmp_path]
    printed = ask(capsys, *words)
    found = json.loads((tmp_path / "compare.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["plain", "dg_resnet20"]
    assert [row["kind"] for row in found["rows"]] == ["static", "dynamic"]
    for path, row in zip(pair, found["rows"], strict=True):
        checkpoint = load_checkpoint(path)
        alone = evaluate(checkpoint.build_network(), open_evaluation_data(checkpoint, "digits"))
        assert row["top1"] == pytest.approx(alone.top1)
        assert row["executed_multiply_adds"] == pytest.approx(alone.executed_multiply_adds)
        assert f"{row['top1']:.2f}" in printed
        for timing in row["timings"]:
            low, high = timing["images_per_second_range"]
            assert low <= timing["images_per_second"] <= high
            assert 0 < timing["p50_ms"] <= timing["p95_ms"]
            assert timing["form"] in (("dense",) if path == pair[0] else ("dense", "sparse"))
    first, second = found["rows"]
    assert second["executed_multiply_adds"] < second["dense_multiply_adds"]
    assert all(timing["ratio"] == 1 for timing in first["timings"])
    with (tmp_path / "compare.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["name"], line["batch_size"]) for line in lines] == [
        ("plain", "1"),
        ("plain", "4"),
        ("dg_resnet20", "1"),
        ("dg_resnet20", "4"),
    ]
    timings = [timing for row in found["rows"] for timing in row["timings"]]
    assert [float(line["images_per_second"]) for line in lines] == [timing["images_per_second"] for timing in timings]
    page, picture = (tmp_path / "compare.html").read_text(), (tmp_path / "compare.svg").read_text()
    for text in ("plain", "dg_resnet20"):
        assert text in page
        assert text in picture
    assert f"{first['top1']:.2f}" in page
    assert (tmp_path / "compare.png").stat().st_size > 1000


def test_a_run_that_cannot_be_loaded_is_named_and_the_others_are_compared(pair, tmp_path, capsys):
    missing = tmp_path / "missing"
    status = main(
        ["compare", str(pair[0]), str(missing), "--data", "digits", *FAST, "--output", str(tmp_path / "out"), "--json"]
    )
    printed, _ = capsys.readouterr()
    assert status == 1
    found = json.loads(printed)
    assert len(found["rows"]) == 1
    assert list(found["failed"]) == [str(missing)]
    assert "does not exist" in found["failed"][str(missing)]


def test_mistakes(pair, tmp_path, capsys):
    larger = save(tmp_path / "larger.safetensors", "resnet20", size=12)
    others = save(tmp_path / "others.safetensors", "resnet20", classes=["a", "b"])
    out = ["--output", tmp_path / "out"]
    for words, message in [
        ([pair[0], larger], "take images of different sizes (12×12 and 8×8); compare them with --allow-mixed-sizes"),
        ([pair[0], others], "were trained for different classes (2 and 10); compare networks of the same ones"),
        ([pair[0], "--batch-sizes", "1000"], "--batch-sizes 1000 is more than the 355 images; use smaller batches"),
        ([pair[0], "--batch-sizes", "0"], "--batch-sizes must be at least 1"),
        ([pair[0], "--rounds", "0"], "--rounds must be at least 1"),
        ([tmp_path / "nothing"], "no network is left to compare: checkpoint"),
    ]:
        assert message in refuse(capsys, "compare", *words, "--data", "digits", "--compile", "false", *out)
    assert "does not say where the data of its run is; name data with --data" in refuse(capsys, "compare", pair[0], *out)


def test_networks_of_different_sizes_if_asked(pair, tmp_path):
    larger = save(tmp_path / "larger.safetensors", "resnet20", size=12)
    found = compare([pair[0], larger], "digits", [2], rounds=1, compile=False, allow_mixed_sizes=True)
    assert [row.image_size for row in found.rows] == [(8, 8), (12, 12)]
    assert [row.name for row in found.rows] == ["resnet20 (1)", "resnet20 (2)"]


def test_the_front_is_what_no_other_beats_in_both():
    points = [(3.0, 90.0), (1.0, 80.0), (2.0, 79.0), (2.0, 85.0), (4.0, 90.0)]
    assert find_front(points) == [1, 3, 0]
    assert find_front([]) == []


def save_detector(path: Path, model: str, annotations: CocoAnnotations, **options: object) -> Path:
    """Save a detector that has seen no image."""
    kwargs = {"short_side": 32, "long_side": 64, "fpn_channels": 8, "fpn_norm": False, "frozen_stages": 0, "frozen_norm": False}
    kwargs |= {"options": {"box_score_thresh": 0.0, "box_detections_per_img": 5}}
    torch.manual_seed(0)
    detector = Detector(dgnet.create_model(model, **options), len(annotations.class_names), **kwargs).eval()
    for stage in find_stages(detector):
        if stage.node_gates is not None:
            stage.node_gates.bias.data[2] = -9.0
    classes, ids = annotations.class_names, annotations.category_ids
    save_tensors(detector.state_dict(), path, describe_detector(model, dict(options), classes, ids, kwargs, config={}))
    return path


@pytest.mark.slow
def test_two_detectors(tmp_path, capsys):
    entries = [image_entry(id, *((48, 32), (32, 48))[id % 2]) for id in range(1, 4)]
    boxes = [box_entry(id, id, [4.0, 4.0, 20.0, 16.0]) for id in range(1, 4)]
    annotations, folder = write_set(tmp_path / "set", entries, boxes)
    read = read_annotations(annotations)
    static = save_detector(tmp_path / "static.safetensors", "strided_resnet18", read)
    dynamic = save_detector(tmp_path / "dynamic.safetensors", "dg_resnet18", read, node_gate="hard", weighting="fixed")
    data = ["--data", annotations, "--images", folder]
    words = ["compare", f"plain={static}", dynamic, *data, "--batch-sizes", "1", "2", "--rounds", "1", "--output", tmp_path]
    printed = ask(capsys, *words)
    found = json.loads((tmp_path / "compare.json").read_text())
    assert found["task"] == "detect"
    assert "AP %" in printed
    assert "neither folded nor compiled" in printed
    for path, row in zip((static, dynamic), found["rows"], strict=True):
        checkpoint = load_detector(path)
        alone = evaluate_detector(checkpoint.build(), CocoDetection(annotations, folder, class_names=checkpoint.class_names))
        assert (row["ap"], row["ap50"]) == (alone.precision.ap, alone.precision.ap50)
        assert row["top1"] is None
        assert row["dense_multiply_adds"] == cost_model(checkpoint.build().backbone, (32, 64)).dense
        assert f"{row['ap']:.2f}" in printed
    assert found["rows"][0]["executed_multiply_adds"] == found["rows"][0]["dense_multiply_adds"]
    # The second block of each stage never runs: all stages have two.
    stage_costs = cost_model(load_detector(dynamic).build().backbone, (32, 64))
    ran = torch.tensor([[1.0, 1, 0, 1]])
    expected = stage_costs.fixed + sum(float(stage.executed(ran)) for stage in stage_costs.stages)
    assert found["rows"][1]["executed_multiply_adds"] == pytest.approx(expected)
    classifier = save(tmp_path / "classifier.safetensors", "resnet20")
    message = "dg_resnet18 is a detector and resnet20 a classifier; compare networks that do the same task"
    assert message in refuse(capsys, "compare", classifier, dynamic, *data, "--output", tmp_path / "out")
    message = "--images is for detectors; classifiers are compared on --data"
    assert message in refuse(
        capsys, "compare", classifier, "--data", "digits", "--images", folder, "--output", tmp_path / "out"
    )


def test_paths_and_labels_may_have_equal_signs(pair, tmp_path):
    folder = tmp_path / "lr=0.1"
    folder.mkdir()
    for source, name in zip(pair, ("a=b.safetensors", "c.safetensors"), strict=True):
        (folder / name).write_bytes(source.read_bytes())
    runs = [folder / "a=b.safetensors", f"budget=0.6={folder / 'c.safetensors'}"]
    found = compare(runs, "digits", [2], rounds=1, compile=False)
    assert not found.failed
    assert [row.name for row in found.rows] == ["resnet20", "budget=0.6"]
