"""What version 0.1 wrote keeps loading: a run with gates, interrupted; a static run; a detector (tests/data/v0_1)."""

from __future__ import annotations

import json
import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from dgnet.checkpoint import load_checkpoint
from dgnet.cli import main
from dgnet.detection import CocoDetection, evaluate_detector, load_detector
from dgnet.evaluation import evaluate, open_evaluation_data
from dgnet.files import read_table

STORED = Path(__file__).parent / "data" / "v0_1"


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads((STORED / "expected.json").read_text())


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """The folder in which version 0.1 wrote its runs; their data lies beside them."""
    for archive in STORED.glob("*.tar.xz"):
        with tarfile.open(archive) as tar:
            tar.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def count_head(stored: dict[str, Any], head: int) -> dict[str, Any]:
    """What version 0.1 found, with the multiply-adds of the head, which it left out."""
    counted = dict(stored)
    for name in ("dense_multiply_adds", "executed_multiply_adds"):
        counted[name] += head
    for name in ("executed_percentiles", "executed_by_class"):
        counted[name] = {key: value + head for key, value in stored[name].items()}
    return counted


def check_evaluation(run: Path, expected: dict[str, Any], rel: float) -> None:
    checkpoint = load_checkpoint(run)
    dataset = open_evaluation_data(checkpoint)
    images = torch.stack([dataset[index][0] for index in range(4)])
    with torch.no_grad():
        logits = checkpoint.build_network()(images)
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=rel, atol=rel)
    for mode, stored in expected["evaluation"].items():
        controls = stored["top1_mean_adjacency"] is not None
        found = asdict(evaluate(checkpoint.build_network(), dataset, batch_size=5, mode=mode, adjacency_controls=controls))
        assert found.keys() >= stored.keys()
        head = checkpoint.build_network().get_classifier().weight.numel()
        for name, value in count_head(stored, head).items():
            if isinstance(value, float):
                assert found[name] == pytest.approx(value, rel=rel, abs=1e-6), name
            elif isinstance(value, dict):
                assert found[name] == pytest.approx(value, rel=rel), name
            else:
                assert found[name] == value, name


@pytest.mark.parametrize("name", ["dynamic", "static"])
def test_a_run_evaluates_as_it_did(old, expected, name):
    check_evaluation(old / name, expected[name], rel=1e-4)


def test_an_interrupted_run_resumes_to_the_same_end(old, expected, capsys):
    assert main(["train", "--resume", str(old / "dynamic")]) == 0
    rows = read_table(old / "dynamic" / "metrics.csv")
    assert [row.keys() for row in rows] == [row.keys() for row in expected["resumed"]["metrics"]]
    for row, stored in zip(rows, expected["resumed"]["metrics"], strict=True):
        assert row["step"] == stored["step"]
        for name in ("lr", "train_loss", "val_loss"):  # another processor's rounding moves single images over thresholds
            assert float(row[name]) == pytest.approx(float(stored[name]), rel=2e-2), name


def test_a_detector_evaluates_as_it_did(old, expected):
    checkpoint = load_detector(old / "detector")
    dataset = CocoDetection("photos.json", "photos", class_names=checkpoint.class_names)
    found = evaluate_detector(checkpoint.build(), dataset, batch_size=2)
    stored = expected["detector"]
    assert asdict(found.precision) == stored["precision"]
    assert found.connectivity == pytest.approx(stored["connectivity"], rel=1e-4)
    for old_result in stored["results"]:  # in any order: some scores differ by less than another processor's rounding
        scores = [
            result["score"]
            for result in found.results
            if (result["image_id"], result["category_id"]) == (old_result["image_id"], old_result["category_id"])
            and result["bbox"] == pytest.approx(old_result["bbox"], rel=1e-3, abs=1e-2)
        ]
        assert any(score == pytest.approx(old_result["score"], rel=1e-3) for score in scores)


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "dynamic", "--threshold-offset", "0.1", "--json"],
        ["predict", "static", "images/val/cross/0.png", "--json"],
        ["detect", "evaluate", "detector", "--json"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_the_options_of_version_0_1_are_still_taken(old, words, capsys):
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)
